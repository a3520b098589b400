"""The header of a safetensors file: types, offsets and their checks."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}

_MAX_BYTES = 100_000_000  # the safetensors library refuses longer headers
_AGAIN = "download it again"
_CONVERT = "use the .safetensors files of the same repository"
_FILE = "a safetensors file"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_FOREIGN = (  # how other files begin that are found under the name of a safetensors file
    (b"version https://git-lfs", "a git-LFS pointer instead of the weights", "run `git lfs pull`"),
    (b"PK\x03\x04", "a PyTorch pickle (zip)", _CONVERT),
    (b"\x80\x02", "a PyTorch pickle", _CONVERT),
    (b"GGUF", "a GGUF file", _CONVERT),
    (b"<", "a web page", f"log in to the hub, accept the licence there and {_AGAIN}"),
)


class WeightsError(ValueError):
    """A checkpoint that cannot be used or written.

    Args:
      file: the file or folder.
      tensor: the tensor's name, or None when it is about the file.
      found: what is there.
      expected: what should be there.
      advice: what to do about it.
    """

    def __init__(
        self, file: str | Path, tensor: str | None, found: str, expected: str, advice: str = ""
    ):
        where = f"{file}: {tensor}" if tensor else f"{file}"
        super().__init__(
            f"{where}: found {found}, expected {expected}" + (f"; {advice}" if advice else "")
        )


class Entry(NamedTuple):
    """A tensor in a file; `start` counts bytes from the beginning of the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int


def nbytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Return the bytes of a dense array."""
    return math.prod(shape) * dtype.itemsize


def read_header(file: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Return a file's tensors and metadata, the former in the order of their data.

    Raises:
      WeightsError: the file does not follow the format, up to its last byte.
    """
    raw, size = _read(file)
    header = parse_json(file, raw, "a header that is not JSON", _AGAIN)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise WeightsError(file, "__metadata__", f"{metadata!r:.80}", "text by name", _AGAIN)

    offsets = {name: _offsets(file, name, value) for name, value in header.items()}
    first, last = 8 + len(raw), 0
    tensors = {}
    for name in sorted(offsets, key=offsets.__getitem__):
        begin, end = offsets[name]
        if begin != last:
            what = "a hole" if begin > last else "an overlap"
            found = f"{what}: its data begins at byte {begin}"
            raise WeightsError(file, name, found, f"byte {last}", _AGAIN)
        if first + end > size:
            found = f"{size} bytes in the file, which is truncated"
            raise WeightsError(file, name, found, f"its data up to byte {first + end}", _AGAIN)
        dtype = DTYPES[header[name]["dtype"]]
        tensors[name] = Entry(dtype, tuple(header[name]["shape"]), first + begin)
        last = end
    if first + last != size:
        found = f"{size - first - last} bytes after the last tensor"
        raise WeightsError(file, None, found, f"a file of {first + last} bytes", _AGAIN)
    return tensors, metadata


def make_header(
    specs: Mapping[str, tuple[tuple[int, ...], np.dtype]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int], int]:
    """Return the first bytes of a file, where each tensor starts in it, and the file's size.

    Wide types come first, so that every tensor is aligned; the header is padded to eight bytes.
    """
    order = sorted(specs, key=lambda name: -specs[name][1].itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    last = 0
    for name in order:
        shape, dtype = specs[name]
        begin, last = last, last + nbytes(shape, dtype)
        header[name] = {
            "dtype": CODES[dtype],
            "shape": [int(n) for n in shape],
            "data_offsets": [begin, last],
        }
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    first = 8 + len(raw)
    starts = {name: first + header[name]["data_offsets"][0] for name in order}
    return len(raw).to_bytes(8, "little") + raw, starts, first + last


def parse_json(file: Path, raw: bytes, what: str, advice: str) -> dict[str, Any]:
    """Return the object that `raw` holds.

    Raises:
      WeightsError: it is no JSON object, or names a key twice.
    """
    try:
        value = json.loads(raw.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise WeightsError(file, None, f"{what} ({error})", "a JSON object", advice) from error
    if not isinstance(value, dict):
        raise WeightsError(file, None, f"{what}: {value!r:.40}", "a JSON object", advice)
    return value


def refuse_foreign(file: Path, head: bytes, expected: str = _FILE) -> None:
    """Refuse what the first bytes show to be another kind of file.

    Raises:
      WeightsError: it is one that is often found in this place.
    """
    for magic, what, advice in _FOREIGN:
        if head.startswith(magic):
            raise WeightsError(file, None, what, expected, advice)


def _read(file: Path) -> tuple[bytes, int]:
    """The bytes of the JSON part and the size of the file."""
    if file.suffix in _PICKLES:
        raise WeightsError(file, None, f"a PyTorch pickle ({file.suffix})", _FILE, _CONVERT)
    if not file.is_file():
        raise WeightsError(file, None, "no file", _FILE, "finish the download")
    size = file.stat().st_size
    if size == 0:
        raise WeightsError(file, None, "an empty file", _FILE, _AGAIN)
    with open(file, "rb") as opened:
        head = opened.read(32)
        if head[8:9] != b"{":  # else the first bytes are a length, whatever they look like
            refuse_foreign(file, head)
        if size < 8:
            raise WeightsError(file, None, f"{size} bytes", f"{_FILE}, truncated", _AGAIN)
        length = int.from_bytes(head[:8], "little")
        if not 2 <= length <= _MAX_BYTES:
            expected = f"2 to {_MAX_BYTES}"
            advice = f"this is no safetensors file; {_AGAIN}"
            raise WeightsError(file, None, f"a header of {length} bytes", expected, advice)
        if 8 + length > size:
            found = f"{size} bytes: truncated inside the header"
            raise WeightsError(file, None, found, f"more than {8 + length}", _AGAIN)
        opened.seek(8)
        return opened.read(length), size


def _offsets(file: Path, name: str, value: Any) -> tuple[int, int]:
    """Where a tensor's data begins and ends after the header, its entry having been checked."""
    try:
        code, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
        valid = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (TypeError, KeyError, ValueError):
        valid = False
    if not valid:
        expected = "dtype, shape and data_offsets"
        raise WeightsError(file, name, f"the entry {value!r:.120}", expected, _AGAIN)
    if code not in CODES.values():
        known = ", ".join(DTYPES)
        raise WeightsError(file, name, f"type {code}", f"one of {known}", "use the bf16 weights")
    wanted = nbytes(tuple(shape), DTYPES[code])
    if end - begin != wanted:
        expected = f"{wanted} for {code} {tuple(shape)}"
        raise WeightsError(file, name, f"{end - begin} bytes", expected, _AGAIN)
    return begin, end


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is named twice")
    return value
