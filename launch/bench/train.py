"""The training benchmark: the compiled step of a run, alone and inside the loop that trains."""

import contextlib
import dataclasses
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from clvr_jax import tree
from clvr_jax.checkpoint import Checkpoints
from clvr_jax.data.loader import load
from clvr_jax.train import loop
from clvr_jax.train.metrics import Writers
from clvr_jax.train.progress import Line
from clvr_jax.typing import Params
from launch import build
from launch.bench import machine, train_jobs
from launch.bench.flops import Training
from launch.bench.timing import Timing, measure
from launch.bench.train_jobs import Case, Work
from launch.plan import memory
from launch.training import run as running

SEED = 0
_ROUNDS = 3  # of steps alone and in the loop, in turns
# relative difference of the first losses beyond which the peer does something else
_SAME = {"float32": 1e-4, "mixed": 2e-2, "bfloat16": 3e-2}


class Ours:
    """Our side: the state on the devices and the compiled step.

    Args:
      work: what is trained.
      params: parameters of the trained model; they are taken over.

    Attributes:
      trace_s, compile_s: seconds of making the program.
    """

    def __init__(self, work: Work, params: Params):
        job = work.job
        self.work, self.key = work, jax.random.key(SEED)
        self.state, fixed = job.begin(params, SEED)
        self.frozen = {"model": fixed, "others": train_jobs.others(job)}
        self.batch = running.place(job.mesh, work.arrays, work.step)
        began = time.perf_counter()
        lowered = job.step().lower(self.state, self.frozen, self.batch, self.key, work.step.static)
        self.trace_s = time.perf_counter() - began
        began = time.perf_counter()
        self.program = lowered.compile()
        self.compile_s = time.perf_counter() - began

    def step(self, state, frozen, batch, key, static) -> tuple[Any, dict[str, Any]]:
        """Run the program as the loop calls it; `static` is what it was compiled for."""
        return self.program(state, frozen, batch, key)

    def __call__(self) -> dict[str, Any]:
        """Make one step; return its metrics, still on the device."""
        self.state, out = self.program(self.state, self.frozen, self.batch, self.key)
        return out

    def loss(self) -> dict[str, float]:
        """Make one step; return its loss and gradient norm.

        Raises:
          RuntimeError: they are not finite.
        """
        out = jax.device_get(self())
        if not out["finite"]:
            raise RuntimeError("the first step is not finite; the timing would mean nothing")
        total, weight = out["metrics"]["loss"]
        return {"loss": float(total / weight), "grad_norm": float(out["metrics"]["grad_norm"][0])}

    def alone(self, steps: int) -> float:
        """Make steps one behind the other; return the seconds of each."""
        jax.block_until_ready(self.state)
        began = time.perf_counter()
        for _ in range(steps):
            out = self()
        jax.block_until_ready((self.state, out))
        return (time.perf_counter() - began) / steps

    def in_loop(self, steps: int, step: Callable[..., Any] | None = None) -> float:
        """Make steps through the loop, loader and metrics of a run; return the seconds of each."""
        job, data, done = self.work.job, self.work.data(steps), int(self.state.step)
        with tempfile.TemporaryDirectory() as folder, load(data.steps, data.make) as loader:
            writers = Writers(Path(folder), done)
            with contextlib.closing(writers):
                began = time.perf_counter()
                self.state = loop.train(
                    self.state,
                    step or self.step,
                    self.frozen,
                    running.batches(job, data, loader),
                    self.key,
                    loop.When(done + steps, save=0),
                    checkpoints=_Unsaved(),
                    meta={},
                    writers=writers,
                    line=Line(done + steps, out=io.StringIO()),
                )
                jax.block_until_ready(self.state)
                return (time.perf_counter() - began) / steps


