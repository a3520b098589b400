"""What is planned: the arrays of a step as shapes, the machine, and the work of a micro-batch."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from clvr_jax import tree
from clvr_jax.typing import Params
from launch.bench.flops import Training
from launch.plan.activations import Line, Ways
from launch.plan.targets import Target


class Work(Protocol):
    """One micro-batch of a stage: `launch.plan.image.Image` or `launch.plan.vlm.Text`.

    Attributes:
      rows: of a micro-batch, all devices together.
      remat: policy of the trained model's layers.
      stacked: roots of its stacked layers.
    """

    rows: int
    remat: str
    stacked: tuple[str, ...]

    def flops(self, job: "Job") -> dict[str, Training]:
        """Return the FLOPs of one micro-batch by part."""
        ...

    def activations(self, job: "Job", ways: Ways) -> list[Line]:
        """Return what one device holds besides arrays of known shape."""
        ...

    def describe(self) -> str:
        """Return one line: rows, tokens, pictures."""
        ...


@dataclasses.dataclass(frozen=True)
class Job:
    """A training run as sizes. Trees are nested dicts of `jax.ShapeDtypeStruct`.

    Attributes:
      name: what the report calls it.
      target: the machine.
      mesh: sizes of the mesh's axes, without -1 (`targets.mesh_sizes`).
      work: of a micro-batch.
      trained: parameters of the model that are trained, in the type in which they are kept.
      fixed: the other parameters of the model, in theirs.
      adapters: trained adapters, or {}.
      optimizer: state of the optimiser as shapes, any tree; a leaf belongs to the parameter whose
        path its own path ends with.
      ema: moving averages, or None.
      frozen: other models, by name.
      batch: arrays of a step, (accumulation, rows, ...), if known.
      accumulation: micro-batches of a step.
      compute: type in which the networks run.
    """

    name: str
    target: Target
    mesh: Mapping[str, int]
    work: Any  # a Work; beartype cannot check a protocol's data attributes
    trained: Params
    fixed: Params = dataclasses.field(default_factory=dict)
    adapters: Params = dataclasses.field(default_factory=dict)
    optimizer: Any = None
    ema: Params | None = None
    frozen: Mapping[str, Params] = dataclasses.field(default_factory=dict)
    batch: Any = None
    accumulation: int = 1
    compute: Any = jnp.bfloat16

    def __post_init__(self):
        devices = 1
        for size in self.mesh.values():
            devices *= size
        if devices != self.target.devices:
            given = " x ".join(f"{axis}={size}" for axis, size in self.mesh.items())
            raise ValueError(
                f"mesh {given} has {devices} devices, the target {self.target.name} "
                f"{self.target.devices}"
            )
        ways = self.ways.rows
        if self.work.rows % ways:
            raise ValueError(
                f"{self.work.rows} rows of a micro-batch do not spread over data x fsdp = {ways} "
                "devices"
            )

    @property
    def ways(self) -> Ways:
        """Over how many devices activations are spread."""
        return Ways.of(self.mesh)

    @property
    def itemsize(self) -> int:
        """Bytes of the compute type."""
        return jnp.dtype(self.compute).itemsize

    @property
    def learnt(self) -> Params:
        """What has a gradient: trained parameters and adapters, under model/ and lora/."""
        parts = {"model": self.trained, "lora": self.adapters}
        return {name: part for name, part in parts.items() if part}

    @property
    def share(self) -> float:
        """Part of the model's parameters that is trained."""
        trained, fixed = tree.count(self.trained), tree.count(self.fixed)
        return trained / max(trained + fixed, 1)

    def trains(self, root: str) -> bool:
        """Whether anything of a subtree has a gradient."""
        return any(
            path.startswith(root) for part in self.learnt.values() for path in tree.flatten(part)
        )


def typed(shapes: Params, dtype: Any) -> Params:
    """Return the same shapes in another type."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)


def largest_layer(job: Job) -> int:
    """Return the bytes of the model's largest layer in the compute type, split over `tensor`."""
    per_layer: dict[str, int] = {}
    for part in (job.trained, job.fixed):
        for path, leaf in tree.flatten(part).items():
            root = tree.stacked_root(path, job.work.stacked)
            if root is not None:
                size = tree.count({"leaf": leaf}) // leaf.shape[0]
                per_layer[root] = per_layer.get(root, 0) + size
    return max(per_layer.values(), default=0) * job.itemsize // job.ways.tensor
