"""Timing of compiled functions: first call apart, then the median and minimum of fresh calls."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass
class Timing:
    """Seconds of repeated calls.

    Attributes:
      first: the first call, compilation included.
      calls: the calls after it, each until its result is ready.
    """

    first: float
    calls: list[float]

    @property
    def median(self) -> float:
        """Median seconds of a call."""
        return statistics.median(self.calls)

    @property
    def compile(self) -> float:
        """Seconds of the first call beyond the median one: trace, compile, autotune, load."""
        return max(self.first - self.median, 0.0)

    def report(self) -> dict[str, Any]:
        """Return what goes into a result file."""
        return {
            "compile_s": round(self.compile, 3),
            "median_ms": round(1e3 * self.median, 4),
            "min_ms": round(1e3 * min(self.calls), 4),
            "max_ms": round(1e3 * max(self.calls), 4),
            "calls": len(self.calls),
        }


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds until the result of `call` is ready, and the result."""
    import jax

    start = time.perf_counter()
    result = jax.block_until_ready(call())
    return time.perf_counter() - start, result


def measure(
    calls: Mapping[str, Callable[[], Any]], repeat: int
) -> tuple[dict[str, Timing], dict[str, Any]]:
    """Time several calls in turns (A B A B ...), so that a disturbance meets all of them.

    Returns:
      Per name, the timing of one first call and `repeat` further calls, and the last result.
    """
    firsts, results = {}, {}
    for name, call in calls.items():
        firsts[name], results[name] = timed(call)
        timed(call)  # clocks and caches settle
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeat):
        for name, call in calls.items():
            results[name] = None  # its memory is free before the next result needs some
            taken, results[name] = timed(call)
            seconds[name].append(taken)
    return {name: Timing(firsts[name], seconds[name]) for name in calls}, results
