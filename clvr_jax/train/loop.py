"""The training loop: next batch, step, report of the step before, save."""

import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from clvr_jax.checkpoint import CheckpointError, Checkpoints
from clvr_jax.train.metrics import Averages, Writers
from clvr_jax.train.progress import Line, Window
from clvr_jax.train.state import TrainState
from clvr_jax.train.step import not_finite
from clvr_jax.typing import Params, PRNGKey


class Batch(NamedTuple):
    """What one step reads.

    Attributes:
      static: what the program is specialised to.
      arrays: leaves (accumulation, rows, ...), on the devices.
      counts: real rows, by unit ("images", "tokens"), for the rates.
      flops: model FLOPs of the step.
    """

    static: Hashable
    arrays: Mapping[str, Any]
    counts: Mapping[str, float]
    flops: float = 0.0


class Hook(NamedTuple):
    """Something that is done now and then: previews, validation.

    Attributes:
      every: steps from one call to the next; 0 for never.
      call: given (state, steps done), returns numbers to write, may be empty.
      first: whether it is also called before the first step.
    """

    every: int
    call: Callable[[TrainState, int], Mapping[str, float]]
    first: bool = False


@dataclasses.dataclass(frozen=True)
class When:
    """When the loop does what, in steps.

    Attributes:
      steps: length of the whole run.
      log: from one line to the next.
      save: from one checkpoint to the next; 0 for the last only.
    """

    steps: int
    log: int = 10
    save: int = 500

    def __post_init__(self):
        if self.log < 1 or self.save < 0:
            raise ValueError(f"{self}: log must be 1 or more, save 0 or more")


class NotFinite(ValueError):
    """A loss or gradient was not finite; the text names step and parameters."""


class Interrupted(Exception):
    """The process was told to end, and the state is saved."""


def train(
    state: TrainState,
    step: Callable[..., Any],
    frozen: Params,
    batches: Iterator[Batch],
    key: PRNGKey,
    when: When,
    *,
    checkpoints: Checkpoints,
    meta: Mapping[str, Any],
    writers: Writers,
    line: Line,
    hooks: tuple[Hook, ...] = (),
    peak: float | None = None,
    averages: Mapping[str, Any] | None = None,
) -> TrainState:
    """Train from `state` to `when.steps`, and save at the end.

    The host runs one step ahead of what it reads back, so that devices never wait for it.

    Args:
      state: where to begin; its arrays are donated.
      step: compiled `train_step` (see `train.step`).
      frozen: its second argument.
      batches: of every step from the state's on.
      key: the run's; every step folds its number in.
      when: intervals.
      checkpoints: where the state goes.
      meta: what is saved beside it.
      writers: where numbers go.
      line: where progress goes.
      hooks: previews, validation.
      peak: FLOP/s of all devices, for the model FLOP utilisation.
      averages: `meta["averages"]` of the checkpoint that is gone on from: steps without a line yet.

    A batch that cannot be made, or a hook that fails, ends the run; with one process the state is
    saved first.

    Raises:
      NotFinite: a loss or gradient is not finite. The update was not applied; the state is saved.
      Interrupted: SIGTERM came; the state is saved.
      CheckpointError: the last save failed.
    """
    run = _Run(checkpoints, meta, writers, line, peak, when, averages)
    done = int(state.step)
    if done == 0:
        for hook in hooks:
            if hook.first and hook.every:
                run.call(hook, state, done)
    run.began = time.perf_counter()  # what comes before the first step does not come again
    run.saved = done
    with _sigterm() as ended:
        while done < when.steps:
            try:
                batch = run.next(batches)
            except Exception:
                run.rescue(state, done)
                raise
            state, out, timed = run.step(step, state, frozen, batch, key)
            done += 1
            run.report(state)
            run.pending = (done, batch, out, timed)
            for hook in hooks:
                if hook.every and (done % hook.every == 0 or done == when.steps):
                    run.report(state)
                    run.call(hook, state, done)
            if _must_end(ended, done):
                run.save(state, done, final=True)
                raise Interrupted(f"told to end at step {done}; the state is saved")
            if (when.save and done % when.save == 0) or done == when.steps:
                run.save(state, done, final=done == when.steps)
    checkpoints.wait()
    return state


