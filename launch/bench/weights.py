"""Random weights of the real shapes, made on the device in the asked dtype, never on the host."""

import functools
import math
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp

from clvr_jax.tree import flatten, stacked_root, unflatten
from clvr_jax.typing import Params


def random_params(abstract: Params, seed: int, stacked: tuple[str, ...] = ()) -> Params:
    """Return parameters whose activations stay of order one.

    Kernels are uniform with variance 1 / fan-in, embeddings uniform with variance 1, scales and
    variances one, biases and means zero.

    Args:
      abstract: nested dict of `jax.ShapeDtypeStruct`.
      seed: seed of all leaves.
      stacked: roots whose leaves carry a leading layer axis.

    Raises:
      ValueError: a leaf has a name that none of these rules covers.
    """
    # XLA's own generator: Threefry takes longer than all the rest for nine billion weights
    flat = flatten(abstract)
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), len(flat))

    def make(item) -> tuple[str, jax.Array]:
        key, (path, leaf) = item
        shape = leaf.shape if stacked_root(path, stacked) is None else leaf.shape[1:]
        return path, _uniform(leaf.shape, leaf.dtype, key, *_range(path, shape))

    with ThreadPoolExecutor() as pool:  # one small program per shape: compile them side by side
        return unflatten(dict(pool.map(make, zip(keys, flat.items()))))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _uniform(shape, dtype, key, centre, limit):
    values = jax.random.uniform(key, shape, dtype, -1, 1)
    return jnp.asarray(centre, dtype) + jnp.asarray(limit, dtype) * values


def _range(path: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Centre and half width of a leaf's values; `shape` is that of one layer."""
    name = path.rsplit("/", 1)[-1]
    if name in ("scale", "var"):
        return 1.0, 0.0
    if name in ("bias", "mean"):
        return 0.0, 0.0
    if name == "embedding":
        return 0.0, math.sqrt(3.0)
    if name != "kernel":
        raise ValueError(f"no random value is defined for {path} {shape}; add its name")
    convolution = (len(shape) == 4 and shape[:2] == (3, 3)) or len(shape) == 5
    fan_in = math.prod(shape[:-1]) if convolution else shape[0]
    return 0.0, math.sqrt(3.0 / fan_in)


def layer_reader(
    params: Params, stacked: tuple[str, ...]
) -> tuple[Params, Callable[[str, int | None], jax.Array]]:
    """Return the stacked tree as shapes, and a function that reads a leaf or one layer of it.

    Both layouts are read: stacked leaves, and unrolled ones (`blocks_3/qkv/kernel`).
    """
    flat = flatten(params)
    shapes: dict[str, jax.ShapeDtypeStruct] = {}
    for path, leaf in flat.items():
        match = re.match(rf"({'|'.join(stacked)})_(\d+)/", path) if stacked else None
        if match is None:
            shapes[path] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            continue
        name = f"{match[1]}/{path[match.end() :]}"
        layers = max(int(match[2]) + 1, shapes[name].shape[0] if name in shapes else 0)
        shapes[name] = jax.ShapeDtypeStruct((layers, *leaf.shape), leaf.dtype)

    def read(path: str, layer: int | None) -> jax.Array:
        if layer is None:
            return flat[path]
        root = stacked_root(path, stacked)
        unrolled = f"{root}_{layer}{path[len(root) :]}"
        return flat[unrolled] if unrolled in flat else flat[path][layer]

    return unflatten(shapes), read