class Clocked:
    """A call that also counts the processor's seconds of this process.

    Where other processes share the cores these, not the wall's, are what the work takes.
    """

    def __init__(self, call: Callable[[], Any]):
        self.call, self.seconds = call, []

    def __call__(self) -> Any:
        """Call, wait for the result and return it."""
        began = time.process_time()
        out = jax.block_until_ready(self.call())
        self.seconds.append(time.process_time() - began)
        return out

    def report(self) -> dict[str, float]:
        """Return the median and least seconds of the calls since the second; empty on a device."""
        if jax.default_backend() != "cpu":
            return {}
        calls = self.seconds[2:]
        return {
            "cpu_median_s": round(statistics.median(calls), 5),
            "cpu_min_s": round(min(calls), 5),
        }


class _Unsaved(Checkpoints):
    """Checkpoints of a run that is not to be kept."""

    def __init__(self):
        pass

    def save(self, *_, **__) -> None:
        """Do nothing."""

    def wait(self) -> None:
        """Do nothing."""


def run(
    case: Case, repeat: int, loop_steps: int, peer: bool = False, apart: bool = False
) -> dict[str, Any]:
    """Measure a case; return the report of the result file.

    Args:
      case: what to measure.
      repeat: timed steps.
      loop_steps: steps of each round alone and in the loop; 0 leaves the comparison out.
      peer: measure diffusers or transformers beside us.
      apart: one side after the other, so that each has the device's memory to itself.

    Raises:
      RuntimeError: a step is not finite, or the peer's loss is another one.
      ValueError: the case does not fit the model, or the peer cannot run it.
    """
    work = train_jobs.make(case, 10**6)
    if peer:
        from launch.bench import train_peer

        train_peer.check(case, work)
    limit = _limits(work)
    timings: dict[str, Timing] = {}
    first: dict[str, dict[str, float]] = {}
    who = train_peer.name(case) if peer else ""
    with build.use_mesh(work.job.mesh):
        params = train_jobs.weights(work.job)
        rival = train_peer.Peer(case, work, params, SEED) if peer and not apart else None
        ours = Ours(work, params)
        del params
        first["ours"] = ours.loss()
        calls = {"ours": Clocked(ours)}
        if rival is not None:
            first[who] = rival.loss()
            require_same(case, first["ours"], first[who])
            calls[who] = Clocked(rival)
        timings, _ = measure(calls, repeat)
        clocks = {name: call.report() for name, call in calls.items()}
        outside = _outside(ours, loop_steps) if loop_steps else {}
        used = {**machine.memory(), **_program_memory(ours.program)}
        built = {"trace_s": round(ours.trace_s, 3), "compile_s": round(ours.compile_s, 3)}
        if peer and apart:
            del ours, calls  # its memory is free now
            rival = train_peer.Peer(case, work, train_jobs.weights(work.job), SEED)
            first[who] = rival.loss()
            require_same(case, first["ours"], first[who])
            calls = {who: Clocked(rival)}
            timings |= measure(calls, repeat)[0]
            clocks[who] = calls[who].report()
    described = {
        name: {**describe(timing, work.flops, work.units, limit), **clocks[name]}
        for name, timing in timings.items()
    }
    report = {
        "case": dataclasses.asdict(case),
        "limits": limit,
        "parameters": tree.count(work.job.typed()),
        "trained": tree.count(work.job.trained()),
        "flop": {"model": work.flops.model, "hardware": work.flops.hardware},
        "step": {**built, **described["ours"]},
        "first_step": first,
        "outside": outside,
        "memory": used,
    }
    if rival is not None:
        sides = described[who]
        sides["ratio"] = round(timings[who].median / timings["ours"].median, 3)
        if clocks[who]:
            sides["cpu_ratio"] = round(
                clocks[who]["cpu_median_s"] / clocks["ours"]["cpu_median_s"], 3
            )
        turns = "one after the other" if apart else "in turns"
        report["peers"] = {who: {**sides, **rival.report(), "measured": turns}}
    return report


