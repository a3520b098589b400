"""Rates over costs as a drawing: curves of several points, single points, their intervals."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from clvr_jax.statistics import Rate

WIDTH, HEIGHT = 720, 330  # of the drawing, its margins included
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 96, 12, 40
_LINE = 15  # between the labels of points that lie close
_NEAR = 120  # so close, from left to right
_LETTER = 7  # width of a letter, about
_TICKS = 6  # at most, from left to right


class Curve(NamedTuple):
    """What one way reaches: several points are joined, the last one bears the name."""

    name: str
    points: Sequence[tuple[float, Rate]]  # cost and rate


class Chart(NamedTuple):
    """Rates, upwards, over costs, to the right.

    Attributes:
      title: above it.
      across: what the costs are.
      curves: of the chart; the first is drawn in colour.
      note: below it.
    """

    title: str
    across: str
    curves: Sequence[Curve]
    note: str = ""

    def drawing(self) -> dict[str, Any]:
        """Return places on the drawing, for the template.

        Raises:
          ValueError: there is no point, or a cost below zero.
        """
        costs = [cost for curve in self.curves for cost, _ in curve.points]
        if not costs or min(costs) < 0:
            raise ValueError(f"{self.title}: a chart needs costs from zero on, got {costs}")
        step = _step(max(costs) or 1.0)
        most = max(costs) * 1.02 or 1.0
        x = lambda cost: _LEFT + (WIDTH - _LEFT - _RIGHT) * cost / most
        y = lambda share: HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * share
        curves, labels = [], []
        for curve in self.curves:
            dots = [
                {"x": x(cost), "y": y(r.value), "low": y(r.low), "high": y(r.high)}
                for cost, r in curve.points
            ]
            curves.append({"name": curve.name, "dots": dots})
            labels.append((dots[-1]["x"], dots[-1]["y"]))
        for curve, (across, up) in zip(curves, _apart(labels), strict=True):
            fits = across + 9 + _LETTER * len(curve["name"]) < WIDTH
            place = (across + 9, "start") if fits else (across - 9, "end")
            curve["label"] = {"x": place[0], "y": up, "anchor": place[1]}
        return {
            "curves": curves,
            "right": [
                (x(n * step), f"{n * step:g}") for n in range(int(most / step * (1 + 1e-9)) + 1)
            ],
            "up": [(y(n / 4), f"{25 * n} %") for n in range(5)],
            "x0": _LEFT,
            "x1": WIDTH - _RIGHT,
            "y0": HEIGHT - _BOTTOM,
            "width": WIDTH,
            "height": HEIGHT,
        }


def _step(most: float) -> float:
    """A round distance of ticks."""
    raw = most / _TICKS
    power = 10.0 ** math.floor(math.log10(raw))
    return next(n * power for n in (1, 2, 5, 10) if n * power >= raw * (1 - 1e-9))


def _apart(labels: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The labels' places, moved up from one another where they would lie on each other."""
    order = sorted(range(len(labels)), key=lambda i: -labels[i][1])
    placed: dict[int, tuple[float, float]] = {}
    for index in order:
        across, up = labels[index]
        for x, y in sorted(placed.values(), key=lambda place: -place[1]):
            if abs(x - across) < _NEAR and abs(y - up) < _LINE:
                up = y - _LINE
        placed[index] = across, up
    return [placed[index] for index in range(len(labels))]
