"""A conversion from what was found to a new folder or file: check all, write all, then rename."""

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clvr_jax.tree import count
from clvr_jax.weights import WeightsError
from conversion.check import check, check_together
from conversion.components import KINDS, Component
from conversion.detect import ORBAX, Found, find, single
from conversion.output import bfl_name, finish, free, room, write_rest
from conversion.progress import Progress
from conversion.report import ComponentReport
from conversion.sinks import mapped_specs, orbax_specs, write_mapped, write_orbax
from conversion.sources import fingerprint


class ConversionError(ValueError):
    """Tensors are missing, unexpected, wrong or not finite.

    Attributes:
      reports: what was found of each component.
    """

    def __init__(self, message: str, reports: Sequence[ComponentReport]):
        super().__init__(message)
        self.reports = list(reports)


@dataclasses.dataclass(frozen=True)
class Options:
    """What to convert, and how.

    Attributes:
      source: a path or a repository id.
      target: folder or file to create.
      to: "orbax", "bfl", or a folder: "diffusers" of all components, "transformers" of those that
        transformers loads; None for orbax, or diffusers from a converted folder.
      components: those to convert; None for all that are found.
      dtype: type to write; None keeps each tensor's.
      allow_unexpected: regular expression of tensors that may be left behind.
      max_shard_gb: size of a safetensors file in a diffusers folder, in 10^9 bytes.
      base: where the rest of a pipeline comes from when the source is single files.
    """

    source: str
    target: Path
    to: str | None = None
    components: tuple[str, ...] | None = None
    dtype: str | None = None
    allow_unexpected: str = ""
    max_shard_gb: float = 5.0
    base: str | None = None


def convert(options: Options, progress: Progress) -> list[ComponentReport]:
    """Convert, and return a report for each component.

    Nothing is written before every name and shape of every component has been checked; the work is
    done in TARGET.partial, which becomes TARGET at the end and is removed if anything fails.

    Raises:
      ConversionError: tensors are missing, unexpected, of another shape, or not finite.
      WeightsError: a file is broken.
      FileNotFoundError, FileExistsError, ValueError, OSError: of the arguments; see the text.
    """
    partial = free(options.target)
    found = gather(options)
    converted = any(part.layout == "orbax" for part in found.components.values())
    to = options.to or ("diffusers" if converted else "orbax")
    chosen = _chosen(found, to, options)
    to = "diffusers" if to == "transformers" else to  # folders of one layout
    check_together(chosen)
    with contextlib.ExitStack() as stack:
        sources = {}
        for name, component in chosen.items():
            sources[name] = component.open()
            stack.callback(sources[name].close)
        reports = examine(chosen, sources, to, options)
        if not all(report.check.ok for report in reports):
            raise ConversionError("nothing was written: the tensors are not as expected", reports)
        room(options.target, sum(report.nbytes for report in reports))
        try:
            partial.mkdir(parents=True)
            manifest = {}
            for report in reports:
                component, source = chosen[report.name], sources[report.name]
                progress.start(report.name, report.nbytes)
                begun = time.monotonic()
                _write(component, source, partial, to, found, options, progress)
                report.seconds = time.monotonic() - begun
                progress.stop()
                if to == "orbax":
                    manifest[report.name] = _describe(component, source, report, options.dtype)
            write_rest(partial, found, chosen, to, manifest, options.source)
            finish(partial, options.target)
        except WeightsError as error:
            raise ConversionError(f"nothing was written: {error}", reports) from error
        finally:
            progress.stop()
            shutil.rmtree(partial, ignore_errors=True)
    return reports


def inspect(options: Options) -> tuple[Found, list[ComponentReport], dict[str, str]]:
    """Return what a source holds, its comparison, and fingerprints of what can be converted.

    Raises:
      WeightsError: a file is broken.
      FileNotFoundError, ValueError, OSError: as `conversion.detect.find`.
    """
    found, prints = gather(options), {}
    with contextlib.ExitStack() as stack:
        sources = {}
        for name, component in found.components.items():
            sources[name] = component.open()
            stack.callback(sources[name].close)
        reports = examine(found.components, sources, None, options)
        for report in reports:
            if report.check.ok:
                component = found.components[report.name]
                prints[report.name] = fingerprint(
                    sources[report.name], component.abstract(), component.stacked
                )
    return found, reports, prints