def trace(case: Case, target: str) -> dict[str, Any]:
    """Trace the step of a case for a machine that need not be there; return what it would be.

    Raises:
      ValueError: the case does not fit the model, or a value is unknown.
    """
    work = train_jobs.make(case, 10**6, target)
    job = work.job
    frozen = {"model": job.frozen_model(), "others": {**job.others(), **job.stage.constants}}
    key = jax.eval_shape(lambda: jax.random.key(SEED))
    began = time.perf_counter()
    lowered = job.step().lower(job.abstract(), frozen, work.arrays, key, work.step.static)
    seconds = time.perf_counter() - began
    planned = memory.of(work.plan)
    return {
        "case": dataclasses.asdict(case),
        "target": target,
        "parameters": tree.count(job.typed()),
        "trained": tree.count(job.trained()),
        "trace_s": round(seconds, 1),
        "program_mb": round(len(lowered.as_text()) / 1e6, 2),
        "flop": {"model": work.flops.model, "hardware": work.flops.hardware},
        "planned_gb": round(planned.total / 1e9, 1),
        "room_gb": None if planned.limit is None else round(planned.limit / 1e9, 1),
    }


def describe(
    timing: Timing, cost: Training, units: Mapping[str, float], limit: Mapping[str, Any]
) -> dict[str, Any]:
    """Return seconds and rates of a step; the rates are those of the median."""
    rate = cost.model / timing.median / 1e12
    return {
        "median_s": round(timing.median, 5),
        "min_s": round(min(timing.calls), 5),
        "max_s": round(max(timing.calls), 5),
        "calls": len(timing.calls),
        **{f"{unit}_per_s": round(count / timing.median, 4) for unit, count in units.items()},
        "model_tflops": round(rate, 4),
        "mfu": round(rate / limit["limit_tflops"], 4),
    }


def require_same(case: Case, ours: Mapping[str, float], theirs: Mapping[str, float]) -> None:
    """Check that both sides do the same work.

    Raises:
      RuntimeError: their first losses, or without adapters gradient norms, differ.
    """
    # a pair of new adapters has other gradients: ours share their first half among q, k and v
    names = ("loss",) if case.lora else ("loss", "grad_norm")
    for name in names:
        apart = abs(theirs[name] / ours[name] - 1)
        if apart > _SAME[case.precision] * (1 if name == "loss" else 10):
            raise RuntimeError(
                f"{name} of the first step is {ours[name]:.7g} here and {theirs[name]:.7g} of the "
                f"peer, {apart:.1e} apart; it does not do the same work"
            )


def _outside(ours: Ours, steps: int) -> dict[str, Any]:
    """What the loop adds to the compiled step.

    `share` compares the best rounds, and is as uncertain as they are far apart. `host_s` is what
    the loop does besides, with a step that takes no time: the most that could ever be seen of it.
    """
    out = ours()
    nothing = lambda state, *_: (state, out)
    host = min(ours.in_loop(30, nothing) for _ in range(_ROUNDS))
    rounds = [(ours.alone(steps), ours.in_loop(steps)) for _ in range(_ROUNDS)]
    alone, looped = (min(seconds) for seconds in zip(*rounds))
    return {
        "steps": steps,
        "alone_s": round(alone, 5),
        "loop_s": round(looped, 5),
        "share": round(1 - alone / looped, 4),
        "host_s": round(host, 6),
        "host_share": round(host / alone, 4),
        "rounds": [[round(x, 5) for x in pair] for pair in rounds],
    }


def _limits(work: Work) -> dict[str, Any]:
    limit = machine.limits(work.job.settings.compute_dtype)
    if limit["peak_tflops"]:  # what is measured on a CPU is all of it already
        limit["limit_tflops"] *= jax.device_count()
    return limit


def _program_memory(program: Any) -> dict[str, float]:
    """GB of one device that the compiled step takes, by XLA's account: at once, and of that."""
    sizes = program.memory_analysis()
    arguments, temporary = sizes.argument_size_in_bytes, sizes.temp_size_in_bytes
    new = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    found = {"peak": arguments + new + temporary, "arguments": arguments, "temporary": temporary}
    return {f"xla_{name}_gb": round(size / 1e9, 3) for name, size in found.items()}
