"""One line of progress: where training stands, what it costs, when it ends."""

import dataclasses
import math
import sys
import time
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass
class Window:
    """What happened since the last line, in host seconds.

    Attributes:
      steps: steps done, without first calls of a program.
      data: seconds in which training waited for the next batch.
      save: seconds in which it waited for a checkpoint.
      other: seconds of previews and validation.
      compile: seconds of first calls, which compile and make a step.
      counts: how much went through, by unit: tokens, images, ...
      flops: model FLOPs of these steps.
    """

    steps: int = 0
    data: float = 0.0
    save: float = 0.0
    other: float = 0.0
    compile: float = 0.0
    counts: dict[str, float] = dataclasses.field(default_factory=dict)
    flops: float = 0.0
    began: float = dataclasses.field(default_factory=time.perf_counter)

    def count(self, counts: Mapping[str, Any], flops: float) -> None:
        """Add one step's rows."""
        self.steps += 1
        self.flops += flops
        for unit, number in counts.items():
            self.counts[unit] = self.counts.get(unit, 0) + number

    def close(self, peak: float | None) -> dict[str, float]:
        """Return seconds and rates of this window; no rates where every step compiled.

        Args:
          peak: FLOP/s of all devices together, None where not known.
        """
        wall = time.perf_counter() - self.began
        busy = max(wall - self.save - self.other - self.compile, 1e-9)
        steps = max(self.steps, 1)
        out = {
            **({"seconds_per_step": busy / steps} if self.steps else {}),
            "seconds_data": self.data / steps,
            "seconds_save": self.save / steps,
            "seconds_other": self.other / steps,
            "seconds_compile": self.compile,
            **{f"{unit}_per_second": number / busy for unit, number in self.counts.items()},
        }
        if peak and self.flops:
            out["mfu"] = self.flops / busy / peak
        return out


class Line:
    """Prints progress: in place on a terminal, as plain lines elsewhere.

    Args:
      total: steps of the whole run.
      active: whether this process prints.
      out: text stream, stderr by default.
    """

    def __init__(self, total: int, active: bool = True, out: Any = None):
        self.total, self.active = total, active
        self.out = out or sys.stderr
        self._open = False

    def show(self, step: int, values: Mapping[str, Any]) -> None:
        """Print where step `step` stands."""
        if not self.active:
            return
        text = describe(step, self.total, values)
        if self.out.isatty():
            self.out.write("\r\x1b[K" + text)
            self._open = True
        else:
            self.out.write(text + "\n")
        self.out.flush()

    def say(self, text: str) -> None:
        """Print something else on a line of its own."""
        if self.active:
            self.out.write(("\n" if self._open else "") + text + "\n")
            self.out.flush()
            self._open = False

    def end(self) -> None:
        """Leave the line as it is and begin a new one."""
        if self._open:
            self.say("")


def describe(step: int, total: int, values: Mapping[str, Any]) -> str:
    """Return the line of a step from its metrics and a window's numbers."""
    parts = [f"step {step}/{total}", f"loss {values.get('loss', math.nan):.4g}"]
    parts.append(f"grad {values.get('grad_norm', math.nan):.3g}")
    parts.append(f"lr {values.get('learning_rate', math.nan):.2e}")
    seconds = (
        f"{values['seconds_per_step']:.3g} s/step" if "seconds_per_step" in values else "compiled"
    )
    split = f"{seconds} (data {values['seconds_data']:.2g}"
    split += f", save {values['seconds_save']:.2g}"
    if values["seconds_other"] > 0:
        split += f", other {values['seconds_other']:.2g}"
    parts.append(split + ")")
    rates = {k: v for k, v in values.items() if k.endswith("_per_second")}
    parts += [f"{v:.4g} {k.removesuffix('_per_second')}/s" for k, v in rates.items()]
    if "mfu" in values:
        parts.append(f"MFU {values['mfu']:.1%}")
    if "seconds_left" in values:
        parts.append(f"ETA {clock(values['seconds_left'])}")
    return " | ".join(parts)


def clock(seconds: float) -> str:
    """Return hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
