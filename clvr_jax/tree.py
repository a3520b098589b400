"""Nested dicts of arrays seen as flat maps from path to leaf, and what can be said of them."""

import math
import re
from collections.abc import Mapping
from typing import Any

from clvr_jax.typing import Params


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return `{"a/b": leaf}` in insertion order for a nested dict."""
    flat = {}
    for name, value in tree.items():
        path = f"{prefix}/{name}" if prefix else name
        if isinstance(value, Mapping):
            flat.update(flatten(value, path))
        else:
            flat[path] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> Params:
    """Return the nested dict of a flat map; the inverse of `flatten`."""
    tree: Params = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def partition(flat: Mapping[str, Any], pattern: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a flat map into the paths that `pattern` (re.search) matches and the others."""
    regex = re.compile(pattern)
    inside = {path: leaf for path, leaf in flat.items() if regex.search(path)}
    outside = {path: leaf for path, leaf in flat.items() if path not in inside}
    return inside, outside


def count(tree: Mapping[str, Any]) -> int:
    """Return the number of scalars in all leaves."""
    return sum(math.prod(leaf.shape) for leaf in flatten(tree).values())


def nbytes(tree: Mapping[str, Any]) -> int:
    """Return the bytes that all leaves occupy."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in flatten(tree).values())


def differences(given: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Return readable lines, one for each missing, unexpected or wrongly shaped leaf."""
    ours, theirs = flatten(given), flatten(expected)
    lines = [f"missing: {path} {theirs[path].shape}" for path in theirs if path not in ours]
    lines += [f"unexpected: {path} {ours[path].shape}" for path in ours if path not in theirs]
    lines += [
        f"shape: {path} is {ours[path].shape}, expected {theirs[path].shape}"
        for path in theirs
        if path in ours and tuple(ours[path].shape) != tuple(theirs[path].shape)
    ]
    return lines


def layer_path(path: str, stacked: tuple[str, ...], layer: int) -> str:
    """Return the path of one layer of a stacked leaf: `blocks/qkv` becomes `blocks/3/qkv`.

    Raises:
      ValueError: `path` lies under none of the roots in `stacked`.
    """
    root = stacked_root(path, stacked)
    if root is None:
        raise ValueError(f"{path} lies under none of the stacked roots {stacked}")
    return f"{root}/{layer}{path[len(root) :]}"


def stacked_root(path: str, stacked: tuple[str, ...]) -> str | None:
    """Return the root in `stacked` that `path` lies under, or None for an unstacked leaf."""
    return next((root for root in stacked if path.startswith(root + "/")), None)