class _Run:
    """What the loop keeps between steps."""

    def __init__(self, checkpoints, meta, writers, line, peak, when, averages):
        self.checkpoints, self.meta, self.writers = checkpoints, meta, writers
        self.line, self.peak, self.when = line, peak, when
        self.pending: Any = None  # the step that is not reported yet
        self.averages, self.window = Averages(averages), Window()
        self.began, self.compiled, self.steps = time.perf_counter(), 0.0, 0
        self.seen: set[Hashable] = set()
        self.recent: dict[str, float] = {}  # of the last line
        self.measured: tuple[int, dict[str, float]] = (0, {})  # by hooks, and at which step
        self.saved = 0  # the newest step whose state is saved, or was given

    def next(self, batches: Iterator[Batch]) -> Batch:
        began = time.perf_counter()
        batch = next(batches)
        self.window.data += time.perf_counter() - began
        return batch

    def step(self, step, state, frozen, batch: Batch, key):
        """Return the new state, its numbers, and whether the call's time is a step's alone."""
        began, timed = time.perf_counter(), batch.static in self.seen
        state, out = step(state, frozen, batch.arrays, key, batch.static)
        if not timed:
            self.seen.add(batch.static)
            jax.block_until_ready(out)
            spent = time.perf_counter() - began
            self.window.compile += spent
            self.compiled += spent
            self.line.say(f"compiled and ran {batch.static} in {spent:.1f} s")
        return state, out, timed

    def report(self, state) -> None:
        """Wait for the numbers of the step that waits; write a line where one is due."""
        if self.pending is None:
            return
        (done, batch, out, timed), self.pending = self.pending, None
        if not bool(out["finite"]):
            self._stop(done, out, state)
        self.averages.add(jax.device_get(out["metrics"]))
        if timed:
            self.window.count(batch.counts, batch.flops)
            self.steps += 1
        if done % self.when.log == 0 or done == self.when.steps:
            values = {**self.averages.take(), **self.window.close(self.peak)}
            if self.steps:
                each = (time.perf_counter() - self.began - self.compiled) / self.steps
                values["seconds_left"] = each * (self.when.steps - done)
            self.window = Window()
            self.recent = values
            self.line.show(done, values)
            self.write(done, values)

    def write(self, done: int, values: Mapping[str, float]) -> None:
        """Write numbers; a full disk is told and does not end the run."""
        try:
            self.writers.scalars(done, values)
        except OSError as error:
            self.line.say(f"step {done}: its numbers are NOT WRITTEN: {error}")

    def call(self, hook: Hook, state, done: int) -> None:
        began = time.perf_counter()
        try:
            values = dict(hook.call(state, done))
        except Exception:
            self.rescue(state, done)
            raise
        self.window.other += time.perf_counter() - began
        if values:
            before = self.measured[1] if self.measured[0] == done else {}
            self.measured = done, {**before, **values}
            self.write(done, values)
            shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            self.line.say(f"step {done}: {shown}")

    def save(self, state: TrainState, done: int, final: bool = False) -> None:
        """Begin a save; a failed one is told, and ends the run only if it is the last."""
        self.report(state)
        began = time.perf_counter()
        try:
            self.checkpoints.wait()
        except CheckpointError as error:  # the one before; this one is tried all the same
            self.line.say(f"NOT SAVED: {error}; training goes on")
        # a number that a hook measured at another step does not make this one the best
        metrics = {**self.recent, **(self.measured[1] if self.measured[0] == done else {})}
        try:
            self.checkpoints.save(done, saved(state), self._meta(done), metrics)
            if final:
                self.checkpoints.wait()
            self.saved = done
        except CheckpointError as error:
            if final:
                raise
            self.line.say(f"NOT SAVED at step {done}: {error}; training goes on")
        self.window.save += time.perf_counter() - began

    def rescue(self, state: TrainState, done: int) -> None:
        """Save before the run ends with an error; several processes may not all have met it."""
        if jax.process_count() == 1 and self.saved != done:
            self.save(state, done, final=True)
            self.line.say(f"the state is saved at step {done}")

    def _meta(self, step: int) -> dict[str, Any]:
        return {**self.meta, "step": step, "averages": self.averages.sums()}

    def _stop(self, done: int, out, state) -> None:
        bad = not_finite(jax.device_get(out["norms"]))
        total, weight = jax.device_get(out["metrics"]["loss"])
        parts = f"gradients of {', '.join(bad)}" if bad else "the loss alone"
        loss = total / weight if weight else total
        text = f"step {done}: loss {loss}, not finite: {parts}. The update was not applied"
        at = int(state.step)
        try:
            self.checkpoints.save(at, saved(state), self._meta(at))
            self.checkpoints.wait()
            text += f", and the state is saved as step {at}"
        except CheckpointError as error:
            text += f"; saving the state failed as well: {error}"
        raise NotFinite(text + ". Look at that step's data; a lower learning rate may help")


def saved(state: TrainState) -> dict[str, Any]:
    """Return the state as the dict that checkpoints hold."""
    out = {"step": state.step, "params": state.params, "opt_state": state.opt_state}
    return out if state.ema is None else {**out, "ema": state.ema}


def loaded(values: Mapping[str, Any]) -> TrainState:
    """Return the state of a checkpoint's dict; the inverse of `saved`."""
    return TrainState(**values)


class _sigterm:
    """An event that SIGTERM sets while the loop runs, in the main thread of a single process."""

    def __enter__(self) -> threading.Event:
        self.event, self.before = threading.Event(), None
        # in a cluster JAX's coordination service listens for it, and all processes stop together
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGTERM, lambda *_: self.event.set())
        return self.event

    def __exit__(self, *_) -> None:
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)


def _must_end(ended: threading.Event, done: int) -> bool:
    if jax.process_count() == 1:
        return ended.is_set()
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(done)
