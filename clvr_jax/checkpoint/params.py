"""Orbax checkpoints: parameters streamed leaf by leaf, whole trees restored onto any mesh.

`write_params` lays a checkpoint out as Orbax itself does with `use_ocdbt=False` and
`use_compression=False`: a zarr array of plain chunks for each leaf, which plain Orbax restores and
which can be mapped instead of read. Weights hardly compress.
"""

import json
import time
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from clvr_jax.tree import differences, unflatten
from clvr_jax.typing import Params
from clvr_jax.weights.header import WeightsError, nbytes, parse_json
from clvr_jax.weights.staging import staging, sync
from clvr_jax.weights.writer import Specs, checked
from clvr_jax.weights.zarr import AGAIN, open_array, select, write_array

_ARRAYS = ("np.ndarray", "jax.Array", "scalar")
_HANDLER = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"


def write_params(
    path: str | Path,
    leaves: Iterable[tuple[str, np.ndarray]],
    specs: Specs,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write parameters as an Orbax checkpoint, one leaf in memory at a time.

    After an error nothing is left. Orbax restores the leaves as numpy arrays, or as what it is
    given: sharded `jax.Array`.

    Args:
      path: the folder to make.
      leaves: every leaf of `specs` once, in any order, by its path in the tree ("a/b").
      specs: shape and type of every leaf.
      metadata: values for JSON, to be had from `ParamsReader.metadata` and from Orbax.

    Raises:
      WeightsError: `path` exists, the disk has too little room, or a leaf is missing, unexpected,
        given twice or not as `specs` say.
    """
    path = Path(path)
    _refuse_existing(path)
    specs = {name: (tuple(shape), np.dtype(dtype)) for name, (shape, dtype) in specs.items()}
    header = json.dumps(_tree_metadata(specs, None if metadata is None else dict(metadata)))
    size = sum(nbytes(*spec) for spec in specs.values())
    started = time.time_ns()
    with staging(path, size, folder=True) as temporary:
        for name, array in checked(path, specs, leaves):
            write_array(temporary / name.replace("/", "."), array)
        texts = {
            "_METADATA": header,
            "_CHECKPOINT_METADATA": json.dumps(_step_metadata(started)),
            # object stores have no rename: there Orbax takes this file as the sign of completeness
            "commit_success.txt": f"Checkpoint commit was successful to {path.name}",
        }
        for name, text in texts.items():
            (temporary / name).write_text(text)
            sync(temporary / name)


class ParamsReader:
    """The leaves of an Orbax checkpoint of arrays, read one by one.

    Attributes:
      path: the checkpoint's folder.
      specs: shape and type of every leaf by its path in the tree ("a/b").
      metadata: what the checkpoint's writer added.

    Args:
      path: a folder by `write_params`, `save` or Orbax.

    Raises:
      WeightsError: the folder holds no such checkpoint, or lacks one of its leaves.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        header, folders = _read_metadata(self.path)
        self.metadata: dict[str, Any] = header.get("custom_metadata") or {}
        dialect = {"ocdbt": bool(header.get("use_ocdbt")), "zarr3": bool(header.get("use_zarr3"))}
        self._leaves = {
            name: open_array(self.path, folder, **dialect) for name, folder in folders.items()
        }
        self.specs = {name: (leaf.shape, leaf.dtype) for name, leaf in self._leaves.items()}

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """Return a leaf, or the part of it that one slice for each axis (of step 1) selects.

        The array is read-only. A leaf that is stored plainly in one piece is a view of its file,
        whose pages come in as they are touched and go with the array.

        Raises:
          WeightsError: there is no such leaf, or its data is missing or damaged.
        """
        if name not in self._leaves:
            near = ", ".join(get_close_matches(name, self._leaves, 3)) or "none alike"
            expected = f"one of its {len(self._leaves)} leaves ({near})"
            raise WeightsError(self.path, name, "no such leaf", expected)
        leaf = self._leaves[name]
        ranges = select(index, leaf.shape)
        try:
            out = leaf.read(ranges)
        except (OSError, ValueError) as error:
            found, expected = f"damaged or missing data ({error})", f"{leaf.dtype} {leaf.shape}"
            raise WeightsError(self.path, name, found, expected, AGAIN) from error
        out.flags.writeable = False
        return out


def save(path: str | Path, tree: Params) -> None:
    """Save a tree of arrays, however they are sharded; every process of a cluster calls this.

    Raises:
      WeightsError: `path` exists.
    """
    import orbax.checkpoint as ocp

    path = Path(path).absolute()
    _refuse_existing(path)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def restore(path: str | Path, abstract: Params) -> Params:
    """Return a saved tree as `abstract` asks for it: types and shardings may differ from the saved.

    Args:
      path: a folder by `save`, `write_params` or Orbax.
      abstract: a tree of `jax.ShapeDtypeStruct`; their `sharding` may be of any mesh.

    Raises:
      WeightsError: the folder holds no checkpoint, or a tree of other names or shapes.
    """
    import jax
    import orbax.checkpoint as ocp

    saved = {name: jax.ShapeDtypeStruct(*spec) for name, spec in ParamsReader(path).specs.items()}
    if lines := differences(unflatten(saved), abstract):
        more = f" and {len(lines) - 5} more" if len(lines) > 5 else ""
        raise WeightsError(path, None, "; ".join(lines[:5]) + more, "the tree that was asked for")
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(Path(path).absolute(), abstract)


def _read_metadata(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The contents of `_METADATA`, and the name in storage of every array by its path."""
    file = folder / "_METADATA"
    if not file.is_file():
        found = "no _METADATA" if folder.is_dir() else "no folder"
        inside = sorted(other.parent.name for other in folder.glob("*/_METADATA"))
        advice = f"give one of its folders: {', '.join(inside)}" if inside else ""
        raise WeightsError(folder, None, found, "a checkpoint written by Orbax", advice)
    header = parse_json(file, file.read_bytes(), "no JSON", AGAIN)
    folders = {}
    try:
        for entry in header["tree_metadata"].values():
            keys = [key["key"] for key in entry["key_metadata"]]
            if entry["value_metadata"]["value_type"] in _ARRAYS:  # else an empty node, or text
                folders["/".join(keys)] = ".".join(keys)
    except (KeyError, TypeError, AttributeError) as error:
        found = f"no names of leaves ({error!r})"
        raise WeightsError(file, None, found, "tree_metadata as Orbax writes it", AGAIN) from error
    return header, folders


def _tree_metadata(names: Iterable[str], custom: dict[str, Any] | None) -> dict[str, Any]:
    """The contents of `_METADATA`, equal to those that Orbax 0.12 writes."""
    tree = {}
    for name in names:
        keys = name.split("/")
        tree[str(tuple(keys))] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in keys],  # 2: key of a dict
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
    return {
        "tree_metadata": tree,
        "use_ocdbt": False,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": custom,
    }


def _step_metadata(started: int) -> dict[str, Any]:
    """The contents of `_CHECKPOINT_METADATA`, which lets Orbax choose the handler by itself."""
    return {
        "item_handlers": _HANDLER,
        "metrics": {},
        "performance_metrics": {},
        "init_timestamp_nsecs": started,
        "commit_timestamp_nsecs": time.time_ns(),
        "custom_metadata": {},
    }


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise WeightsError(path, None, "something there", "nothing", "remove it or write elsewhere")
