"""What to change when a run does not fit, the cheapest first, each with what it gains."""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from clvr_jax import lora, tree
from launch.plan import memory
from launch.plan.job import Job, typed
from launch.plan.targets import Target

RANK = 64  # of the adapters that are suggested
_MOST_DEVICES = 256


@dataclasses.dataclass(frozen=True)
class Advice:
    """One change, on top of those before it.

    Attributes:
      change: what to set.
      cost: what it costs.
      gain: bytes of one device that it saves.
      total: bytes of one device after it.
      fits: whether that is within the limit.
    """

    change: str
    cost: str
    gain: int
    total: int
    fits: bool


def advise(job: Job, compiled: int | None = None) -> list[Advice]:
    """Return changes in order until the run fits; empty if it does, or the limit is unknown.

    Args:
      job: what was planned.
      compiled: bytes at once of the compiled step; what it is off the formulas now, it stays.

    A change that gains nothing here is left out. If all of them are not enough, a last one says on
    how many devices the run as it was given would fit, if on any number up to 256.
    """
    limit = job.target.memory
    total = memory.of(job).total
    off = 0 if compiled is None else compiled - total
    total += off
    if limit is None or total <= limit:
        return []
    given: Job = job
    found: list[Advice] = []
    for change, cost, make in _changes():
        changed = make(job)
        after = memory.of(changed).total + off if changed is not None else total
        if after >= total:
            continue
        found.append(Advice(change(job), cost, total - after, after, after <= limit))
        job, total = changed, after
        if after <= limit:
            return found
    return [*found, *_more_devices(given, off)]


def _changes() -> Iterator[tuple[Callable[[Job], str], str, Callable[[Job], Job | None]]]:
    say = lambda text: lambda job: text
    yield say("remat=full"), "up to a third more arithmetic", _remat
    yield (
        lambda job: f"batch.rows and accumulation: one row per device, {_split(job)} times",
        "more, smaller micro-batches; the same step",
        _rows,
    )
    yield say("chunk=256"), "smaller products of the vocabulary", _chunk
    yield (
        lambda job: f"mesh.fsdp={job.mesh['data'] * job.mesh.get('fsdp', 1)}, mesh.data=1",
        "weights are gathered over more devices",
        _fsdp,
    )
    yield (
        say("data.features: precompute text features and latents, the encoders leave the device"),
        "disk space, told before it is taken",
        _precomputed,
    )
    for ways in (2, 4, 8):
        yield (
            say(f"mesh.context={ways}: devices share the tokens of a row"),
            "keys and values are exchanged; fewer rows at a time, more accumulation",
            lambda job, ways=ways: _context(job, ways),
        )
    yield say("ema=0: no moving average"), "last weights instead of averaged ones", _no_average
    yield (
        say("optim.moments=bfloat16"),
        "rounded stochastically; close to float32 in practice, not equal",
        _moments,
    )
    yield (
        say("precision=bfloat16: no float32 masters, stochastic rounding"),
        "updates are right on average only",
        _pure,
    )
    yield say('train="^language/": the vision tower is frozen'), "it no longer learns", _vision
    yield (
        say(f"lora.rank={RANK}: adapters instead of full fine-tuning"),
        "another method: the update has low rank",
        _adapters,
    )


def _remat(job: Job) -> Job:
    return _work(job, remat="full")


def _split(job: Job) -> int:
    return job.work.rows // job.ways.rows


def _rows(job: Job) -> Job | None:
    count = _split(job)
    if count == 1:
        return None
    job = _work(job, rows=job.ways.rows)
    return dataclasses.replace(job, accumulation=job.accumulation * count, batch=None)


def _chunk(job: Job) -> Job | None:
    return _work(job, chunk=256) if getattr(job.work, "chunk", 0) > 256 else None


def _fsdp(job: Job) -> Job | None:
    if job.mesh.get("data", 1) == 1:
        return None
    fsdp = job.mesh.get("fsdp", 1) * job.mesh["data"]
    return dataclasses.replace(job, mesh={**job.mesh, "data": 1, "fsdp": fsdp})


