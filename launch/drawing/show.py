"""What happens, told in the terminal: one task as it thinks, several a line an event."""

import re
import sys
import threading

from clvr_jax.closed_loop.events import Acted, Drew, Ended, Event, Retried, Said
from clvr_jax.data.turns import MARKER
from clvr_jax.report.trajectory import ENDS

_PART = re.compile(r"(<[^>]*|\s*)$")  # of a marker, or spaces before an action
_DOES = {"generate": "draws", "edit": "edits"}


class Show:
    """Prints events to a stream; thread-safe.

    Args:
      total: how many tasks there are.
      stream: where to.
    """

    def __init__(self, total: int, stream=sys.stderr):
        self._total, self._stream, self._done = total, stream, 0
        self._lock = threading.Lock()
        self._held, self._quiet, self._begun = "", False, False

    def __call__(self, event: Event) -> None:
        """Tell of an event."""
        with self._lock:
            if self._total > 1:
                self._line(event)
            else:
                self._stream_one(event)
            self._stream.flush()

    def _line(self, event: Event) -> None:
        if isinstance(event, Retried):
            self._print(f"{event.task}: step {event.step} again: {event.why}")
        if isinstance(event, Ended):
            self._done += 1
            self._print(f"{self._done}/{self._total} {event.task}: {summary(event)}")

    def _stream_one(self, event: Event) -> None:
        if isinstance(event, Said):
            self._held += event.text
            if not self._quiet and "{" in self._held:  # the action is told when it is over
                self._held, self._quiet = self._held.partition("{")[0].rstrip(), True
                self._write(self._held)
                self._held = ""
            elif not self._quiet:
                whole = _PART.sub("", self._held)
                self._write(whole)
                self._held = self._held[len(whole) :]
            else:
                self._held = ""
        elif isinstance(event, Acted):
            self._print("" if self._begun else _named(event.reasoning))
            self._held, self._quiet, self._begun = "", False, False
            if event.action is not None:
                numbers = ", ".join(map(str, event.action.references))
                of = f" (picture {numbers})" if numbers else ""
                self._print(f"  {_DOES[event.action.kind]}{of}: {_named(event.action.prompt)}")
        elif isinstance(event, Drew):
            self._print(
                f"  picture {event.step}: {event.seconds:.1f} s, {event.evaluations} evaluations\n"
            )
        elif isinstance(event, Retried):
            self._print(f"\n  again: {event.why}")
            self._held, self._quiet, self._begun = "", False, False
        elif isinstance(event, Ended):
            self._print(summary(event))

    def _write(self, text: str) -> None:
        if text:
            self._begun = True
            self._stream.write(_named(text))

    def _print(self, text: str) -> None:
        self._stream.write(text + "\n")


def summary(event: Ended) -> str:
    """Return how a task ended and what it took, in a line."""
    result = event.result
    outcome = result.trajectory.outcome if result.trajectory else "failed"
    why = f"it failed: {result.error}" if result.error else ENDS[outcome]
    return (
        f"{why}; {len(result.pictures)} pictures, {result.evaluations} evaluations, "
        f"{result.tokens} tokens, {result.seconds:.1f} s"
    )


def _named(text: str) -> str:
    return MARKER.sub(lambda match: f"picture {match[1]}", text)
