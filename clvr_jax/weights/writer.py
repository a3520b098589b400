"""Writing safetensors tensor by tensor, each at its final place in its file."""

import glob
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from clvr_jax.weights.blocks import blocks
from clvr_jax.weights.header import CODES, WeightsError, make_header, nbytes
from clvr_jax.weights.staging import staging, sync

Specs = Mapping[str, tuple[tuple[int, ...], np.dtype]]

_BLOCK = 8 << 20  # bytes copied at a time from a view that is not contiguous


def write_safetensors(
    folder_or_file: str | Path,
    specs: Specs,
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int | None = None,
    stem: str = "model",
) -> None:
    """Write tensors in whatever order they come; after an error nothing is left.

    Args:
      folder_or_file: a path ending in `.safetensors` is one file, which is replaced if it exists;
        any other is a folder, which may exist but hold no weights of this stem.
      specs: shape and type of every tensor; their order decides the shards.
      tensors: every tensor of `specs`, once; strided views are copied block by block.
      metadata: text for the header, besides `format: pt`, without which transformers and diffusers
        refuse a file.
      max_shard_bytes: cut a folder's weights into files of at most this many bytes of data (more
        for a single tensor that is larger), with the index that Hugging Face libraries read.
      stem: name of a folder's files.

    Raises:
      WeightsError: a tensor is missing, unexpected, given twice, or not as `specs` say; the folder
        has such weights already; the disk has too little room.
    """
    target = Path(folder_or_file)
    specs = {name: (tuple(shape), np.dtype(dtype)) for name, (shape, dtype) in specs.items()}
    for name, (_, dtype) in specs.items():
        if dtype not in CODES:
            raise WeightsError(target, name, f"type {dtype}", f"one of {list(map(str, CODES))}")
    single = target.suffix == ".safetensors"
    shards = [specs] if single else _shards(specs, max_shard_bytes)
    if not single and (old := sorted(target.glob(f"{glob.escape(stem)}*.safetensors*"))):
        found = f"weights already ({old[0].name})"
        raise WeightsError(target, None, found, "none", "remove them or write elsewhere")

    size = sum(nbytes(*spec) for spec in specs.values())
    with staging(target, size, folder=not single) as temporary:
        names = _file_names(stem, len(shards))
        files = [temporary] if single else [temporary / name for name in names]
        places: dict[str, tuple[Path, int]] = {}
        for file, shard in zip(files, shards):
            header, starts, end = make_header(shard, {**(metadata or {}), "format": "pt"})
            places |= {name: (file, start) for name, start in starts.items()}
            with open(file, "wb") as opened:
                opened.write(header)
                opened.truncate(end)
        for name, array in checked(target, specs, tensors):
            file, start = places[name]
            with open(file, "r+b") as opened:
                opened.seek(start)
                bits = array.view(f"u{array.itemsize}")  # numpy copies foreign types slowly
                for block in blocks(bits, _BLOCK):
                    opened.write(block.view(np.uint8))
        if len(shards) > 1:
            weight_map = {name: f for f, shard in zip(names, shards) for name in sorted(shard)}
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            files.append(temporary / f"{stem}.safetensors.index.json")
            files[-1].write_text(json.dumps(index, indent=2) + "\n")
        for file in files:
            sync(file)


def checked(
    target: Path, specs: Specs, arrays: Iterable[tuple[str, np.ndarray]]
) -> Iterator[tuple[str, np.ndarray]]:
    """Pass arrays on that are as `specs` say; the stream ends when each came once.

    Raises:
      WeightsError: an array is missing, unexpected, given twice, or of another shape or type.
    """
    left = dict(specs)
    for name, given in arrays:
        array = np.asarray(given)
        if name not in specs:
            raise WeightsError(target, name, "an array to write", "none of this name")
        if name not in left:
            raise WeightsError(target, name, "it a second time", "each array once")
        shape, dtype = left.pop(name)
        if (array.shape, array.dtype) != (shape, dtype):
            found = f"an array {array.dtype} {array.shape} to write"
            raise WeightsError(target, name, found, f"{dtype} {shape}")
        yield name, array
        del given, array  # the next one may need the room
    if left:
        some = ", ".join(list(left)[:5])
        found = f"no array to write for {len(left)} of {len(specs)}: {some}"
        raise WeightsError(target, None, found, "all of them")


def _shards(specs: Specs, limit: int | None) -> list[Specs]:
    """Cut in order, so that no shard is larger than `limit` unless by a single tensor."""
    shards: list[dict] = [{}]
    size = 0
    for name, spec in specs.items():
        extra = nbytes(*spec)
        if limit is not None and shards[-1] and size + extra > limit:
            shards.append({})
            size = 0
        shards[-1][name] = spec
        size += extra
    return shards


def _file_names(stem: str, count: int) -> list[str]:
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
