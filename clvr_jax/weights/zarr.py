"""Single arrays as Orbax stores them: zarr, mapped where it is plain, else through tensorstore."""

import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  numpy knows bfloat16 by name from here
import numpy as np

from clvr_jax.weights.header import WeightsError, nbytes

Ranges = list[tuple[int, int]]  # first and one past the last element, for each axis

_CHUNK = 64 << 20  # bytes
AGAIN = "copy it again, or convert again"


def open_array(folder: Path, name: str, *, ocdbt: bool, zarr3: bool) -> "MappedArray | StoredArray":
    """Open an array in whichever of Orbax's formats it is; only its metadata is read.

    Raises:
      WeightsError: there is no such array, or its metadata is damaged.
    """
    try:
        if not ocdbt and not zarr3 and (plain := _open_plain(folder / name)):
            return plain
        return StoredArray(_open_store(folder, name, ocdbt, zarr3))
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = f"no readable array ({error})"
        raise WeightsError(folder, name, found, "one, as _METADATA names it", AGAIN) from error


def write_array(folder: Path, array: np.ndarray) -> None:
    """Write an array as plain zarr in a folder of its own, in chunks along its first axes."""
    import tensorstore as ts

    chunks = _chunks(array.shape, array.dtype)
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{folder.absolute()}/"},
        "dtype": array.dtype.name,
        "metadata": {"shape": array.shape, "chunks": chunks, "compressor": None},
        "store_data_equal_to_fill_value": True,  # else a chunk of zeros would look lost
    }
    store = ts.open(spec, create=True).result()
    for corner in itertools.product(*(range(0, n, c) for n, c in zip(array.shape, chunks))):
        part = tuple(slice(i, min(i + c, n)) for i, c, n in zip(corner, chunks, array.shape))
        # the array stays as it is until the result is there, so that a full chunk needs no copy
        store[part].write(array[part], can_reference_source_data_indefinitely=True).result()


class MappedArray(NamedTuple):
    """A zarr array of plain chunks, in files that can be mapped."""

    folder: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: tuple[int, ...]

    def read(self, ranges: Ranges) -> np.ndarray:
        """Return the part in `ranges`: a view when it lies in one chunk, else a copy."""
        out = np.empty([last - first for first, last in ranges], self.dtype)
        grid = [range(first // n, -(-last // n)) for (first, last), n in zip(ranges, self.chunks)]
        for place in itertools.product(*grid):
            # ranges relative to this chunk's corner
            local = [(a - i * n, b - i * n) for (a, b), i, n in zip(ranges, place, self.chunks)]
            source = tuple(slice(max(a, 0), min(b, n)) for (a, b), n in zip(local, self.chunks))
            part = self._chunk(place)[(*source, ...)]  # never a scalar
            if part.shape == out.shape:
                return part
            out[tuple(slice(s.start - a, s.stop - a) for s, (a, _) in zip(source, local))] = part
        return out

    def _chunk(self, place: tuple[int, ...]) -> np.ndarray:
        file = self.folder / (".".join(map(str, place)) or "0")
        size, expected = file.stat().st_size, nbytes(self.chunks, self.dtype)
        if size != expected:
            raise ValueError(f"{file.name} has {size} bytes, not {expected}")
        raw = np.asarray(np.memmap(file, np.uint8, "r"))
        return raw.view(self.dtype).reshape(self.chunks)


class StoredArray(NamedTuple):
    """An array in any format that tensorstore reads."""

    store: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of each axis."""
        return tuple(self.store.shape)

    @property
    def dtype(self) -> np.dtype:
        """Type of the values as numpy holds them."""
        return self.store.dtype.numpy_dtype

    def read(self, ranges: Ranges) -> np.ndarray:
        """Return a copy of the part in `ranges`."""
        return self.store[tuple(slice(*part) for part in ranges)].read().result()


def select(index: Sequence[slice] | None, shape: tuple[int, ...]) -> Ranges:
    """Return the ranges that one slice for each axis selects; None selects all.

    Raises:
      ValueError: the slices are too few or many, or have steps.
    """
    index = [slice(None)] * len(shape) if index is None else index
    if len(index) != len(shape) or any(part.step not in (None, 1) for part in index):
        raise ValueError(f"given {index}, expected a slice without step for each axis of {shape}")
    bounds = [part.indices(n) for part, n in zip(index, shape)]
    return [(first, max(first, last)) for first, last, _ in bounds]


def _open_plain(folder: Path) -> MappedArray | None:
    zarr = json.loads((folder / ".zarray").read_text())
    dialect = [zarr[key] for key in ("compressor", "filters", "order", "dimension_separator")]
    if dialect != [None, None, "C", "."] or sys.byteorder != "little":
        return None
    return MappedArray(folder, tuple(zarr["shape"]), np.dtype(zarr["dtype"]), tuple(zarr["chunks"]))


def _open_store(folder: Path, name: str, ocdbt: bool, zarr3: bool) -> Any:
    import tensorstore as ts

    base = f"{folder.absolute()}/"
    if ocdbt:
        files = {"driver": "ocdbt", "base": {"driver": "file", "path": base}, "path": f"{name}/"}
    else:
        files = {"driver": "file", "path": f"{base}{name}/"}
    spec = {
        "driver": "zarr3" if zarr3 else "zarr",
        "kvstore": files,
        "fill_missing_data_reads": False,  # else lost chunks would read as zeros
    }
    return ts.open(spec, read=True).result()


def _chunks(shape: tuple[int, ...], dtype: np.dtype) -> tuple[int, ...]:
    """Return the largest equal pieces along the first axes that `_CHUNK` allows."""
    chunks = [max(n, 1) for n in shape]
    for axis, n in enumerate(list(chunks)):
        if nbytes(tuple(chunks), dtype) <= _CHUNK:
            break
        most = max(_CHUNK // nbytes(tuple(chunks[axis + 1 :]), dtype), 1)
        chunks[axis] = -(-n // -(-n // most))  # equal pieces: zarr pads the last to a full chunk
    return tuple(chunks)
