"""Intervals and tests of shares: how sure a pass rate is, and whether two differ.

`a` and `b` of paired functions are passes and failures of two systems on the same cases.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

Results = Sequence[bool] | Bool[np.ndarray, "n"]


class Rate(NamedTuple):
    """A share of trials, and where it could lie.

    Attributes:
      passed: successes.
      trials: of how many.
      low, high: ends of the Wilson interval.
    """

    passed: int
    trials: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """The share, from 0 to 1; nan without trials."""
        return self.passed / self.trials if self.trials else math.nan

    def as_dict(self) -> dict[str, float | int | None]:
        """Return it for a result file; the rate is None without trials."""
        return {**self._asdict(), "rate": self.value if self.trials else None}


class Difference(NamedTuple):
    """The share of `a` less that of `b`, and the ends of its interval."""

    value: float
    low: float
    high: float


def rate(passes: Iterable[bool] | Bool[np.ndarray, "n"], level: float = 0.95) -> Rate:
    """Return the share of passes with its interval."""
    flags = [bool(each) for each in passes]
    return rate_of(sum(flags), len(flags), level)


def rate_of(passed: int, trials: int, level: float = 0.95) -> Rate:
    """Return a share that was counted with its interval; see `wilson` for errors."""
    return Rate(passed, trials, *wilson(passed, trials, level))


def wilson(successes: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Return the score interval of a share (Wilson 1927); (0, 1) without trials.

    Raises:
      ValueError: there are more successes than trials, or the level is not between 0 and 1.
    """
    _check(level)
    if not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes of {trials} trials; give from 0 to all of them")
    if not trials:
        return 0.0, 1.0
    interval = _binomtest(successes, trials).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar(a: Results, b: Results) -> float:
    """Return the two-sided p-value of a and b being as good, exactly (McNemar 1947).

    Only cases that one of them passes count: half of these are each one's if nothing differs.

    Raises:
      ValueError: they are not of the same cases.
    """
    _, only_a, only_b, _ = _table(a, b)
    if not only_a + only_b:
        return 1.0
    return float(_binomtest(only_a, only_a + only_b).pvalue)


def paired_difference(a: Results, b: Results, level: float = 0.95) -> Difference:
    """Return how far two shares of the same cases differ, with an interval.

    It is method 10 of Newcombe (1998), "Improved confidence intervals for the difference between
    binomial proportions based on paired data", Statistics in Medicine 17, 2635: both Wilson
    intervals, squared and added, less what the two have in common.

    Raises:
      ValueError: they are not of the same cases, there are none, or the level is not
        between 0 and 1.
    """
    both, only_a, only_b, neither = _table(a, b)
    n = both + only_a + only_b + neither
    if not n:
        raise ValueError("there are no cases to compare")
    first, second = both + only_a, both + only_b
    p, q = first / n, second / n
    (p_low, p_high), (q_low, q_high) = wilson(first, n, level), wilson(second, n, level)
    # correlation, corrected for continuity where it is positive
    excess = both * neither - only_a * only_b
    excess = max(excess - n / 2, 0.0) if excess > 0 else excess
    margins = math.sqrt(first * (n - first)) * math.sqrt(second * (n - second))
    phi = excess / margins if margins else 0.0
    apart = lambda x, y: math.sqrt(max(x * x - 2 * phi * x * y + y * y, 0.0))
    return Difference(
        p - q, p - q - apart(p - p_low, q_high - q), p - q + apart(p_high - p, q - q_low)
    )


def holm(p_values: Sequence[float] | Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """Return p-values adjusted for being several (Holm 1979), in the order given.

    Those that stay below a level hold together at that level.

    Raises:
      ValueError: a value is no probability.
    """
    values = np.asarray(p_values, float)
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"p-values lie between 0 and 1, given {values.tolist()}")
    order = np.argsort(values, kind="stable")
    left = np.arange(len(values), 0, -1)
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(np.maximum.accumulate(values[order] * left), 1.0)
    return adjusted


def _table(a: Results, b: Results) -> tuple[int, int, int, int]:
    """Count cases passed by both, by a alone, by b alone, by neither."""
    a, b = np.asarray(a, bool), np.asarray(b, bool)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"results of shapes {a.shape} and {b.shape} are not of the same cases")
    counts = (a & b).sum(), (a & ~b).sum(), (~a & b).sum(), (~a & ~b).sum()
    return tuple(int(count) for count in counts)


def _check(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"the level is {level}; it lies between 0 and 1, e.g. 0.95")


def _binomtest(successes: int, trials: int) -> Any:
    """The test of a fair coin; scipy takes a second to import, and pages need only `Rate`."""
    from scipy import stats

    return stats.binomtest(successes, trials)
