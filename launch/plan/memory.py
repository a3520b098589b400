"""Bytes of one device: exact where shapes and specs say them, by formula where they do not."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from clvr_jax import parallel, tree
from clvr_jax.typing import Params
from launch.plan.activations import Line, peak
from launch.plan.job import Job, typed

EXACT = "exact"


@dataclasses.dataclass(frozen=True)
class Memory:
    """What one device holds.

    Attributes:
      exact: arrays of known shape and place.
      estimated: the rest, by formula; empty if the step was compiled instead.
      compiled: bytes at once of the compiled step, or None.
      limit: bytes that a program may take, None if unknown.
    """

    exact: tuple[Line, ...]
    estimated: tuple[Line, ...]
    compiled: int | None
    limit: int | None

    @property
    def total(self) -> int:
        """Bytes at the worst moment."""
        if self.compiled is not None:
            return self.compiled
        return sum(line.size for line in self.exact) + peak(self.estimated)

    @property
    def fits(self) -> bool | None:
        """Whether the total is within the limit; None if the limit is unknown."""
        return None if self.limit is None else self.total <= self.limit


@dataclasses.dataclass(frozen=True)
class Leaf:
    """Where one array lies.

    Attributes:
      path: of the leaf.
      shape: of the whole array.
      spec: how it is spread.
      shard: shape on one device.
      size: bytes on one device.
      notes: dimensions that fell back to replicated.
    """

    path: str
    shape: tuple[int, ...]
    spec: PartitionSpec
    shard: tuple[int, ...]
    size: int
    notes: tuple[str, ...]


def abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    """Return a mesh without devices.

    Raises:
      ValueError: an axis is unknown.
    """
    unknown = set(sizes) - set(parallel.AXES)
    if unknown:
        raise ValueError(f"unknown mesh axes {sorted(unknown)}; the axes are {parallel.AXES}")
    shape = tuple(sizes.get(axis, 1) for axis in parallel.AXES)
    return AbstractMesh(shape, parallel.AXES, axis_types=(AxisType.Auto,) * len(shape))


def leaves(params: Params, mesh: Any) -> Iterator[Leaf]:
    """Yield every leaf of a tree of parameters as the rules place it.

    Raises:
      ValueError: no rule places a leaf.
    """
    chosen, notes = parallel.specs(params, mesh)
    for path, leaf in tree.flatten(params).items():
        shard = NamedSharding(mesh, chosen[path]).shard_shape(leaf.shape)
        size = math.prod(shard) * jnp.dtype(leaf.dtype).itemsize
        yield Leaf(path, leaf.shape, chosen[path], shard, size, tuple(notes.get(path, ())))


def of(job: Job, compiled: int | None = None) -> Memory:
    """Return what a job takes of one device.

    Args:
      job: see `Job`.
      compiled: bytes at once of the compiled step (`launch.aot.compiled(...).peak`); then
        no formula is needed.
    """
    estimated = () if compiled else tuple(job.work.activations(job, job.ways))
    return Memory(tuple(_exact(job)), estimated, compiled, job.target.memory)


def _exact(job: Job) -> list[Line]:
    mesh = abstract_mesh(job.mesh)
    size = lambda params: sum(leaf.size for leaf in leaves(params, mesh))
    lines = []

    def add(label: str, count: int, how: str = EXACT) -> None:
        if count:
            lines.append(Line(label, count, how))

    add("trained parameters", size(job.trained))
    add("frozen parameters of the model", size(job.fixed))
    add("adapters", size(job.adapters))
    cast = sum(size(typed(part, job.compute)) for part in job.learnt.values())
    if any(x.dtype != job.compute for x in jax.tree.leaves(job.learnt)):
        add(f"compute copy, {jnp.dtype(job.compute).name}", cast)
    add(f"gradients, {jnp.dtype(job.compute).name}", cast)
    if job.accumulation > 1:
        wide = sum(size(typed(part, jnp.float32)) for part in job.learnt.values())
        add("gradients added up, float32", wide)
    add("optimizer state", _optimizer(job, mesh))
    if job.ema is not None:
        add("moving average", sum(size(part) for part in _by_part(job.ema, job).values()))
    for name, params in job.frozen.items():
        add(f"{name}, frozen", size(params))
    if job.batch is not None:
        rows = NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp")))
        shapes = jax.tree.leaves(job.batch)
        add("batch", sum(_bytes(rows.shard_shape(x.shape), x.dtype) for x in shapes))
    return lines


def _by_part(given: Params, job: Job) -> Params:
    """A tree like `learnt`, or like its only part, as `learnt`."""
    return given if given.keys() == job.learnt.keys() else {next(iter(job.learnt)): given}


def _optimizer(job: Job, mesh: Any) -> int:
    """Bytes of the optimiser's state: a leaf lies as the parameter that its path ends with."""
    shards = {}
    for part in job.learnt.values():
        for leaf in leaves(part, mesh):
            shards[leaf.path] = leaf
    total = 0
    for path, x in jax.tree_util.tree_flatten_with_path(job.optimizer)[0]:
        names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
        ends = ("/".join(names[start:]) for start in range(len(names)))
        own = next((shards[end] for end in ends if end in shards), None)
        same = own is not None and own.shape == x.shape
        total += _bytes(own.shard if same else x.shape, x.dtype)
    return total


def _bytes(shape: tuple[int, ...], dtype: Any) -> int:
    return math.prod(shape) * jnp.dtype(dtype).itemsize


def optimizer_like(job: Job, change: Callable[[Any], Any]) -> Any:
    """Return the optimiser's state with every array of numbers changed."""
    wide = lambda x: x.ndim and jnp.issubdtype(x.dtype, jnp.floating)
    return jax.tree.map(lambda x: change(x) if wide(x) else x, job.optimizer)
