"""Programs lowered from shapes and shardings alone, also for TPUs that are not there."""

import contextlib
import os
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


class Temporaries(NamedTuple):
    """Bytes of one device that a compiled program takes.

    Attributes:
      arguments: of its inputs.
      outputs: of its results, those in the place of donated inputs included.
      donated: of the results that lie in the place of inputs.
      temporary: of everything between.
    """

    arguments: int
    outputs: int
    donated: int
    temporary: int

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


def compiled_memory(lower: Callable[[], Any]) -> Temporaries:
    """Return what a program takes of one device, compiled for the devices of its arguments.

    Args:
      lower: returns the lowered program, e.g. `lambda: step.lower(*shapes_with_shardings)`; runs
        as if on the platform of `topology`.
    """
    with as_if_on("tpu"):
        found = lower().compile().memory_analysis()
    return Temporaries(
        found.argument_size_in_bytes,
        found.output_size_in_bytes,
        found.alias_size_in_bytes,
        found.temp_size_in_bytes,
    )