def gather(options: Options) -> Found:
    """Return what the source holds, completed by what the base holds.

    Raises:
      As `conversion.detect.find`.
    """
    if not options.base:
        return find(options.source, options.components)
    held = single(options.source)
    lacking = [n for n in options.components or KINDS if n not in held]
    base = find(options.base, lacking, complete=False)
    found = find(options.source, options.components, base)
    return dataclasses.replace(
        found,
        components={**base.only(lacking), **found.components},
        shared={**base.shared, **found.shared},
    )


def examine(
    chosen: dict[str, Component], sources: dict[str, Any], to: str | None, options: Options
) -> list[ComponentReport]:
    """Return a report for each component, with the bytes it will take in layout `to`, if any."""
    reports = []
    for name, component in chosen.items():
        result = check(component, sources[name], options.allow_unexpected)
        layouts = component.kind.layout_name(component.layout)
        layouts += f" -> {component.kind.layout_name(to)}" if to else ""
        abstract = component.abstract()
        report = ComponentReport(name, component.path, layouts, result, count(abstract), "-")
        if result.ok:
            specs = _specs(component, sources[name], to, options.dtype)
            sizes = {n: (int(np.prod(s)), d.itemsize) for n, (s, d) in specs.items()}
            report.nbytes = sum(n * width for n, width in sizes.values())
            report.dtype = ",".join(sorted({d.name for _, d in specs.values() if d.kind != "i"}))
        reports.append(report)
    return reports


def _specs(component: Component, source: Any, to: str | None, dtype: str | None) -> dict:
    if to in ("diffusers", "bfl"):
        return mapped_specs(source, component.table(to), component.abstract(), dtype)
    return orbax_specs(source, component.abstract(), component.stacked, dtype)


def _write(
    component: Component,
    source: Any,
    folder: Path,
    to: str,
    found: Found,
    options: Options,
    progress: Progress,
) -> None:
    """Write one component's tensors and small files."""
    abstract, dtype = component.abstract(), options.dtype
    if to == "bfl":
        file = folder / bfl_name(component, found)
        table = component.table("bfl")
        write_mapped(file, source, table, abstract, dtype=dtype, tick=progress.tick)
        return
    place = folder / component.name
    place.mkdir()
    (place / "config.json").write_text(component.config_text(dtype))
    for extra in component.small_files():
        shutil.copyfile(extra, place / extra.name)
    if to == "orbax":
        write_orbax(
            place / ORBAX, source, abstract, component.stacked, dtype=dtype, tick=progress.tick
        )
        return
    write_mapped(
        place,
        source,
        component.table("diffusers"),
        abstract,
        dtype=dtype,
        max_shard_bytes=int(options.max_shard_gb * 1e9),
        stem=component.kind.stem,
        tick=progress.tick,
    )


def _describe(
    component: Component, source: Any, report: ComponentReport, dtype: str | None
) -> dict[str, Any]:
    """A component's entry in clvr.json."""
    return {
        "config": component.kind.to_json(component.config),
        "fingerprint": fingerprint(source, component.abstract(), component.stacked, dtype),
        "dtype": report.dtype,
        "parameters": report.parameters,
    }


def _chosen(found: Found, to: str, options: Options) -> dict[str, Component]:
    """The components to convert."""
    single = options.target.suffix == ".safetensors"
    if single and to != "bfl":
        raise ValueError(f"{options.target} is a file name, {to} writes a folder")
    possible = [n for n, kind in KINDS.items() if to in ("orbax", kind.library, *kind.layouts)]
    wanted = options.components or [n for n in possible if n in found.components]
    impossible = [name for name in wanted if name not in possible]
    if impossible:
        raise ValueError(f"{', '.join(impossible)} has no {to} layout; it is for {possible}")
    absent = [name for name in wanted if name not in found.components]
    if absent or not wanted:
        raise FileNotFoundError(
            f"{', '.join(absent) or ' and '.join(possible)} not found in {options.source}, a "
            f"{found.kind} with {', '.join(found.components) or 'no component'}"
        )
    if single and len(wanted) > 1:
        raise ValueError(
            f"{options.target} is one file for {' and '.join(wanted)}; name a folder, or choose "
            f"one with --components={wanted[0]}"
        )
    return {name: found.components[name] for name in wanted}
