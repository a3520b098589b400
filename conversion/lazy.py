"""Array-likes that copy only what is indexed, and copies that are fast on transposed views."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

_STRIP = 16  # columns at a time: their cache lines stay until they are used up
_THREADS = min(os.cpu_count() or 1, 8)


class Lazy(Protocol):
    """What numpy arrays, `Joined` and `Stored` share: a shape, a type and slicing."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray: ...


class Joined:
    """Arrays one after another along an axis, joined when indexed."""

    def __init__(self, parts: Sequence[Any], axis: int):
        self.parts, self.axis = tuple(parts), axis
        sizes = [part.shape[axis] for part in parts]
        shape = list(parts[0].shape)
        shape[axis] = sum(sizes)
        self.shape = tuple(shape)
        self.dtype = np.result_type(*parts)
        self._starts = np.cumsum([0, *sizes])

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def __getitem__(self, index: Any) -> np.ndarray:
        index = full_index(index, self.shape)
        start, stop, _ = index[self.axis].indices(self.shape[self.axis])
        pieces = []
        for part, first in zip(self.parts, self._starts):
            begin, end = max(start - first, 0), min(stop - first, part.shape[self.axis])
            if begin < end:
                pieces.append(
                    part[(*index[: self.axis], slice(begin, end), *index[self.axis + 1 :])]
                )
        if len(pieces) == 1:
            return pieces[0]
        shape = list(pieces[0].shape)
        shape[self.axis] = sum(piece.shape[self.axis] for piece in pieces)
        out = np.empty(shape, self.dtype)
        first = 0
        for piece in pieces:
            last = first + piece.shape[self.axis]
            fill(out[(slice(None),) * self.axis + (slice(first, last),)], piece)
            first = last
        return out

    def transpose(self, order: Sequence[int]) -> "Joined":
        """Permute the axes."""
        return Joined([part.transpose(order) for part in self.parts], list(order).index(self.axis))

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        out = self[()]
        return out if dtype is None else out.astype(dtype)


class Stored:
    """An array in a store that reads slices, e.g. one of a checkpoint's leaves."""

    def __init__(self, shape: Sequence[int], dtype: Any, read: Callable[[Any], np.ndarray]):
        self.shape, self.dtype, self._read = tuple(shape), np.dtype(dtype), read

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def __getitem__(self, index: Any) -> np.ndarray:
        return self._read(full_index(index, self.shape))

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        out = self._read(None)
        return out if dtype is None else out.astype(dtype)


def full_index(index: Any, shape: Sequence[int]) -> tuple[slice, ...]:
    """Return one slice for each axis of `shape`."""
    index = index if isinstance(index, tuple) else (index,)
    return index + (slice(None),) * (len(shape) - len(index))


def memory_order(array: Any) -> tuple[int, ...]:
    """Return the order of axes in which a view lies in memory, slowest first."""
    view = array.parts[0] if isinstance(array, Joined) else array
    if not isinstance(view, np.ndarray):
        return tuple(range(len(array.shape)))
    return tuple(sorted(range(view.ndim), key=lambda axis: -abs(view.strides[axis])))


def contiguous(array: Any, dtype: Any = None) -> np.ndarray:
    """Return the array in C order and in `dtype`; itself if it is so already."""
    view = np.asarray(array)
    out_dtype = np.dtype(dtype or view.dtype)
    if out_dtype == view.dtype and view.flags.c_contiguous:
        return view
    out = np.empty(view.shape, out_dtype)
    fill(out, view)
    return out


def fill(out: np.ndarray, view: np.ndarray) -> None:
    """Copy `view` into `out`, in strips where it is transposed: several times faster than whole."""
    if out.dtype == view.dtype and out.dtype.itemsize == 2:
        out, view = out.view(np.uint16), view.view(np.uint16)  # numpy is slow on foreign types
    if view.ndim > 2 and view.size:  # wide strips need what lies behind the first axis as one
        flat_out, flat = (array.reshape(len(array), -1) for array in (out, view))
        if np.may_share_memory(flat_out, out) and np.may_share_memory(flat, view):
            out, view = flat_out, flat
    if view.ndim < 2 or abs(view.strides[-1]) == min(map(abs, view.strides)):
        out[...] = view
        return

    def strips(left: int) -> None:
        for first in range(left, min(left + 4 * _STRIP, view.shape[-1]), _STRIP):
            strip = (..., slice(first, first + _STRIP))
            out[strip] = view[strip]

    lefts = range(0, view.shape[-1], 4 * _STRIP)
    if view.nbytes < 1 << 20:
        for left in lefts:
            strips(left)
    else:
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(strips, lefts))
