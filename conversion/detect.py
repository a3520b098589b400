"""What is at a path: a pipeline folder, a model, files, adapters, a training run; or a hub id."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import clvr_jax
from conversion import hub, infer, runs
from conversion.components import KINDS, Component, recognise
from conversion.lora.dialects import ADAPTER_CONFIG

PIPELINES = ("Flux2KleinPipeline", "Flux2KleinKVPipeline", "Flux2KleinInpaintPipeline")
MANIFEST = "clvr.json"
INDEX = "model_index.json"
CONDITIONING = "conditioning.json"  # how the inputs of trained weights are made
ORBAX = "params"  # folder of the Orbax leaves inside a converted component
# what comes with the package, by the name that stands for its folder
SHIPPED = {
    "miniature": "klein",
    "miniature-sft": "klein_sft",
    "miniature-vlm": "vlm",
    "miniature-vlm-sft": "vlm_sft",
}
ADAPTED = ("transformer", "vlm")  # components that adapters are known of
SHARED = ("tokenizer", "scheduler", INDEX)  # what is copied as it is


@dataclasses.dataclass(frozen=True)
class Found:
    """What was found.

    Attributes:
      kind: in words.
      path: where.
      components: by name.
      shared: folders and files that are copied as they are, by name.
      manifest: content of our clvr.json; `conditioning` where weights have it recorded, and the
        attention `pattern` of a run.
    """

    kind: str
    path: Path
    components: dict[str, Component]
    shared: dict[str, Path] = dataclasses.field(default_factory=dict)
    manifest: dict[str, Any] = dataclasses.field(default_factory=dict)

    def only(self, names: Sequence[str]) -> dict[str, Component]:
        """Return those of its components that are named."""
        return {name: part for name, part in self.components.items() if name in names}


def find(
    source: str | Path,
    wanted: Sequence[str] | None = None,
    base: Found | None = None,
    complete: bool = True,
) -> Found:
    """Return what is at a path or in a hub repository.

    Args:
      source: a folder (a pipeline's, a model's, PEFT's, a training run's), a safetensors file,
        `org/name` on the hub, or a name in `SHIPPED`.
      wanted: components to look at; None for all that the pipeline names.
      base: a pipeline whose config.json a single file without one may use, where sizes agree.
      complete: refuse a pipeline that lacks a wanted component; else take what is there, with the
        configs of components that are not wanted.

    Raises:
      FileNotFoundError: nothing is there, or a part that it names is missing.
      ValueError: what is there is no known model, or a config.json is not understood.
      hub.HubError: a repository could not be had.
    """
    path = Path(source)
    if str(source) in SHIPPED and not path.exists():
        path = Path(clvr_jax.__file__).parent / "miniature" / "weights" / SHIPPED[str(source)]
    if at := runs.place(path):
        return _run(at, wanted, complete)
    if not path.exists():
        if not hub.is_repo_id(str(source)):
            raise FileNotFoundError(
                f"{source} does not exist; expected a folder, a .safetensors file or a repository "
                "id such as black-forest-labs/FLUX.2-klein-4B or Qwen/Qwen3-VL-8B-Instruct"
            )
        path = hub.download(str(source), list(wanted or KINDS))
    if path.is_file():
        component = _single_file(path, base)
        return Found(f"single file, {component.layout} layout", path, {component.name: component})
    if (path / ADAPTER_CONFIG).exists():
        return _adapted(path, wanted, complete)
    if (path / MANIFEST).exists():
        return _converted(path, wanted, complete)
    if (path / INDEX).exists():
        return _pipeline(path, wanted, complete)
    if (path / "config.json").exists():
        component = _component(path)
        one = {component.name: component}
        return Found("component folder", path, one, manifest=_recorded(path))
    return _single_files(path, base)


def single(source: str | Path) -> list[str]:
    """Return the components that a single file, or a folder of them, holds; [] for anything else.

    Raises:
      WeightsError: a file is broken.
    """
    path = Path(source)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    found = (recognise(_shapes(file)) for file in files)
    return [name for name, _ in filter(None, found)]


def _converted(path: Path, wanted: Sequence[str] | None, complete: bool) -> Found:
    manifest = _json(path / MANIFEST)
    if manifest.get("format") != 1:
        raise ValueError(
            f"{path / MANIFEST}: format is {manifest.get('format')!r}, this version reads 1"
        )
    listed = [name for name in KINDS if name in manifest.get("components", {})]
    components = _components(path, listed, wanted, complete, MANIFEST)
    manifest = {**manifest, **_recorded(path)}
    return Found("converted folder", path, components, _shared(path), manifest)


def _run(at: runs.Place, wanted: Sequence[str] | None, complete: bool) -> Found:
    """A run: what it trained over the weights that it began from, and the rest of those."""
    record = at.record()
    trained, weights = runs.names(record), record["weights"]
    try:
        base = find(weights, wanted, complete=complete)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{at.folder} trained the {' and '.join(trained)} of {weights}, and its other weights "
            f"are still read from there: {error}. Put them back, or change `weights` in "
            f"{at.folder / runs.RECORD}"
        ) from error
    components = dict(base.components)
    for name in trained:
        if wanted is not None and name not in wanted:
            continue
        if name not in components:
            raise FileNotFoundError(
                f"{at.folder} trained the {name} of {weights}, which has none any more"
            )
        components[name] = runs.component(components[name], at)
    manifest = _inputs(record)
    step = "newest checkpoint" if at.step is None else f"step {at.step}"
    return Found(f"run ({step}) over {base.kind}", at.folder, components, base.shared, manifest)


def _adapted(path: Path, wanted: Sequence[str] | None, complete: bool) -> Found:
    """PEFT's folder: adapters of a transformer or a Qwen3-VL, and the model that they name."""
    weights = _json(path / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(weights, str) or not weights:
        raise ValueError(
            f"{path / ADAPTER_CONFIG}: base_model_name_or_path is {weights!r}; write the folder or "
            "repository id of the model there that the adapters are added to"
        )
    if weights.startswith(("./", "../")) and (path / weights).exists():  # else as PEFT, from here
        weights = str(path / weights)
    if Path(weights).resolve() == path.resolve():
        raise ValueError(f"{path / ADAPTER_CONFIG}: base_model_name_or_path is this folder itself")
    try:
        base = find(weights, wanted, complete=complete)
    except OSError as error:
        raise FileNotFoundError(f"{path} adapts {weights}: {error}") from error
    components = dict(base.components)
    adapted = [name for name in ADAPTED if name in components]
    if not adapted and wanted is None:
        raise ValueError(f"{path} adapts {weights}, a {base.kind} with neither klein nor Qwen3-VL")
    for name in adapted:
        below = components[name]
        components[name] = dataclasses.replace(below, layout="adapters", path=path, base=below)
    manifest = _inputs(base.manifest) | _recorded(path)
    return Found(f"adapters over {base.kind}", path, components, base.shared, manifest)


def _pipeline(path: Path, wanted: Sequence[str] | None, complete: bool) -> Found:
    index = _json(path / INDEX)
    if index.get("_class_name") not in PIPELINES:
        raise ValueError(
            f"{path / INDEX}: _class_name is {index.get('_class_name')!r}, expected one of "
            f"{', '.join(PIPELINES)}"
        )
    listed = [name for name in KINDS if (index.get(name) or [None])[0] is not None]
    components = _components(path, listed, wanted, complete, INDEX)
    kind = "diffusers folder"
    if any(component.layout == "orbax" for component in components.values()):
        kind = "converted folder"
    return Found(kind, path, components, _shared(path), _recorded(path))


def _components(
    path: Path, listed: Sequence[str], wanted: Sequence[str] | None, complete: bool, said_by: str
) -> dict[str, Component]:
    """The components of a pipeline that are there, as `find` describes."""
    components = {}
    for name in listed:
        config = path / name / "config.json"
        if complete and wanted is not None and name not in wanted:
            continue
        if config.exists():
            components[name] = _component(path / name, name)
        elif complete:
            others = ",".join(kind for kind in listed if kind != name)
            raise FileNotFoundError(
                f"{path / said_by} names {name}, but {config} does not exist; complete the "
                f"download, or choose others with --components={others}"
            )
    return components


def _component(folder: Path, name: str | None = None) -> Component:
    """A folder with config.json and tensors of one component."""
    text = (folder / "config.json").read_text()
    values = _json(folder / "config.json")
    name = name or _name_of(values, folder / "config.json")
    try:
        config = KINDS[name].from_json(values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    if (folder / ORBAX).is_dir():
        return Component(name, "orbax", folder / ORBAX, config, text)
    return Component(name, "diffusers", folder, config, text)


def _name_of(values: Mapping[str, Any], file: Path) -> str:
    """The component whose config.json this is; the names of classes and folders do not matter."""
    models = {
        "Flux2Transformer2DModel": "transformer",
        "AutoencoderKLFlux2": "vae",
        "qwen3": "text_encoder",
        "qwen3_vl": "vlm",
        "qwen3_vl_moe": "vlm",  # refused there, with the reason
    }
    found = values.get("_class_name") or values.get("model_type")
    if found not in models:
        known = ", ".join(list(models)[:3])
        raise ValueError(f"{file}: the model is {found!r}; expected {known} or qwen3_vl")
    return models[found]


def _single_file(path: Path, base: Found | None) -> Component:
    """A safetensors file on its own."""
    shapes = _shapes(path)
    found = recognise(shapes)
    if found is None:
        shown = ", ".join(sorted(shapes)[:3]) or "no tensors"
        raise ValueError(
            f"{path} is no FLUX.2 transformer, FLUX.2 VAE, Qwen3 or Qwen3-VL in a known layout; it "
            f"holds {shown}{', ...' if len(shapes) > 3 else ''}"
        )
    name, layout = found
    if (path.parent / "config.json").exists():
        beside = _component(path.parent)
        if beside.name == name:
            return dataclasses.replace(beside, layout=layout, path=path)
    if layout == "diffusers":
        raise FileNotFoundError(
            f"{path} is a {name} in the layout of a folder, but {path.parent / 'config.json'} with "
            "its sizes does not exist; give the folder that it came in"
        )
    known = base.components.get(name) if base is not None else None
    if known is not None and _fits(known, shapes, layout):
        return Component(name, layout, path, known.config, known.text)
    read = {"transformer": infer.transformer, "vae": infer.vae}[name]
    return Component(name, layout, path, read(shapes, path))


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Names, without prefix, and shapes of a file's tensors."""
    from clvr_jax.weights import SafetensorsReader
    from conversion import flux2
    from conversion.sources import strip

    with SafetensorsReader(file) as reader:
        names = strip(reader.tensors, flux2.BFL.prefixes)
        return {short: reader.tensors[name].shape for short, name in names.items()}


def _fits(component: Component, shapes: Mapping[str, tuple[int, ...]], layout: str) -> bool:
    """Whether a component of these sizes has tensors of these shapes."""
    from conversion.rules import Bound

    needed = Bound(component.table(layout), component.abstract()).shapes
    return all(shapes.get(name) == shape for name, shape in needed.items())


def _single_files(path: Path, base: Found | None) -> Found:
    """A folder of single files, e.g. a transformer and ae.safetensors."""
    files = sorted(path.glob("*.safetensors"))
    if not files:
        parts = [str(path / name) for name in KINDS if (path / name / "config.json").exists()]
        hint = f"; did you mean {' or '.join(parts)}?" if parts else ""
        raise FileNotFoundError(
            f"{path} holds no {MANIFEST}, {INDEX}, config.json or .safetensors file{hint}"
        )
    components: dict[str, Component] = {}
    for file in files:
        component = _single_file(file, base)
        if component.name in components:
            raise ValueError(
                f"{path} holds two files of one kind ({component.name}): "
                f"{components[component.name].path.name} and {file.name}; give one of them"
            )
        components[component.name] = component
    return Found("folder of single files", path, components, _shared(path), _recorded(path))


def _shared(path: Path) -> dict[str, Path]:
    return {name: path / name for name in SHARED if (path / name).exists()}


def _inputs(known: Mapping[str, Any]) -> dict[str, Any]:
    """How the inputs of weights are made, of all that is known of them."""
    return {key: known[key] for key in ("conditioning", "pattern") if key in known}


def _recorded(path: Path) -> dict[str, Any]:
    file = path / CONDITIONING
    return {"conditioning": _json(file)} if file.exists() else {}


def _json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected an object, found {type(values).__name__}")
    return values
