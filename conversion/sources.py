"""Checkpoints seen in our names and layouts, read lazily one layer at a time."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from clvr_jax.tree import flatten, layer_path, stacked_root
from clvr_jax.weights import SafetensorsReader, WeightsError, is_finite
from conversion.lazy import Lazy, Stored, contiguous
from conversion.rules import Bound, Table


class Source(Protocol):
    """A checkpoint in our names and layouts.

    Attributes:
      path: where it is, for messages.
    """

    path: Path | str

    def read(self, path: str, layer: int | None) -> Lazy:
        """Return one layer of a stacked leaf, or an unstacked leaf with `layer` None.

        Raises:
          WeightsError: the checkpoint does not hold it.
        """
        ...

    def non_finite(self, path: str, layer: int | None) -> WeightsError:
        """Return the error that names the tensor of a leaf with non-finite values."""
        ...

    def release(self) -> None:
        """Give back the memory of what was read."""
        ...

    def close(self) -> None:
        """Close the files; leaves that were read must not be used any more."""
        ...


class Together:
    """Several checkpoints as one, each under a root of its own.

    Args:
      parts: checkpoints by root.
    """

    def __init__(self, parts: Mapping[str, Source]):
        self._parts, self.path = parts, next(iter(parts.values())).path

    def read(self, path: str, layer: int | None) -> Lazy:
        """Return a leaf; see `Source`."""
        root, rest = path.split("/", 1)
        return self._parts[root].read(rest, layer)

    def non_finite(self, path: str, layer: int | None) -> WeightsError:
        """Return the error that names a leaf with non-finite values; see `Source`."""
        root, rest = path.split("/", 1)
        return self._parts[root].non_finite(rest, layer)

    def release(self) -> None:
        """Give back the memory of what was read."""
        for part in self._parts.values():
            part.release()

    def close(self) -> None:
        """Close the files; see `Source`."""
        for part in self._parts.values():
            part.close()


class MappedSource:
    """Safetensors files through a rule table; leaves are views of the mapped files.

    Attributes:
      names: the name in the files of every tensor, by the table's name.

    Args:
      reader: the files.
      table: rules of their layout.
      abstract: our tree with the shapes that the files hold.
    """

    def __init__(self, reader: SafetensorsReader, table: Table, abstract: Mapping[str, Any]):
        self.reader, self.path = reader, reader.path
        self.bound = Bound(table, abstract)
        self.names = strip(reader.tensors, table.prefixes, table.spellings)

    def read(self, path: str, layer: int | None) -> Lazy:
        """Return a leaf; see `Source`."""
        entry, target = self.bound.at(path, layer)
        for name in entry.sources:
            self._expect(name, entry.source_shape)
        return entry.read(target, self.tensor)

    def non_finite(self, path: str, layer: int | None) -> WeightsError:
        """Return the error that names the tensor of a leaf with non-finite values."""
        for name in self.bound.at(path, layer)[0].sources:
            tensor = self.tensor(name)
            if not is_finite(tensor):
                break
        return WeightsError(
            self.reader.tensors[self.names[name]].file, name, _non_finite(tensor), "finite values"
        )

    def tensor(self, name: str) -> np.ndarray:
        """Return a file's tensor by the table's name, as a view."""
        return self.reader.read(self.names[name])

    def release(self) -> None:
        """Give back the memory of what was read."""
        self.reader.release()

    def close(self) -> None:
        """Close the files; see `Source`."""
        self.reader.close()

    def _expect(self, name: str, shape: tuple[int, ...]) -> None:
        info = self.reader.tensors.get(self.names.get(name, ""))
        if info is None:
            raise WeightsError(self.reader.path, name, "no such tensor", f"shape {shape}")
        if tuple(info.shape) != shape:
            raise WeightsError(info.file, name, f"shape {tuple(info.shape)}", f"shape {shape}")


class OrbaxSource:
    """A converted component: Orbax leaves, one for each layer."""

    def __init__(self, path: str | Path, stacked: tuple[str, ...]):
        from clvr_jax.checkpoint import ParamsReader

        self.path, self.stacked = Path(path), stacked
        self.reader = ParamsReader(path)

    def read(self, path: str, layer: int | None) -> Lazy:
        """Return a leaf; see `Source`."""
        name = self._name(path, layer)
        if name not in self.reader.specs:
            raise WeightsError(self.path, name, "no such leaf", "one of the model's leaves")
        shape, dtype = self.reader.specs[name]
        return Stored(shape, dtype, lambda index: self.reader.read(name, index))

    def non_finite(self, path: str, layer: int | None) -> WeightsError:
        """Return the error that names a leaf with non-finite values."""
        name = self._name(path, layer)
        found = _non_finite(self.reader.read(name))
        return WeightsError(self.path, name, found, "finite values")

    def _name(self, path: str, layer: int | None) -> str:
        return path if layer is None else layer_path(path, self.stacked, layer)

    def release(self) -> None:
        """Nothing is kept between reads."""

    def close(self) -> None:
        """Nothing is kept open."""


class TreeSource:
    """Parameters in memory, stacked as the models take them."""

    path = "parameters in memory"

    def __init__(self, params: Mapping[str, Any]):
        self.leaves = flatten(params)

    def read(self, path: str, layer: int | None) -> Lazy:
        """Return a leaf; see `Source`."""
        if path not in self.leaves:
            raise WeightsError(self.path, path, "no such leaf", "the model's leaf")
        leaf = self.leaves[path]
        return np.asarray(leaf if layer is None else leaf[layer])

    def non_finite(self, path: str, layer: int | None) -> WeightsError:
        """Return the error that names a leaf with non-finite values."""
        name = path if layer is None else f"{path}, layer {layer}"
        found = _non_finite(self.read(path, layer))
        return WeightsError(self.path, name, found, "finite values")

    def release(self) -> None:
        """The arrays belong to the caller."""

    def close(self) -> None:
        """The arrays belong to the caller."""


def leaves(
    abstract: Mapping[str, Any], stacked: tuple[str, ...]
) -> Iterator[tuple[str, int | None, tuple[int, ...]]]:
    """Yield (path, layer, shape of one layer) of a tree, layer by layer within each stacked root.

    Leaves that one tensor of a file may hold together follow one another.
    """
    flat = flatten(abstract)
    for path, leaf in flat.items():
        if stacked_root(path, stacked) is None:
            yield path, None, tuple(leaf.shape)
    for root in stacked:
        inside = {p: tuple(leaf.shape) for p, leaf in flat.items() if p.startswith(root + "/")}
        for layer in range(max((shape[0] for shape in inside.values()), default=0)):
            for path, shape in inside.items():
                if layer < shape[0]:
                    yield path, layer, shape[1:]


def fingerprint(
    source: Source, abstract: Mapping[str, Any], stacked: tuple[str, ...], dtype: Any = None
) -> str:
    """Return 12 hex characters that name a set of weights, whatever the layout it is stored in.

    A digest of path, shape, type and two corners of every layer's leaf, so nothing is read in full.
    `dtype` is what the weights are about to be cast to.
    """
    lines = []
    for path, layer, shape in leaves(abstract, stacked):
        leaf = source.read(path, layer)
        corners = [
            contiguous(leaf[tuple(slice(0, 4) for _ in shape)], dtype),
            contiguous(leaf[tuple(slice(max(n - 4, 0), n) for n in shape)], dtype),
        ]
        digest = hashlib.sha256(b"".join(corner.tobytes() for corner in corners)).hexdigest()
        lines.append(f"{path} {layer} {shape} {corners[0].dtype} {digest}")
    source.release()
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:12]


def strip(
    names: Any, prefixes: tuple[str, ...], spellings: tuple[tuple[str, str], ...] = ()
) -> dict[str, str]:
    """Return {name without its prefix and as the rules spell it: name}.

    Raises:
      ValueError: two names come to the same.
    """
    stripped: dict[str, str] = {}
    for name in names:
        prefix = next((p for p in prefixes if name.startswith(p)), "")
        short = name[len(prefix) :]
        theirs, ours = next((s for s in spellings if short.startswith(s[0])), ("", ""))
        short = ours + short[len(theirs) :]
        if short in stripped:
            raise ValueError(f"{name} and {stripped[short]} are the same tensor under two names")
        stripped[short] = name
    return stripped


def _non_finite(array: np.ndarray) -> str:
    bad = ~np.isfinite(array)
    index = np.unravel_index(int(np.argmax(bad)), bad.shape)
    if not bad[index]:
        return "values too large for the type to write"
    return f"{array[index]} at {[int(i) for i in index]}, {int(bad.sum())} such values"
