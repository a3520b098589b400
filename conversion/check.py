"""Names, shapes and types of a checkpoint compared with what its model needs, before any work."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clvr_jax.tree import layer_path
from conversion.components import KINDS, Component, recognise
from conversion.runs import RunSource, differences
from conversion.sources import MappedSource, OrbaxSource, Source, leaves

FLOATS = ("float32", "bfloat16", "float16", "float64")


@dataclasses.dataclass
class Check:
    """The comparison of one component.

    Attributes:
      matched: tensors that are as expected.
      missing: needed tensors that are not there, with their shape.
      unexpected: tensors that the model does not have.
      allowed: unexpected ones that the user named.
      wrong: lines about tensors of another shape, type or value than expected.
      notes: what the names look like instead, if anything.
    """

    matched: int = 0
    missing: list[str] = dataclasses.field(default_factory=list)
    unexpected: list[str] = dataclasses.field(default_factory=list)
    allowed: list[str] = dataclasses.field(default_factory=list)
    wrong: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether the component can be converted."""
        return not (self.missing or self.unexpected or self.wrong)


def check(component: Component, source: Source, allow: str = "") -> Check:
    """Compare a component's tensors with its model's.

    Args:
      component: what its config says.
      source: its opened checkpoint.
      allow: regular expression (re.search) of unexpected names to ignore; empty for none.
    """
    if component.base is not None:
        result = check(component.base, source.base, allow)
        if isinstance(source, RunSource):
            result.wrong += differences(component, source)
        return result
    if isinstance(source, OrbaxSource):
        needed = {
            path if layer is None else layer_path(path, component.stacked, layer): shape
            for path, layer, shape in leaves(component.abstract(), component.stacked)
        }
        found = {name: (tuple(s), d) for name, (s, d) in source.reader.specs.items()}
        return _compare(needed, found, lambda name: component.path, allow)
    infos = {short: source.reader.tensors[name] for short, name in source.names.items()}
    found = {name: (tuple(info.shape), info.dtype) for name, info in infos.items()}
    extras = {extra.name: extra for extra in source.bound.table.extras}
    kept = {name: spec for name, spec in found.items() if name not in extras}
    result = _compare(source.bound.shapes, kept, lambda name: infos[name].file, allow)
    if result.missing:
        _explain(component, found, result)
    elif not result.wrong:
        for name in found.keys() & extras.keys():
            result.wrong += _extra(source, infos[name].file, extras[name])
    return result


def check_together(components: Mapping[str, Component]) -> None:
    """Compare the widths at which components meet.

    Raises:
      ValueError: they belong to different models, e.g. a 9B transformer and a 4B text encoder.
    """
    configs = {name: component.config for name, component in components.items()}
    if configs.keys() >= {"transformer", "text_encoder"}:
        text = configs["text_encoder"]
        needs, gives = configs["transformer"].text_width, text.feature_width
        if needs != gives:
            raise ValueError(
                f"{components['transformer'].path} takes text features of width {needs}, "
                f"{components['text_encoder'].path} gives {gives} (its hidden states after "
                f"{text.features} layers, {text.width} wide); they belong to different models"
            )
    if configs.keys() >= {"transformer", "vae"}:
        needs, gives = configs["transformer"].channels, 4 * configs["vae"].latent_channels
        if needs != gives:
            raise ValueError(
                f"{components['transformer'].path} takes {needs} latent channels, "
                f"{components['vae'].path} gives {gives}; they belong to different models"
            )


def _compare(
    needed: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[tuple[int, ...], Any]],
    file: Callable[[str], Path],
    allow: str,
) -> Check:
    result = Check()
    for name, shape in needed.items():
        if name not in found:
            result.missing.append(f"{name}, expected shape {list(shape)}")
        elif found[name][0] != shape:
            result.wrong.append(
                f"{file(name)}: {name} has shape {list(found[name][0])}, expected {list(shape)}"
            )
        elif _type_name(found[name][1]) not in FLOATS:
            result.wrong.append(
                f"{file(name)}: {name} is {_type_name(found[name][1])}, expected one of "
                f"{', '.join(FLOATS)}; quantised weights are not converted, take the bfloat16 file"
            )
        else:
            result.matched += 1
    for name in found.keys() - needed.keys():
        accepted = allow and re.search(allow, name)
        (result.allowed if accepted else result.unexpected).append(
            f"{name} {list(found[name][0])} in {file(name).name}"
        )
    result.unexpected.sort()
    result.allowed.sort()
    return result


def _explain(component: Component, found: Mapping[str, Any], result: Check) -> None:
    """Say which model the names belong to, if it is another one."""
    other = recognise(found)
    if not found:
        result.notes.append(f"{component.path} holds no tensors")
    elif other and other != (component.name, component.layout):
        looks = KINDS[other[0]].layout_name(other[1])
        expected = component.kind.layout_name(component.layout)
        result.notes.append(
            f"{component.path} looks like a {other[0]} in {looks} layout, expected a "
            f"{component.name} in {expected} layout"
        )


def _extra(source: MappedSource, file: Path, extra: Any) -> list[str]:
    """Lines about a tensor outside our tree whose value cannot be dropped."""
    value = source.tensor(extra.name)
    lines = []
    if extra.zero and bool(np.any(value)):
        lines = [f"{file}: {extra.name} is not zero, expected zeros; {extra.zero}"]
    if extra.same_as:
        original = source.tensor(extra.same_as)
        same = value.shape == original.shape and value.dtype == original.dtype
        rows = range(0, len(value), 1024)
        if not (
            same and all(np.array_equal(value[i : i + 1024], original[i : i + 1024]) for i in rows)
        ):
            lines = [
                f"{file}: {extra.name} differs from {extra.same_as}, expected the same values, "
                "since config.json ties them"
            ]
    source.release()
    return lines


def _type_name(dtype: Any) -> str:
    """The name of a numpy type, or the file's own word for one that numpy has not."""
    try:
        return np.dtype(dtype).name
    except TypeError:
        return str(dtype)
