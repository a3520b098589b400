"""Adapters merged into a transformer on disk, one layer of one leaf in memory at a time."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clvr_jax import lora
from clvr_jax.typing import Params
from clvr_jax.weights import WeightsError, is_finite
from conversion.check import check
from conversion.components import Component
from conversion.detect import MANIFEST, Found
from conversion.lazy import Lazy, Stored
from conversion.output import finish, free, room, write_conditioning
from conversion.progress import Progress
from conversion.sinks import write_mapped, write_orbax
from conversion.sources import Source, fingerprint


class MergedSource:
    """A checkpoint with `a @ b` added to its kernels in float32, rounded once.

    Args:
      base: the checkpoint.
      adapters: an adapter tree that fits it.
    """

    def __init__(self, base: Source, adapters: Params):
        self.base, self.path = base, base.path
        self._adapters = lora.pairs(adapters)

    def read(self, path: str, layer: int | None) -> Lazy:
        """Return a leaf; see `Source`."""
        leaf = self.base.read(path, layer)
        name, _, kind = path.rpartition("/")
        if kind != "kernel" or name not in self._adapters:
            return leaf
        a, b = (f if layer is None else f[layer] for f in self._adapters[name])
        lora.check(path, tuple(leaf.shape), a.shape, b.shape)

        def merged(index: tuple[slice, ...] | None) -> np.ndarray:
            index = index or (slice(None),) * len(leaf.shape)
            delta = np.tensordot(
                np.asarray(a[index[0]], np.float32), np.asarray(b[:, *index[1:]], np.float32), 1
            )
            with np.errstate(over="ignore"):  # what overflows is refused by name when written
                return np.add(leaf[index], delta, dtype=np.float32).astype(leaf.dtype)

        return Stored(leaf.shape, leaf.dtype, merged)

    def non_finite(self, path: str, layer: int | None) -> Exception:
        """Return the error that names a leaf with non-finite values; see `Source`."""
        if not is_finite(self.base.read(path, layer)):
            return self.base.non_finite(path, layer)
        name = path if layer is None else f"{path}, layer {layer}"
        return WeightsError("the merged weights", name, "values beyond its type", "finite values")

    def release(self) -> None:
        """Give back the memory of what was read."""
        self.base.release()

    def close(self) -> None:
        """Close the files; see `Source`."""
        self.base.close()


def write_merged(
    target: Path, found: Found, adapters: Params, progress: Progress, origin: str = ""
) -> None:
    """Copy a model as it is found, in its layout, with adapters merged into its transformer.

    The work is done in TARGET.partial, which becomes TARGET at the end and is removed if anything
    fails.

    Args:
      target: folder to create, or file if the model is a single file.
      found: the model; a pipeline's other components are copied.
      adapters: adapters of its transformer.
      progress: told of every tensor.
      origin: where the adapters come from, for the manifest.

    Raises:
      FileExistsError: the target exists.
      ValueError: the model has no transformer or is not complete, or adapters do not fit it.
      OSError: the disk is too small.
    """
    component = _transformer(found)
    single = found.path.is_file()
    if single != (target.suffix == ".safetensors"):
        expected = "a .safetensors file" if single else "a folder"
        raise ValueError(f"{found.path} is {found.kind}, so TARGET must be {expected}: {target}")
    partial = free(target)
    nbytes = _size(component.path)
    room(target, sum(_size(_place(part)) for part in found.components.values()))
    source = MergedSource(component.open(), adapters)
    try:
        partial.mkdir(parents=True)
        for name, part in found.components.items():
            if name != "transformer":
                _copy(_place(part), partial / _place(part).relative_to(found.path))
        write_conditioning(partial, found.manifest)
        for path in found.shared.values():
            _copy(path, partial / path.relative_to(found.path))
        progress.start("transformer", nbytes)
        _write(partial, found, component, source, progress)
        if "components" in found.manifest:
            manifest = _manifest(found.manifest, component, source, origin)
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        finish(partial, target)
    finally:
        progress.stop()
        source.close()
        shutil.rmtree(partial, ignore_errors=True)


def _transformer(found: Found) -> Component:
    """The transformer of what was found, if it is complete."""
    if "transformer" not in found.components:
        raise ValueError(f"{found.path} is a {found.kind} without a transformer to merge into")
    component = found.components["transformer"]
    if component.base is not None:
        raise ValueError(
            f"{found.path} is a {found.kind}; first: python -m conversion {found.path} TARGET"
        )
    source = component.open()
    result = check(component, source)
    source.close()
    if not result.ok:
        wrong = [f"missing: {x}" for x in result.missing]
        wrong += [f"unexpected: {x}" for x in result.unexpected] + result.wrong
        shown = "; ".join(wrong[:3])
        raise ValueError(f"{component.path} has {len(wrong)} tensors not as expected: {shown}")
    return component


def _write(
    partial: Path, found: Found, component: Component, source: MergedSource, progress: Progress
) -> None:
    """Write the transformer at the place where it was found."""
    abstract = component.abstract()
    place = partial / component.path.relative_to(found.path)
    if found.path.is_file():
        place = partial / found.path.name
    if component.path.is_file():
        table = component.table(component.layout)
        write_mapped(place, source, table, abstract, tick=progress.tick)
        return
    folder = place.parent if component.layout == "orbax" else place
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(component.config_text())
    for file in component.small_files():
        _copy(file, folder / file.name)
    if component.layout == "orbax":
        write_orbax(place, source, abstract, component.stacked, tick=progress.tick)
        return
    table, stem = component.table(component.layout), component.kind.stem
    write_mapped(
        place, source, table, abstract, max_shard_bytes=10**10, stem=stem, tick=progress.tick
    )


def _manifest(
    manifest: Mapping[str, Any], component: Component, source: MergedSource, origin: str
) -> dict[str, Any]:
    """The content of clvr.json, with the transformer's new fingerprint."""
    parts = manifest["components"]
    new = fingerprint(source, component.abstract(), component.stacked)
    transformer = {**parts["transformer"], "fingerprint": new}
    text = f"{manifest.get('source', '')} + {origin}"
    return {**manifest, "components": {**parts, "transformer": transformer}, "source": text}


def _place(component: Component) -> Path:
    """The folder or file of a component, with its small files."""
    return component.path.parent if component.layout == "orbax" else component.path


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _copy(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        shutil.copytree(path, target, copy_function=shutil.copyfile)
    else:
        shutil.copyfile(path, target)
