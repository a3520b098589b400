"""From a checkpoint to (sharded) arrays on devices, stacked there layer by layer."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from clvr_jax.tree import flatten, stacked_root, unflatten
from clvr_jax.typing import Params
from clvr_jax.weights import WeightsError
from conversion.lazy import Lazy, contiguous, memory_order
from conversion.sources import Source


def load(
    source: Source,
    abstract: Mapping[str, Any],
    stacked: tuple[str, ...],
    shardings: Mapping[str, Any] | None = None,
    dtype: Any = None,
) -> Params:
    """Return the parameters of `abstract` as arrays on devices.

    The host holds one layer of one leaf at a time, in the order in which the file has it; the
    device transposes, where it costs little. A stacked leaf with fewer layers than the file
    takes the first ones.

    Args:
      source: the checkpoint.
      abstract: shapes and types of the tree to fill.
      stacked: its stacked roots.
      shardings: the same tree with a sharding for each leaf; None puts all on the first device.
      dtype: type of every leaf; None takes `abstract`'s.

    Raises:
      WeightsError: the source lacks a leaf, or has it in another shape.
    """
    places = flatten(shardings) if shardings is not None else {}
    first = SingleDeviceSharding(jax.local_devices()[0])
    flat = {}
    for path, leaf in flatten(abstract).items():
        sharding = places[path] if shardings is not None else first
        out_dtype = jnp.dtype(dtype or leaf.dtype)
        shape = tuple(leaf.shape)
        if stacked_root(path, stacked) is None:
            part, order = _put(_read(source, path, None, shape), sharding)
            flat[path] = _finisher(sharding, order, out_dtype)(part).block_until_ready()
            del part
        else:
            whole = _allocator(shape, out_dtype, sharding)()
            for layer in range(shape[0]):
                part, order = _put(_read(source, path, layer, shape[1:]), _one_layer(sharding))
                whole = _writer(sharding, order)(whole, part, layer)
                whole.block_until_ready()  # else the host would run ahead and hold many layers
                del part
                source.release()
            flat[path] = whole
        source.release()
    return unflatten(flat)


def _read(source: Source, path: str, layer: int | None, shape: tuple[int, ...]) -> Lazy:
    view = source.read(path, layer)
    if tuple(view.shape) != shape:
        name = path if layer is None else f"{path}, layer {layer}"
        raise WeightsError(source.path, name, f"shape {tuple(view.shape)}", f"shape {shape}")
    return view


def _put(view: Lazy, sharding: Any) -> tuple[jax.Array, tuple[int, ...]]:
    """Send a leaf to the devices in memory order; return it with that order of its axes."""
    order = memory_order(view)
    if order != tuple(range(len(order))):
        view = view.transpose(order)
        if isinstance(sharding, NamedSharding):
            spec = tuple(sharding.spec) + (None,) * (len(order) - len(sharding.spec))
            sharding = _with_spec(sharding, tuple(spec[axis] for axis in order))

    read = lambda index: contiguous(view[index])
    return jax.make_array_from_callback(tuple(view.shape), sharding, read), order


def _one_layer(sharding: Any) -> Any:
    """The sharding of one layer of a stacked leaf."""
    if isinstance(sharding, NamedSharding):
        return _with_spec(sharding, tuple(sharding.spec)[1:])
    return sharding


def _with_spec(sharding: NamedSharding, spec: tuple[Any, ...]) -> NamedSharding:
    return NamedSharding(sharding.mesh, PartitionSpec(*spec), memory_kind=sharding.memory_kind)


@functools.cache
def _allocator(shape: tuple[int, ...], dtype: Any, sharding: Any):
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.cache
def _finisher(sharding: Any, order: tuple[int, ...], dtype: Any):
    """Compiled: axes back from memory order, and the type, in memory of its own."""

    def finish(part: jax.Array) -> jax.Array:
        # a device on the host would otherwise go on using the file, which is closed some day
        return jnp.copy(jnp.transpose(part, np.argsort(order)).astype(dtype))

    return jax.jit(finish, out_shardings=sharding)


@functools.cache
def _writer(sharding: Any, order: tuple[int, ...]):
    """Compiled: one layer, axes back from memory order, written into the donated stack."""

    def write(whole: jax.Array, part: jax.Array, layer: int) -> jax.Array:
        part = jnp.transpose(part, np.argsort(order)).astype(whole.dtype)
        return jax.lax.dynamic_update_index_in_dim(whole, part, layer, 0)

    return jax.jit(write, donate_argnums=0, out_shardings=sharding)
