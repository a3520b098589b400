"""The plan of a run as text: parameters, sharding, arithmetic, time, memory, advice."""

import dataclasses

from rich.console import Console
from rich.table import Table

from clvr_jax import tree
from launch.bench.flops import Training
from launch.plan import advice, memory
from launch.plan.job import Job
from launch.plan.memory import Memory
from launch.plan.targets import GIB


@dataclasses.dataclass(frozen=True)
class Step:
    """Arithmetic of one optimiser step, all devices and micro-batches together.

    Attributes:
      parts: FLOPs by part of the work.
      seconds: at the utilisation that the target assumes; None where its peak is unknown.
    """

    parts: dict[str, Training]
    seconds: float | None

    @property
    def total(self) -> Training:
        """All parts."""
        return sum(self.parts.values(), Training())


def step(job: Job) -> Step:
    """Return the arithmetic of one optimiser step, and the seconds that follow from it."""
    parts = {name: part * job.accumulation for name, part in job.work.flops(job).items()}
    target = job.target
    if target.peak is None:
        return Step(parts, None)
    rate = target.devices * target.peak * target.mfu
    return Step(parts, sum(part.model for part in parts.values()) / rate)


def show(job: Job, compiled: int | None = None, console: Console | None = None) -> Memory:
    """Print the plan of a job and return its memory.

    Args:
      job: see `Job`.
      compiled: bytes at once of the compiled step, where it could be compiled for the target.
      console: where to print.
    """
    console = console or Console(width=140, highlight=False)
    found = memory.of(job, compiled)
    target = job.target
    mesh = (
        ", ".join(f"{axis}={size}" for axis, size in job.mesh.items() if size > 1) or "one device"
    )
    console.print(
        f"{job.name} on {target.name}: {target.devices} x {target.device}, "
        f"hosts: {target.hosts}, mesh {mesh}"
    )
    console.print(f"{job.work.describe()}, {job.accumulation} micro-batches a step")
    _parameters(job, console)
    console.print(_sharding(job))
    _arithmetic(job, console)
    console.print(_memory(found))
    console.print(verdict(found))
    for line in advice_lines(job, compiled):
        console.print(line)
    return found


def verdict(found: Memory) -> str:
    """Return one line that says whether it fits."""
    total = f"{found.total / GIB:.1f} GiB of every device"
    if found.limit is None:
        return f"{total}; how much it has is not known"
    limit = f"{found.limit / GIB:.1f} GiB that a program may take"
    if not found.fits:
        return f"does not fit: {total}, of {limit}"
    tight = ", tightly" if found.total > 0.9 * found.limit else ""
    return f"fits{tight}: {total}, of {limit}"


def advice_lines(job: Job, compiled: int | None = None) -> list[str]:
    """Return what to change until it fits, a line each; none where it fits."""
    told = advice.advise(job, compiled)
    if not told:
        return []
    lines = ["to make it fit, in this order, each on top of those before it:"]
    for one in told:
        fits = ", which fits" if one.fits else ""
        gain = f"saves {one.gain / GIB:.1f} GiB, then {one.total / GIB:.1f} GiB{fits}"
        lines.append(f"  {one.change}: {gain} (costs: {one.cost})")
    if not told[-1].fits:
        lines.append("  all of this is not enough: shorter rows, smaller pictures, other devices")
    return lines


def _parameters(job: Job, console: Console) -> None:
    counts = {
        "trained": tree.count(job.trained),
        "frozen of the model": tree.count(job.fixed),
        "of adapters": tree.count(job.adapters),
        **{f"of {name}, frozen": tree.count(params) for name, params in job.frozen.items()},
    }
    said = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)
    console.print(f"parameters: {said}")


def _sharding(job: Job) -> Table:
    table = Table(title="sharding", title_justify="left")
    for name in ("leaf", "shape", "spec", "on one device"):
        table.add_column(name, overflow="fold")
    table.add_column("MiB", justify="right")
    mesh = memory.abstract_mesh(job.mesh)
    parts = {"": {**job.trained}, "(frozen) ": job.fixed, "(lora) ": job.adapters}
    for label, params in parts.items():
        for leaf in memory.leaves(params, mesh):
            spec = ", ".join(_axes(axis) for axis in leaf.spec) or "whole"
            notes = "".join(f"\n{note}" for note in leaf.notes)
            table.add_row(
                f"{label}{leaf.path}{notes}",
                _shape(leaf.shape),
                spec,
                _shape(leaf.shard),
                f"{leaf.size / 2**20:,.1f}",
            )
    return table


def _arithmetic(job: Job, console: Console) -> None:
    done = step(job)
    parts = ", ".join(f"{name} {_tera(part.model)}" for name, part in done.parts.items())
    console.print(f"model TFLOP a step: {_tera(done.total.model)} ({parts})")
    if done.total.again:
        console.print(
            f"computed again, which model FLOP utilisation does not count: up to "
            f"{_tera(done.total.again)} TFLOP, {done.total.again / done.total.model:.0%} more"
        )
    if done.seconds is None:
        console.print(f"seconds a step: not known, {job.target.device} has no peak in our table")
        return
    console.print(
        f"seconds a step: {done.seconds:.3g}, computed, not measured: at {job.target.mfu:.0%} of "
        f"{job.target.peak / 1e12:,.0f} TFLOP/s on each of {job.target.devices} devices"
    )


def _memory(found: Memory) -> Table:
    table = Table(title="memory of one device", title_justify="left")
    table.add_column("what")
    table.add_column("GiB", justify="right")
    table.add_column("how", overflow="fold")
    for line in found.exact:
        table.add_row(line.label, f"{line.size / GIB:.2f}", line.how)
    if found.compiled is not None:
        table.add_section()
        table.add_row("whole step", f"{found.compiled / GIB:.2f}", "compiled for the target")
        return table
    table.add_section()
    for line in sorted(found.estimated, key=lambda line: not line.kept):
        size = f"{line.size / GIB:.2f}"
        note = "" if line.kept else "; the largest such part counts"
        note = "" if line.label == "weights gathered" else note
        table.add_row(line.label, size, f"formula: {line.how}{note}")
    table.add_section()
    table.add_row("at the worst moment", f"{found.total / GIB:.2f}", "exact + formula")
    return table


def _axes(axis) -> str:
    names = axis if isinstance(axis, tuple) else (axis,)
    return "*".join(name or "-" for name in names)


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def _tera(flop: int) -> str:
    return f"{flop / 1e12:,.0f}" if flop >= 100e12 else f"{flop / 1e12:.3g}"