def _precomputed(job: Job) -> Job | None:
    if getattr(job.work, "precomputed", True):
        return None
    return dataclasses.replace(_work(job, precomputed=True), frozen={}, batch=None)


def _context(job: Job, ways: int) -> Job | None:
    fsdp = job.mesh.get("fsdp", 1)
    if job.mesh.get("context", 1) >= ways or fsdp % ways:
        return None
    scale = ways // job.mesh.get("context", 1)
    rows = max(job.work.rows // scale, 1)
    mesh = {**job.mesh, "fsdp": fsdp // scale, "context": ways}
    try:
        changed = dataclasses.replace(
            job,
            mesh=mesh,
            work=dataclasses.replace(job.work, rows=rows),
            accumulation=job.accumulation * scale,
            batch=None,
        )
    except ValueError:  # the rows do not spread
        return None
    return changed


def _no_average(job: Job) -> Job:
    return dataclasses.replace(job, ema=None)


def _moments(job: Job) -> Job:
    narrow = lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16)
    return dataclasses.replace(job, optimizer=memory.optimizer_like(job, narrow))


def _pure(job: Job) -> Job | None:
    if not job.trained or job.compute != jnp.bfloat16:
        return None
    return dataclasses.replace(job, trained=typed(job.trained, jnp.bfloat16))


def _vision(job: Job) -> Job | None:
    if "visual" not in job.trained or "language" not in job.trained:
        return None
    trained, fixed = (dict(part) for part in (job.trained, job.fixed))
    moved = tree.flatten(typed({"visual": trained.pop("visual")}, job.compute))
    fixed = tree.unflatten({**tree.flatten(fixed), **moved})
    return _without_state(dataclasses.replace(job, trained=trained, fixed=fixed))


def _adapters(job: Job) -> Job | None:
    if not job.trained:
        return None
    flat = {**tree.flatten(job.fixed), **tree.flatten(typed(job.trained, job.compute))}
    whole = tree.unflatten(flat)
    pattern = r"(^|/)(single_blocks|double_blocks|language/layers)/.*kernel$"
    make = lambda key: lora.init(key, whole, pattern, RANK, job.work.stacked)
    adapters = jax.eval_shape(make, jax.random.key(0))
    changed = dataclasses.replace(job, trained={}, fixed=whole, adapters=adapters)
    two = {"m": adapters, "v": adapters}
    return dataclasses.replace(changed, optimizer=two, ema=adapters if job.ema else None)


def _without_state(job: Job) -> Job:
    """The job with the optimiser's state and averages of what is still trained only."""
    known = {path for part in job.learnt.values() for path in tree.flatten(part)}

    def kept(path, x):
        names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
        return any("/".join(names[start:]) in known for start in range(len(names))) or not x.ndim

    prune = lambda given: jax.tree_util.tree_map_with_path(
        lambda path, x: x if kept(path, x) else None, given
    )
    ema = job.ema and tree.unflatten(
        {path: x for path, x in tree.flatten(job.ema).items() if "visual/" not in path}
    )
    return dataclasses.replace(job, optimizer=prune(job.optimizer), ema=ema)


def _work(job: Job, **changes) -> Job:
    return dataclasses.replace(job, work=dataclasses.replace(job.work, **changes))


def _more_devices(job: Job, off: int) -> list[Advice]:
    """The smallest number of such devices, doubled, on which the run fits as it was given."""
    before, count = memory.of(job).total + off, job.target.devices
    while count < _MOST_DEVICES:
        count *= 2
        scale = count // job.target.devices
        target = Target(f"{count} x {job.target.device}", job.target.device, count, 0, None)
        mesh = {**job.mesh, "fsdp": job.mesh.get("fsdp", 1) * scale}
        work = dataclasses.replace(job.work, rows=job.work.rows * scale)
        larger = dataclasses.replace(job, target=target, mesh=mesh, work=work, batch=None)
        after = memory.of(larger).total + off
        if after <= job.target.memory:
            change = f"{count} devices with mesh.fsdp={mesh['fsdp']}, as it was given"
            return [Advice(change, "more machines", before - after, after, True)]
    return []
