"""Passing over arrays in bounded contiguous pieces, whatever their strides."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from clvr_jax.weights.header import CODES

_STRIP = 16  # columns copied at a time from a transposed view
_CACHED = 1 << 20  # bytes checked at a time: fits a second-level cache
_NOT_FINITE = {  # the bits, sign aside, that are all set in every inf and NaN and in no number
    "BF16": 0x7F80,
    "F8_E4M3": 0x7F,  # has no inf and one NaN
    "F8_E5M2": 0x7C,
    "F64": 0x7FF0_0000_0000_0000,
    "F32": 0x7F80_0000,
    "F16": 0x7C00,
}


def is_finite(array: Any) -> bool:
    """Return whether no value is infinite or NaN, without casting or copying the whole array."""
    array = np.asarray(array)
    if array.dtype.kind in "biu":
        return True
    order = sorted(range(array.ndim), key=lambda axis: -abs(array.strides[axis]))
    array = array.transpose(order)  # as it lies in memory, so that most blocks are no copies
    mask = _NOT_FINITE.get(CODES.get(array.dtype, ""))
    if mask is None:
        return all(bool(np.isfinite(block).all()) for block in blocks(array, _CACHED))
    bits = np.dtype(f"u{array.dtype.itemsize}")
    mask = bits.type(mask)
    return all((block & mask).max() != mask for block in blocks(array.view(bits), _CACHED))


def blocks(array: np.ndarray, limit: int) -> Iterator[np.ndarray]:
    """Yield an array's values in C order as flat arrays of at most `limit` bytes.

    They are views where the array is contiguous, else copies.
    """
    if array.size == 0:
        return
    if array.flags.c_contiguous:
        flat = array.reshape(-1)
        step = max(limit // array.itemsize, 1)
        for first in range(0, flat.size, step):
            yield flat[first : first + step]
    elif array.nbytes <= limit:
        yield _copy(array).reshape(-1)
    else:
        rows = max(limit // array[0].nbytes, 1)
        for first in range(0, len(array), rows):
            block = array[first : first + rows]
            yield from blocks(block if len(block) > 1 else block.reshape(block.shape[1:]), limit)


def _copy(array: np.ndarray) -> np.ndarray:
    """A copy in C order. A transposed view goes in strips, whose cache lines stay until used up:
    several times faster than at once."""
    if array.strides[-1] == min(array.strides):
        return np.ascontiguousarray(array)
    out = np.empty(array.shape, array.dtype)
    for first in range(0, array.shape[-1], _STRIP):
        strip = (..., slice(first, first + _STRIP))
        out[strip] = array[strip]
    return out
