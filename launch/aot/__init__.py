"""Programs lowered from shapes and shardings alone, also for TPUs that are not there."""

import collections
import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from clvr_jax import parallel
from clvr_jax.tree import flatten, unflatten
from clvr_jax.typing import Params


def placed(tree: Params, mesh: Mesh) -> Params:
    """Return the shapes of a tree of parameters where the rules place them."""
    places = flatten(parallel.shardings(tree, mesh))
    return unflatten(
        {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places[path])
            for path, leaf in flatten(tree).items()
        }
    )


def whole(tree, mesh: Mesh):
    """Return the shapes of a tree of arrays, each of them whole on every device."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)
    return jax.tree.map(shape, tree)


class TooLarge(ValueError):
    """A program needs more memory than a device has.

    Attributes:
      size: bytes that it needs, as the compiler counts them.
    """

    def __init__(self, message: str, size: int):
        super().__init__(message)
        self.size = size


class Compiled(NamedTuple):
    """What a compiled program takes of one device.

    Attributes:
      arguments: bytes of its inputs.
      outputs: bytes of its results, those in the place of donated inputs included.
      donated: bytes of the results that lie in the place of inputs.
      temporary: bytes of everything between.
      collectives: instructions by kind. A loop's body is printed once: these are no executions.
      seconds: that compiling took.
    """

    arguments: int
    outputs: int
    donated: int
    temporary: int
    collectives: dict[str, int]
    seconds: float

    @property
    def peak(self) -> int:
        """Bytes at once."""
        return self.arguments + self.outputs - self.donated + self.temporary


def topology(name: str) -> list[Any]:
    """Return the devices of a TPU slice that need not exist, e.g. v5e:2x4.

    Call it before anything touches a device: from then on this process computes on the CPU.

    Raises:
      ValueError: the name is unknown, or libtpu is not installed.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    single = {"chips_per_host_bounds": (1, 1, 1)} if name.endswith(":1x1") else {}
    try:
        return topologies.get_topology_desc(name, "tpu", **single).devices
    except Exception as error:  # JAX raises several kinds for a missing library or an unknown name
        raise ValueError(
            f'no topology {name!r}: {error}. Names look like v5e:2x4; pip install -e ".[tpu]"'
        ) from error


@contextlib.contextmanager
def as_if_on(platform: str) -> Iterator[None]:
    """Have what chooses by device see another platform than this machine's."""
    with mock.patch.object(jax, "default_backend", lambda: platform):
        yield


def compiled(lower: Callable[[], Any]) -> Compiled:
    """Compile a program for the devices of its arguments.

    Args:
      lower: returns the lowered program, e.g. `lambda: step.lower(*shapes_with_shardings)`; runs
        as if on the platform of `topology`.

    Raises:
      TooLarge: the compiler says that it does not fit into a device's memory.
    """
    with as_if_on("tpu"):
        lowered = lower()
        began = time.perf_counter()
        try:
            program = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            said = str(error).split("\n", 1)[0]
            size = re.search(r"\(([\d.]+)G\) exceeds", said)
            if size is None:
                raise
            raise TooLarge(said, int(float(size[1]) * 2**30)) from error
        seconds = time.perf_counter() - began
    memory = program.memory_analysis()
    return Compiled(
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        _collectives(program.as_text()),
        seconds,
    )


def _collectives(text: str) -> dict[str, int]:
    kinds = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
    # one that is fused with the arithmetic beside it is printed in pieces that share a channel
    found = re.findall(rf" ({'|'.join(kinds)})(?:-start)?\(.*?channel_id=(\d+)", text)
    counts = collections.Counter(kind for kind, _ in set(found))
    return {kind: counts[kind] for kind in kinds if counts[kind]}
