"""Progress of a conversion on stderr: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from typing import TextIO


class Progress:
    """Counts tensors and bytes of one component after another.

    Args:
      stream: where to write; stderr by default.
      every: seconds between plain lines.
    """

    def __init__(self, stream: TextIO | None = None, every: float = 5.0):
        self._stream = stream or sys.stderr
        self._every = every
        self._bar = None

    def start(self, name: str, nbytes: int) -> None:
        """Begin a component of so many bytes."""
        self._name, self._nbytes = name, nbytes
        self._done = self._bytes = 0
        self._begun = self._shown = time.monotonic()
        if self._stream.isatty():
            self._bar = _bar(self._stream)
            self._task = self._bar.add_task(name, total=nbytes, tensors=0)
            self._bar.start()
        else:
            self._line(f"{name}: {nbytes / 1e9:.2f} GB")

    def tick(self, nbytes: int) -> None:
        """Count one tensor of so many bytes."""
        self._done += 1
        self._bytes += nbytes
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=self._bytes, tensors=self._done)
        elif now - self._shown >= self._every:
            self._shown = now
            rate = self._bytes / max(now - self._begun, 1e-9)
            left = (self._nbytes - self._bytes) / max(rate, 1e-9)
            self._line(
                f"{self._name}: {self._done} tensors, {100 * self._bytes / self._nbytes:.0f} %, "
                f"{rate / 1e6:.0f} MB/s, {left:.0f} s left"
            )

    def stop(self) -> None:
        """End the component, whether it is complete or not."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _line(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


def _bar(stream: TextIO):
    from rich import progress
    from rich.console import Console

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TextColumn("{task.fields[tensors]} tensors"),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
        console=Console(file=stream),
    )
