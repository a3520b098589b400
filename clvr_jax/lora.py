"""Low-rank adapters as a second dict of arrays beside the parameters; knows no model.

An adapter of the kernel `x/kernel` is `x/a` (i, r) and `x/b` (r, *out), both with the leading layer
axis of a stacked kernel. It adds `(inputs @ a) @ b` to the layer's output (Hu et al. 2021, arXiv
2106.09685, section 4.1). There is no alpha here: whatever scale a file had is in `b`.
"""

import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp

from clvr_jax import tree
from clvr_jax.typing import Params, PRNGKey


def init(
    key: PRNGKey,
    params: Params,
    pattern: str,
    rank: int,
    stacked: tuple[str, ...] = (),
    dtype: Any = jnp.float32,
) -> Params:
    """Return new adapters for every kernel whose path `pattern` matches.

    `a` is uniform in +-1/sqrt(i), as PEFT draws it, and `b` is zero, so that the model's output is
    unchanged. A draw depends on `key` and the path only, not on what else is adapted.

    Args:
      params: parameters, or their shapes; leaves named `kernel` are (i, *out) or (layer, i, *out).
      pattern: regular expression searched in paths such as `single_blocks/qkv/kernel`.
      rank: inner size of every adapter.
      stacked: roots whose kernels have the leading layer axis.

    Raises:
      ValueError: no kernel matches, or `rank` is not positive.
    """
    if rank < 1:
        raise ValueError(f"an adapter's rank must be 1 or more, given {rank}")
    kernels, others = tree.partition(tree.flatten(params), r"(^|/)kernel$")
    targets, rest = tree.partition(kernels, pattern)
    if not targets:
        shown = ", ".join(sorted(rest)) or f"none; leaves are {', '.join(sorted(others))}"
        raise ValueError(f"the pattern {pattern!r} matches no kernel; the kernels are: {shown}")
    flat = {}
    for path, kernel in targets.items():
        lead = 1 if tree.stacked_root(path, stacked) is not None else 0
        layers, (width, *out) = kernel.shape[:lead], kernel.shape[lead:]
        bound = 1 / math.sqrt(width)
        draw = jax.random.fold_in(key, zlib.crc32(path.encode()))
        a = jax.random.uniform(draw, (*layers, width, rank), jnp.float32, -bound, bound)
        flat[parent(path) + "/a"] = a.astype(dtype)
        flat[parent(path) + "/b"] = jnp.zeros((*layers, rank, *out), dtype)
    return tree.unflatten(flat)


def merge(params: Params, adapters: Params) -> Params:
    """Return parameters with `a @ b` added to the adapted kernels.

    The sum is made in float32 and rounded once to the kernel's dtype, one layer of a stacked kernel
    at a time. Leaves without an adapter are the given ones.

    Raises:
      ValueError: an adapter has no kernel, or its shapes do not fit the kernel's.
    """
    flat = tree.flatten(params)
    for path, (a, b) in pairs(adapters).items():
        kernel = flat.get(f"{path}/kernel")
        if kernel is None:
            raise ValueError(f"adapter {path} has no kernel {path}/kernel in the parameters")
        check(path, kernel.shape, a.shape, b.shape)
        leaves = kernel, a, b
        flat[f"{path}/kernel"] = _merged(leaves) if a.ndim == 2 else jax.lax.map(_merged, leaves)
    return tree.unflatten(flat)


def scaled(adapters: Params, scale: float) -> Params:
    """Return adapters whose effect is multiplied by `scale`."""
    return tree.unflatten(
        {
            path: (leaf * scale).astype(leaf.dtype) if path.endswith("/b") else leaf
            for path, leaf in tree.flatten(adapters).items()
        }
    )


def ranks(adapters: Params) -> dict[str, int]:
    """Return the rank of every adapter by the path of its layer."""
    return {path: a.shape[-1] for path, (a, _) in pairs(adapters).items()}


def pairs(adapters: Params) -> dict[str, tuple[Any, Any]]:
    """Return `{path: (a, b)}` of an adapter tree.

    Raises:
      ValueError: a leaf is neither `a` nor `b`, or one of the two is missing.
    """
    flat = tree.flatten(adapters)
    strange = [path for path in flat if path.rpartition("/")[2] not in ("a", "b")]
    if strange:
        raise ValueError(f"adapter leaves are named a and b; found {', '.join(strange)}")
    paths = dict.fromkeys(parent(path) for path in flat)
    alone = [path for path in paths if f"{path}/a" not in flat or f"{path}/b" not in flat]
    if alone:
        raise ValueError(f"adapters need both a and b; one is missing at {', '.join(alone)}")
    return {path: (flat[f"{path}/a"], flat[f"{path}/b"]) for path in paths}


def check(path: str, kernel: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...]) -> None:
    """Compare the shapes of an adapter with its kernel's.

    Raises:
      ValueError: they do not fit.
    """
    lead, rank = a[:-2], a[-1]
    fits = len(a) in (2, 3) and kernel[: len(a) - 1] == a[:-1]
    if not fits or b != (*lead, rank, *kernel[len(a) - 1 :]):
        raise ValueError(
            f"adapter {path}: a {a} and b {b} do not fit the kernel {kernel}; expected a (i, r) "
            "and b (r, *out) of a kernel (i, *out), each with the layer axis in front if stacked"
        )


def parent(path: str) -> str:
    """Return the path of the layer that a leaf belongs to."""
    return path.rpartition("/")[0]


def _merged(leaves):
    kernel, a, b = leaves
    delta = jnp.tensordot(
        a.astype(jnp.float32), b.astype(jnp.float32), axes=1, precision=jax.lax.Precision.HIGHEST
    )
    return (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)
