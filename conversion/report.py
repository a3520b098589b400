"""What a conversion found and did, as text."""

import dataclasses
import resource
import sys
from collections.abc import Sequence
from pathlib import Path

from conversion.check import Check

_SHOWN = 20  # names of each sort


@dataclasses.dataclass
class ComponentReport:
    """One component: its comparison, and how its conversion went.

    Attributes:
      name: component.
      path: where it was found.
      layouts: from and to, e.g. "diffusers -> orbax".
      check: comparison of names and shapes.
      parameters: scalars of the model.
      dtype: types of its tensors.
      nbytes: bytes written; zero for a component that was not.
      seconds: time taken.
    """

    name: str
    path: Path
    layouts: str
    check: Check
    parameters: int
    dtype: str
    nbytes: int = 0
    seconds: float = 0.0

    def problems(self) -> list[str]:
        """Return where it is, and a line for every tensor not as expected, long lists cut."""
        lines = list(self.check.notes)
        lines += _cut([f"missing: {name}" for name in self.check.missing])
        lines += _cut([f"unexpected: {name}" for name in self.check.unexpected])
        lines += _cut([f"wrong: {line}" for line in self.check.wrong])
        lines += _cut([f"ignored as asked: {name}" for name in self.check.allowed])
        return [f"{self.name}: {self.path}", *(f"  {line}" for line in lines)] if lines else []


def table(reports: Sequence[ComponentReport]) -> str:
    """Return the report as lines of aligned columns, problems and memory below."""
    counts = ["matched", "missing", "unexpected", "wrong", "parameters"]
    rows = [["component", "layout", *counts, "dtype", "seconds", "MB/s"]]
    for r in reports:
        done = r.seconds > 0
        rows.append(
            [
                r.name,
                r.layouts,
                str(r.check.matched),
                str(len(r.check.missing)),
                str(len(r.check.unexpected)),
                str(len(r.check.wrong)),
                f"{r.parameters:,}",
                r.dtype,
                f"{r.seconds:.1f}" if done else "-",
                f"{r.nbytes / 1e6 / r.seconds:.0f}" if done else "-",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(n) for cell, n in zip(row, widths)).rstrip() for row in rows]
    for r in reports:
        lines += r.problems()
    lines.append(f"peak host memory {peak_memory() / 2**30:.2f} GiB")
    return "\n".join(lines)


def peak_memory() -> int:
    """Return the largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _cut(lines: list[str]) -> list[str]:
    if len(lines) <= _SHOWN:
        return lines
    return [*lines[:_SHOWN], f"... and {len(lines) - _SHOWN} more"]
