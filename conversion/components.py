"""The kinds of model: configs, parameter shapes and rule tables of each."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from clvr_jax.models.flux2 import config as flux2_config
from clvr_jax.models.qwen3 import config as qwen3_config
from clvr_jax.models.qwen3_vl import config as qwen3_vl_config
from conversion import flux2, qwen3, qwen3_vl, vae
from conversion.rules import Table


@dataclasses.dataclass(frozen=True)
class Kind:
    """What is known of a component by its name.

    Attributes:
      from_json: config of a config.json.
      to_json: the inverse.
      table: rule table of a config in a layout, "diffusers" or "bfl".
      stacked: roots of its tree with a layer axis.
      stem: name of its safetensors files in a diffusers folder.
      variants: named sizes.
      layouts: file layouts that exist for it.
      library: whose folders "diffusers" stands for, since transformers' have the same layout.
    """

    from_json: Callable[[Mapping[str, Any]], Any]
    to_json: Callable[[Any], dict[str, Any]]
    table: Callable[[Any, str], Table]
    stacked: tuple[str, ...]
    stem: str
    variants: Mapping[str, Any]
    layouts: tuple[str, ...] = ("diffusers", "bfl")
    library: str = "diffusers"

    def layout_name(self, layout: str) -> str:
        """Return what reports call a layout."""
        return self.library if layout == "diffusers" else layout


KINDS = {
    "transformer": Kind(
        flux2_config.transformer_from_json,
        flux2_config.transformer_to_json,
        lambda cfg, layout: {"diffusers": flux2.DIFFUSERS, "bfl": flux2.BFL}[layout],
        flux2_config.STACKED,
        "diffusion_pytorch_model",
        flux2_config.TRANSFORMER_VARIANTS,
    ),
    "vae": Kind(
        flux2_config.vae_from_json,
        flux2_config.vae_to_json,
        vae.table,
        (),
        "diffusion_pytorch_model",
        flux2_config.VAE_VARIANTS,
    ),
    "text_encoder": Kind(
        qwen3_config.from_json,
        qwen3_config.to_json,
        lambda cfg, layout: qwen3.TIED if cfg.tied else qwen3.UNTIED,
        qwen3_config.STACKED,
        "model",
        qwen3_config.VARIANTS,
        layouts=("diffusers",),
        library="transformers",
    ),
    "vlm": Kind(
        qwen3_vl_config.from_json,
        qwen3_vl_config.to_json,
        lambda cfg, layout: qwen3_vl.table(cfg),
        qwen3_vl_config.STACKED,
        "model",
        qwen3_vl_config.VARIANTS,
        layouts=("diffusers",),
        library="transformers",
    ),
}


# a tokenizer's and a processor's files, where they lie beside the weights
_SMALL = ("*.json", "merges.txt", "*.jinja")


@dataclasses.dataclass(frozen=True)
class Component:
    """One component that was found.

    Attributes:
      name: transformer, vae, text_encoder or vlm.
      layout: "orbax", "diffusers" (a folder of diffusers or transformers), "bfl", "run", or
        "adapters" (PEFT's folder).
      path: the folder or file with its tensors.
      config: its sizes.
      text: its config.json as found, empty where none was.
      base: of a run, what its training began from; of adapters, what they are added to.
      step: of a run, which checkpoint; None for the newest.
    """

    name: str
    layout: str
    path: Path
    config: Any
    text: str = ""
    base: "Component | None" = None
    step: int | None = None

    @property
    def folder(self) -> Path:
        """Where the small files of a component lie: its config, tokenizer and processor."""
        if self.base is not None:
            return self.base.folder
        return self.path.parent if self.layout == "orbax" or self.path.is_file() else self.path

    @property
    def kind(self) -> Kind:
        """What is known of components of this name."""
        return KINDS[self.name]

    @property
    def stacked(self) -> tuple[str, ...]:
        """Roots of its tree whose leaves carry a layer axis."""
        return self.kind.stacked

    @property
    def variant(self) -> str:
        """Name of its sizes, or "other sizes"."""
        named = self.kind.variants
        return next((name for name, cfg in named.items() if cfg == self.config), "other sizes")

    def abstract(self, dtype: Any = "float32") -> dict[str, Any]:
        """Return its parameter tree as shapes, everything that its files hold."""
        return _abstract(self.name, self.config, dtype)

    def table(self, layout: str) -> Table:
        """Return its rule table in a file layout."""
        return self.kind.table(self.config, layout)

    @property
    def tables(self) -> list[Table]:
        """Its rule tables in all layouts of files."""
        return [self.table(layout) for layout in self.kind.layouts]

    def open(self) -> Any:
        """Return its checkpoint as a `Source`.

        Raises:
          WeightsError: files are missing, truncated or not what they claim to be.
        """
        from clvr_jax.weights import SafetensorsReader
        from conversion.sources import MappedSource, OrbaxSource

        if self.layout == "adapters":
            from conversion.lora import read
            from conversion.lora.merged import MergedSource

            return MergedSource(self.base.open(), read(self.path, self.abstract(), self.tables))
        if self.base is not None:
            from conversion.runs import RunSource

            return RunSource(self, self.base.open())
        if self.layout == "orbax":
            return OrbaxSource(self.path, self.stacked)
        reader = SafetensorsReader(self.path)
        return MappedSource(reader, self.table(self.layout), self.abstract())

    def config_text(self, dtype: str | None = None) -> str:
        """Return its config.json, as found or written anew, naming `dtype` if the found one did."""
        values = json.loads(self.text) if self.text else self.kind.to_json(self.config)
        renamed = _with_dtype(values, dtype) if dtype else values
        if self.text and renamed == values:
            return self.text
        return json.dumps(renamed, indent=2) + "\n"

    def small_files(self) -> list[Path]:
        """Return what lies beside config.json and is no tensor.

        Other JSON files, e.g. generation_config.json; vocabulary and chat templates.
        """
        if self.base is not None:
            return self.base.small_files()
        if self.layout == "bfl":
            return []
        return [
            file
            for pattern in _SMALL
            for file in sorted(self.folder.glob(pattern))
            if file.name != "config.json" and not file.name.endswith(".index.json")
        ]


def _with_dtype(values: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Replace the type where a config and its parts name one."""
    out = {}
    for key, value in values.items():
        named = key in ("dtype", "torch_dtype")
        out[key] = dtype if named else value
        if isinstance(value, Mapping):
            out[key] = _with_dtype(value, dtype)
    return out


@functools.lru_cache(maxsize=32)
def _abstract(name: str, config: Any, dtype: Any) -> dict[str, Any]:
    if name == "transformer":
        from clvr_jax.models.flux2 import transformer as model
    elif name == "vae":
        from clvr_jax.models.flux2 import vae as model
    elif name == "vlm":
        from clvr_jax.models.qwen3_vl import model
    else:
        from clvr_jax.models.qwen3 import language as model
    return model.abstract_params(config, dtype)


_DEEPSTACK = ("model.visual.deepstack_merger_list.0.", "visual.deepstack_merger_list.0.")


def recognise(names: Any) -> tuple[str, str] | None:
    """Return (component, layout) of a file with these tensor names, prefixes stripped, or None."""
    signatures = {
        ("transformer", "bfl"): "double_blocks.0.",
        ("transformer", "diffusers"): "transformer_blocks.0.",
        ("vae", "bfl"): "encoder.down.0.",
        ("vae", "diffusers"): "encoder.down_blocks.0.",
        # before the text encoder, whose names its decoder may have
        ("vlm", "diffusers"): _DEEPSTACK,
        ("text_encoder", "diffusers"): "model.layers.0.",
    }
    for found, start in signatures.items():
        if any(name.startswith(start) for name in names):
            return found
    return None
