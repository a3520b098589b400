"""Writing a `Source` out: as Orbax leaves, or as safetensors through a rule table."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clvr_jax.tree import layer_path
from clvr_jax.weights import is_finite, write_safetensors
from conversion.lazy import Lazy, contiguous
from conversion.rules import Bound, Table
from conversion.sources import Source, leaves

_LARGE = 1 << 29  # bytes; only embeddings and output heads are larger
Tick = Callable[[int], None]  # called with the bytes of each tensor that is done


def write_orbax(
    path: str | Path,
    source: Source,
    abstract: Mapping[str, Any],
    stacked: tuple[str, ...],
    *,
    dtype: Any = None,
    tick: Tick | None = None,
) -> None:
    """Write a tree as an Orbax checkpoint of single layers, one leaf in memory at a time.

    Args:
      path: folder to create.
      source: the weights.
      abstract: the tree's shapes.
      stacked: its stacked roots.
      dtype: type to write; None keeps each leaf's.
      tick: called after every leaf.

    Raises:
      WeightsError: the source lacks a leaf, or has a value that is not finite.
    """
    from clvr_jax.checkpoint import write_params

    plain = [
        (layer_path(path, stacked, layer) if layer is not None else path, path, layer)
        for path, layer, _ in leaves(abstract, stacked)
    ]

    def arrays() -> Iterator[tuple[str, np.ndarray]]:
        for name, leaf_path, layer in plain:
            array = _whole(_take(source, leaf_path, layer, dtype))
            yield name, array
            if tick is not None:
                tick(array.nbytes)
            del array
            source.release()

    write_params(path, arrays(), orbax_specs(source, abstract, stacked, dtype))


def write_mapped(
    path: str | Path,
    source: Source,
    table: Table,
    abstract: Mapping[str, Any],
    *,
    dtype: Any = None,
    max_shard_bytes: int | None = None,
    stem: str = "model",
    tick: Tick | None = None,
) -> None:
    """Write a tree as safetensors in the layout of a table, one tensor in memory at a time.

    Args:
      path: a folder, or a file that ends in `.safetensors`.
      source: the weights.
      table: rules of the layout.
      abstract: the tree's shapes.
      dtype: type to write; None keeps each tensor's.
      max_shard_bytes: size at which another file is begun, in a folder.
      stem: name of the files in a folder.
      tick: called after every tensor.

    Raises:
      WeightsError: the source lacks a leaf, or has a value that is not finite.
    """
    bound = Bound(table, abstract)

    def arrays() -> Iterator[tuple[str, np.ndarray]]:
        for entry in bound.entries:
            read = [_take(source, t.path, t.layer, dtype) for t in entry.targets]
            for name, tensor in entry.write(read):
                array = _whole(tensor)
                yield name, array
                if tick is not None:
                    tick(array.nbytes)
                del array, tensor
            del read
            source.release()
        for extra in table.extras:
            if extra.write is not None:
                yield extra.name, extra.write

    write_safetensors(
        path,
        mapped_specs(source, table, abstract, dtype),
        arrays(),
        metadata={"format": "pt"},  # transformers and diffusers refuse files without it
        max_shard_bytes=max_shard_bytes,
        stem=stem,
    )


def orbax_specs(
    source: Source, abstract: Mapping[str, Any], stacked: tuple[str, ...], dtype: Any = None
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Return shape and type of every leaf that `write_orbax` writes."""
    specs = {}
    for path, layer, shape in leaves(abstract, stacked):
        name = path if layer is None else layer_path(path, stacked, layer)
        specs[name] = (shape, np.dtype(dtype or source.read(path, layer).dtype))
    return specs


def mapped_specs(
    source: Source, table: Table, abstract: Mapping[str, Any], dtype: Any = None
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Return shape and type of every tensor that `write_mapped` writes."""
    specs = {}
    for entry in Bound(table, abstract).entries:
        types = [source.read(t.path, t.layer).dtype for t in entry.targets]
        kind = np.dtype(dtype or np.result_type(*types))
        specs |= {name: (entry.source_shape, kind) for name in entry.sources}
    extras = {e.name: e.write for e in table.extras if e.write is not None}
    return specs | {name: (value.shape, value.dtype) for name, value in extras.items()}


def _whole(array: Lazy) -> np.ndarray:
    """Put a leaf in C order, unless it is so large that the writer should copy block by block."""
    array = np.asarray(array)
    return array if array.nbytes > _LARGE else contiguous(array)


def _take(source: Source, path: str, layer: int | None, dtype: Any) -> np.ndarray:
    """Read a leaf in full, as it lies in memory, and cast; refuse values that are not finite."""
    array = np.asarray(source.read(path, layer))
    if dtype is not None and array.dtype != dtype:
        with np.errstate(over="ignore"):  # what overflows is refused below, by name
            array = array.astype(dtype)
    if not is_finite(array):
        raise source.non_finite(path, layer)
    return array
