"""Rules between the tensors of a checkpoint file and our leaves, run in both directions.

A rule names tensors of the file (`{layer}` stands for the layer index) and the leaves that hold the
same numbers. Its einops pattern goes from the file's layout to one layer of our leaf; swapping the
sides inverts it. Several sources are equal parts of one array, joined along `axis`; several targets
are cut from that array in order along the same axis.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import einops
import numpy as np

from clvr_jax.tree import flatten, stacked_root
from conversion.lazy import Joined, Lazy


class TableError(ValueError):
    """A rule table does not cover a parameter tree exactly once."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """Tensors of a file and the leaves that hold the same numbers.

    Attributes:
      sources: a tensor name, or several that are equal parts along `axis`.
      targets: a path with `pattern`, or pairs (path, pattern) in the order of their parts.
      pattern: einops, file layout to leaf of one layer, when there is one target.
      axis: axis of the file's array along which parts follow one another.
      swap: axis of the leaf whose entries the file stores in reverse order.
    """

    sources: Any
    targets: Any
    pattern: str = ""
    axis: int = 0
    swap: str = ""

    def __post_init__(self):
        sources = (self.sources,) if isinstance(self.sources, str) else tuple(self.sources)
        targets = self.targets
        if isinstance(targets, str):
            targets = ((targets, self.pattern),)
        object.__setattr__(self, "sources", sources)
        object.__setattr__(self, "targets", tuple((path, Pattern(p)) for path, p in targets))
        if self.swap and len(sources) * len(self.targets) > 1:
            raise TableError(f"{sources[0]}: swap needs one source and one target")


@dataclasses.dataclass(frozen=True)
class Extra:
    """A tensor that files may hold and no leaf of ours does.

    Attributes:
      name: its name; `{layer}` is not expanded.
      zero: why any value but zero must be refused; empty to accept all.
      same_as: name of the tensor that it must equal.
      write: its value in the files we write, None to leave it out.
    """

    name: str
    zero: str = ""
    same_as: str = ""
    write: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """Every rule of one file layout.

    Attributes:
      rules: in the order in which files are written.
      stacked: roots of our tree whose leaves carry a leading layer axis.
      extras: tensors outside our tree that are accepted.
      prefixes: what files may put before every name.
      spellings: pairs of what some files begin a name with, and what the rules do.

    Raises:
      TableError: a source or a target occurs twice.
    """

    rules: tuple[Rule, ...]
    stacked: tuple[str, ...] = ()
    extras: tuple[Extra, ...] = ()
    prefixes: tuple[str, ...] = ()
    spellings: tuple[tuple[str, str], ...] = ()

    def __post_init__(self):
        sources = [s for rule in self.rules for s in rule.sources] + [e.name for e in self.extras]
        targets = [path for rule in self.rules for path, _ in rule.targets]
        for kind, names in (("source", sources), ("target", targets)):
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise TableError(f"{kind} used by more than one rule: {', '.join(twice)}")


class Pattern(str):
    """An einops pattern whose right side lists plain axes, e.g. `(part o) i -> i part o`."""

    def __init__(self, text: str):
        left, arrow, right = text.partition("->")
        self.leaf = tuple(right.split())
        groups = re.findall(r"\(([^)]*)\)|(\S+)", left)
        self.file = tuple((grouped or single).split() for grouped, single in groups)
        named = [axis for group in self.file for axis in group if axis != "1"]
        if not arrow or sorted(named) != sorted(set(self.leaf)) or len(named) != len(self.leaf):
            raise TableError(f"pattern {text!r}: needs the same named axes on both sides, once")
        self.inverse = f"{right.strip()} -> {left.strip()}"

    def file_shape(self, leaf_shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape in the file of a leaf of one layer."""
        sizes = {"1": 1, **dict(zip(self.leaf, leaf_shape))}
        return tuple(math.prod(sizes[axis] for axis in group) for group in self.file)


