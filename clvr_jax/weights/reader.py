"""Reading tensors by name from one safetensors file or a folder of them."""

import mmap
import re
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clvr_jax.weights.header import WeightsError, nbytes, parse_json, read_header, refuse_foreign

_INDEX = ".safetensors.index.json"
_AGAIN = "download the folder again"


class TensorInfo(NamedTuple):
    """What a header says of a tensor, and the file that holds it."""

    dtype: np.dtype
    shape: tuple[int, ...]
    file: Path


class SafetensorsReader:
    """The tensors of a safetensors file, or of a folder of them, as lazy views.

    The weight map of a folder's `*.safetensors.index.json` decides which tensors there are; without
    one, all its `*.safetensors` are read.

    Attributes:
      path: what was given.
      tensors: every tensor by name.
      metadata: the text in the headers; where files differ, the first one's.

    Args:
      path: a `.safetensors` file, a `.safetensors.index.json`, or a folder.

    Raises:
      WeightsError: a file or tensor is missing, truncated, or not what it claims to be.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        self._starts: dict[str, int] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        for file, wanted in _files(self.path).items():
            entries, metadata = read_header(file)
            self.metadata = metadata | self.metadata
            for name in entries if wanted is None else wanted:
                if name not in entries:
                    expected = "the one that the index names"
                    raise WeightsError(file, name, "no such tensor", expected, _AGAIN)
                if name in self.tensors:
                    found = f"a second one, besides {self.tensors[name].file.name}"
                    advice = "give one file, or add the index"
                    raise WeightsError(file, name, found, "each tensor once", advice)
                dtype, shape, self._starts[name] = entries[name]
                self.tensors[name] = TensorInfo(dtype, shape, file)

    def read(self, name: str) -> np.ndarray:
        """Return a tensor as a read-only view of its file, whose pages come in as they are touched.

        Raises:
          WeightsError: there is no such tensor.
        """
        dtype, shape, file = self._info(name)
        start, size = self._starts[name], nbytes(shape, dtype)
        if size == 0:  # may lie at the end of the file, where nothing can be mapped
            data = np.frombuffer(b"", np.uint8)
        else:
            data = np.frombuffer(self._map(file), np.uint8, size, start)
        if start % dtype.itemsize:  # other writers may leave tensors unaligned
            data = data.copy()
            data.flags.writeable = False
        return data.view(dtype).reshape(shape)

    def release(self, name: str | None = None) -> None:
        """Drop the resident pages of a tensor, or of all; views stay valid and load them again.

        Raises:
          WeightsError: there is no such tensor.
        """
        if name is None:
            for mapped in self._maps.values():
                mapped.madvise(mmap.MADV_DONTNEED)
            return
        dtype, shape, file = self._info(name)
        first = self._starts[name] // mmap.PAGESIZE * mmap.PAGESIZE
        length = self._starts[name] + nbytes(shape, dtype) - first
        if file in self._maps and length:
            self._maps[file].madvise(mmap.MADV_DONTNEED, first, length)

    def close(self) -> None:
        """Let go of the files; each stays mapped for as long as a view of it lives."""
        self._maps.clear()

    def __enter__(self) -> "SafetensorsReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            near = ", ".join(get_close_matches(name, self.tensors, 3)) or "none alike"
            expected = f"one of its {len(self.tensors)} tensors ({near})"
            raise WeightsError(self.path, name, "no such tensor", expected)
        return self.tensors[name]

    def _map(self, file: Path) -> mmap.mmap:
        if file not in self._maps:
            with open(file, "rb") as opened:
                self._maps[file] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[file]


def _files(path: Path) -> dict[Path, list[str] | None]:
    """The files to read, each with the names to take from it; None is all."""
    if path.name.endswith(_INDEX):
        return _indexed(path)
    if not path.is_dir():
        if not path.exists():
            raise WeightsError(path, None, "nothing", "a .safetensors file or a folder of them")
        return {path: None}
    indices = sorted(path.glob(f"*{_INDEX}"))
    if len(indices) > 1:
        names = ", ".join(index.name for index in indices)
        raise WeightsError(path, None, f"several indices: {names}", "one", "give the one to read")
    if indices:
        return _indexed(indices[0])
    files = sorted(f for f in path.glob("*.safetensors") if not f.name.startswith("."))
    if not files:
        there = ", ".join(sorted(f.name for f in path.iterdir())[:8]) or "nothing"
        raise WeightsError(path, None, f"no safetensors among: {there}", "*.safetensors")
    _refuse_gaps(path, {f.name for f in files})
    return {file: None for file in files}


def _indexed(index: Path) -> dict[Path, list[str] | None]:
    if not index.is_file():
        raise WeightsError(index, None, "no file", "an index of safetensors files")
    raw = index.read_bytes()
    refuse_foreign(index, raw, "an index of safetensors files")
    weight_map = parse_json(index, raw, "no JSON", _AGAIN).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        found = f"weight_map {weight_map!r:.40}"
        raise WeightsError(index, None, found, "the file of each tensor by name", _AGAIN)
    files: dict[Path, list[str] | None] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise WeightsError(index, tensor, f"file {name!r}", "a file beside the index", _AGAIN)
        files.setdefault(index.parent / name, []).append(tensor)
    _refuse_missing(index, sorted(f.name for f in files if not f.is_file()), len(files))
    return files


def _refuse_gaps(folder: Path, names: set[str]) -> None:
    """Shards are numbered, so a missing one shows even without an index."""
    for name in sorted(names):
        if match := re.fullmatch(r"(.*-)(\d+)(-of-)(\d+)(\.safetensors)", name):
            head, digits, of, count, tail = match.groups()
            wanted = [
                f"{head}{i:0{len(digits)}d}{of}{count}{tail}" for i in range(1, int(count) + 1)
            ]
            _refuse_missing(folder, [w for w in wanted if w not in names], len(wanted))


def _refuse_missing(where: Path, missing: list[str], count: int) -> None:
    if missing:
        found = f"{len(missing)} of {count} files missing: {', '.join(missing[:5])}"
        raise WeightsError(where, None, found, "all of them", "finish the download")
