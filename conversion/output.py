"""The place a conversion writes to: names, room on the disk, what is no tensor."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conversion.components import KINDS, Component
from conversion.detect import CONDITIONING, INDEX, MANIFEST, Found

_NEEDED_BY = {"tokenizer": "text_encoder", "scheduler": "transformer"}


def free(target: Path) -> Path:
    """Return the folder to work in; refuse to touch what exists."""
    partial = target.with_name(target.name + ".partial")
    for path, why in ((target, "the target exists"), (partial, "left by an interrupted run")):
        if path.exists() or path.is_symlink():
            raise FileExistsError(f"{path}: {why}; remove it or name another target")
    return partial


def room(target: Path, nbytes: int) -> None:
    """Refuse to begin what the disk cannot hold."""
    place = next(path for path in target.absolute().parents if path.exists())
    free, needed = shutil.disk_usage(place).free, int(nbytes * 1.02) + 2**24
    if free < needed:
        raise OSError(
            f"{target} needs {needed / 1e9:.2f} GB, {place} has {free / 1e9:.2f} GB free; free "
            "some space or name a target on another disk"
        )


def finish(partial: Path, target: Path) -> None:
    """Give the finished work its name."""
    if target.suffix == ".safetensors":
        (only,) = partial.iterdir()
        os.replace(only, target)
    else:
        os.replace(partial, target)


def bfl_name(component: Component, found: Found) -> str:
    """The name under which BFL publishes such a file."""
    if component.name == "vae":
        return "ae.safetensors"
    index = found.shared.get(INDEX)
    size = {"klein_4b": "4b", "klein_9b": "9b"}.get(component.variant)
    if index is None or size is None:
        return "flux-2-klein.safetensors"
    values = json.loads(index.read_text())
    if values.get("_class_name") == "Flux2KleinKVPipeline":
        return f"flux-2-klein-{size}-kv.safetensors"
    return f"flux-2-klein-{'' if values.get('is_distilled') else 'base-'}{size}.safetensors"


def write_conditioning(folder: Path, known: Mapping[str, Any]) -> None:
    """Write how the inputs of weights are made, where that is known."""
    conditioning = known.get("conditioning")
    if conditioning is not None:
        (folder / CONDITIONING).write_text(json.dumps(conditioning, indent=2) + "\n")


def write_rest(
    folder: Path,
    found: Found,
    chosen: dict[str, Component],
    to: str,
    manifest: dict[str, Any],
    source: str,
) -> None:
    """Copy what is no tensor, and write clvr.json."""
    if to == "bfl":
        return
    for name, path in found.shared.items():
        if name == INDEX:
            listed = json.loads(path.read_text())
            if all(name in chosen for name in KINDS if (listed.get(name) or [None])[0]):
                shutil.copyfile(path, folder / name)
        elif _NEEDED_BY[name] in chosen:
            shutil.copytree(path, folder / name, copy_function=shutil.copyfile)
    if "transformer" in chosen:
        write_conditioning(folder, found.manifest)
    if to == "orbax":
        content = {"format": 1, "components": manifest, "source": source}
        (folder / MANIFEST).write_text(json.dumps(content, indent=2) + "\n")