@dataclasses.dataclass(frozen=True)
class Target:
    """One layer of a leaf as part of an entry's array: [start, stop) along the entry's axis."""

    path: str
    layer: int | None
    pattern: Pattern
    shape: tuple[int, ...]
    start: int
    stop: int

    def from_file(self, array: np.ndarray) -> np.ndarray:
        """Return a piece of the file's array in our layout (a view where numpy can)."""
        # the first axis of the joined group is left to be inferred: a piece holds part of it
        sizes = dict(zip(self.pattern.leaf, self.shape))
        first = {group[0] for group in self.pattern.file}
        known = {axis: n for axis, n in sizes.items() if axis not in first}
        return einops.rearrange(array, self.pattern, **known)

    def to_file(self, leaf: np.ndarray) -> np.ndarray:
        """Return a leaf of one layer in the file's layout (a view where numpy can)."""
        return einops.rearrange(leaf, self.pattern.inverse)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A rule at one layer, with shapes."""

    sources: tuple[str, ...]
    source_shape: tuple[int, ...]
    targets: tuple[Target, ...]
    axis: int
    swap: str

    def read(self, target: Target, tensor: Mapping[str, np.ndarray] | Any) -> Lazy:
        """Return a target, given `tensor(name)`; nothing is copied before it is indexed."""
        width = self.source_shape[self.axis]
        pieces = []
        for i, name in enumerate(self.sources):
            start = max(target.start - i * width, 0)
            stop = min(target.stop - i * width, width)
            if start < stop:
                index = (slice(None),) * self.axis + (slice(start, stop),)
                pieces.append(target.from_file(tensor(name)[index]))
        if len(pieces) > 1:
            leaf_axis = target.pattern.leaf.index(target.pattern.file[self.axis][0])
            return Joined(pieces, leaf_axis)
        return self._swapped(pieces[0], target)

    def write(self, leaves: Sequence[np.ndarray]) -> Iterator[tuple[str, Lazy]]:
        """Yield every source, given its targets in order; the inverse of `read`."""
        parts = [
            target.to_file(self._swapped(leaf, target))
            for target, leaf in zip(self.targets, leaves)
        ]
        width = self.source_shape[self.axis]
        for i, name in enumerate(self.sources):
            pieces = []
            for target, part in zip(self.targets, parts):
                start = max(i * width - target.start, 0)
                stop = min((i + 1) * width, target.stop) - target.start
                if start < stop:
                    pieces.append(part[(slice(None),) * self.axis + (slice(start, stop),)])
            yield name, pieces[0] if len(pieces) == 1 else Joined(pieces, self.axis)

    def _swapped(self, leaf: np.ndarray, target: Target) -> np.ndarray:
        return np.flip(leaf, target.pattern.leaf.index(self.swap)) if self.swap else leaf


class Bound:
    """A table with the shapes of one parameter tree.

    Attributes:
      table: the table.
      entries: every rule at every layer, in file order.
      shapes: shape of every tensor of the file, required ones only.

    Raises:
      TableError: a leaf has no rule, a rule has no leaf, or sizes do not divide.
    """

    def __init__(self, table: Table, abstract: Mapping[str, Any]):
        self.table = table
        flat = {path: tuple(leaf.shape) for path, leaf in flatten(abstract).items()}
        ruled = {path for rule in table.rules for path, _ in rule.targets}
        for problem, paths in (
            ("no rule for", flat.keys() - ruled),
            ("no leaf", ruled - flat.keys()),
        ):
            if paths:
                raise TableError(f"{problem} {', '.join(sorted(paths))}")
        self.entries = tuple(
            entry for rule in table.rules for entry in _expand(rule, flat, table.stacked)
        )
        self.shapes = {name: e.source_shape for e in self.entries for name in e.sources}
        if len(self.shapes) != sum(len(entry.sources) for entry in self.entries):
            raise TableError("expanding {layer} gives one tensor name twice")
        self._by_target = {
            (target.path, target.layer): (entry, target)
            for entry in self.entries
            for target in entry.targets
        }

    def at(self, path: str, layer: int | None) -> tuple[Entry, Target]:
        """Return the entry and the target of one layer of a leaf.

        Raises:
          KeyError: the tree has no such leaf or layer.
        """
        return self._by_target[path, layer]


def _expand(rule: Rule, flat: Mapping[str, tuple[int, ...]], stacked: Sequence[str]) -> list[Entry]:
    """One entry, or one for each layer of a stacked rule."""
    roots = {stacked_root(path, tuple(stacked)) for path, _ in rule.targets}
    layered = ["{layer}" in name for name in rule.sources]
    if len(roots) > 1 or any(named == (roots == {None}) for named in layered):
        raise TableError(f"{rule.sources[0]}: {{layer}} belongs in rules of stacked leaves, only")
    if roots == {None}:
        return [_entry(rule, None, [flat[path] for path, _ in rule.targets])]
    counts = {flat[path][0] for path, _ in rule.targets}
    if len(counts) > 1:
        raise TableError(f"{rule.sources[0]}: its leaves have {sorted(counts)} layers")
    shapes = [flat[path][1:] for path, _ in rule.targets]
    return [_entry(rule, layer, shapes) for layer in range(counts.pop())]


def _entry(rule: Rule, layer: int | None, shapes: Sequence[tuple[int, ...]]) -> Entry:
    axis, targets, start, others = rule.axis, [], 0, set()
    for (path, pattern), shape in zip(rule.targets, shapes):
        if len(shape) != len(pattern.leaf):
            raise TableError(f"{path} {shape} does not have the axes of {str(pattern)!r}")
        in_file = list(pattern.file_shape(shape))
        stop = start + in_file[axis]
        targets.append(Target(path, layer, pattern, shape, start, stop))
        start = stop
        others.add(tuple(in_file[:axis] + in_file[axis + 1 :]))
    if len(others) > 1 or start % len(rule.sources):
        raise TableError(f"{rule.sources[0]}: the parts {shapes} do not fit together")
    shape = list(in_file)
    shape[axis] = start // len(rule.sources)
    names = tuple(name.replace("{layer}", str(layer)) for name in rule.sources)
    entry = Entry(names, tuple(shape), tuple(targets), axis, rule.swap)
    if len(names) > 1:
        for target in targets:  # a cut must fall between entries of the group's first axis
            group = target.pattern.file[axis]
            step = math.prod(dict(zip(target.pattern.leaf, target.shape))[a] for a in group[1:])
            if shape[axis] % step:
                raise TableError(f"{names[0]}: {len(names)} parts cut {target.path} inside {group}")
    return entry


def file_specs(table: Table, abstract: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor of a file we write, extras included.

    Raises:
      TableError: the table does not fit the tree.
    """
    extras = {e.name: e.write.shape for e in table.extras if e.write is not None}
    return {**Bound(table, abstract).shapes, **extras}
