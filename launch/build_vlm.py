"""The composition root of language models: weights, processor and mesh brought together."""

from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from clvr_jax import parallel
from clvr_jax.backends.local import LocalVlm
from clvr_jax.generate.text import Networks
from clvr_jax.models.qwen3 import config as qwen3
from clvr_jax.models.qwen3 import language, serving
from clvr_jax.models.qwen3.config import Qwen3Config
from clvr_jax.models.qwen3.language import LanguageModel
from clvr_jax.models.qwen3_vl import config as qwen3_vl
from clvr_jax.models.qwen3_vl import model, processor, vision
from clvr_jax.models.qwen3_vl.config import Qwen3VLConfig
from clvr_jax.typing import Params
from conversion import detect
from conversion.components import Component
from conversion.load import load


def find(source: str) -> Component:
    """Look at a Qwen3 or Qwen3-VL folder, without reading tensors.

    Args:
      source: a transformers folder, a converted folder, or a hub repository id.

    Raises:
      FileNotFoundError, ValueError: nothing is there, or it is no such model.
    """
    found = detect.find(source)
    for name in ("vlm", "text_encoder"):
        if name in found.components:
            return found.components[name]
    raise ValueError(
        f"{source} is a {found.kind} with {', '.join(found.components)}; expected Qwen3-VL or Qwen3"
    )


def networks(cfg: Qwen3VLConfig | Qwen3Config, attention: str = "auto") -> Networks:
    """Return the networks of a model, as they serve."""
    implementation = None if attention == "auto" else attention
    text = cfg.text if isinstance(cfg, Qwen3VLConfig) else cfg
    fields = {"implementation": implementation}
    sees = vision.Vision(cfg.vision, **fields) if isinstance(cfg, Qwen3VLConfig) else None
    return Networks(LanguageModel(text, scan=False, fused=True, **fields), sees)


def prepare(cfg: Qwen3VLConfig | Qwen3Config, params: Params, mesh: Mesh | None) -> Params:
    """Return parameters as a `LocalVlm` takes them; frees the given, stacked ones."""
    sees = isinstance(cfg, Qwen3VLConfig)
    text = cfg.text if sees else cfg
    stacked = params["language"] if sees else params
    places = None
    if mesh is not None:
        places = parallel.shardings(serving.abstract(stacked, text), mesh)
    prepared = {"language": serving.prepare(stacked, text, places)}
    return {**prepared, "visual": params["visual"]} if sees else prepared


def load_vlm(
    component: Component,
    *,
    dtype: Any,
    mesh: Mesh | None = None,
    attention: str = "auto",
    name: str = "",
    template_options: dict[str, Any] | None = None,
    **limits: Any,
) -> LocalVlm:
    """Read a folder's weights onto the devices and return a model that answers.

    Args:
      component: from `find`.
      dtype: of every parameter (`build.resolve_dtype`).
      mesh: where parameters are spread; None for one device.
      attention: attention implementation, or auto.
      name: what the model is called; by default its folder.
      template_options: names that the chat template knows, e.g. {"enable_thinking": False}.
      limits: context, cache_bytes and max_rows of `LocalVlm`.

    Raises:
      ValueError: an option is unknown, or a file does not fit.
    """
    cfg = component.config
    sees = isinstance(cfg, Qwen3VLConfig)
    folder = component.path.parent if component.layout == "orbax" else component.path
    reads = processor.load(folder, cfg.vision if sees else None, **(template_options or {}))
    abstract = model.abstract_params(cfg, dtype) if sees else language.abstract_params(cfg, dtype)
    places = parallel.shardings(abstract, mesh) if mesh is not None else None
    stacked = (qwen3_vl if sees else qwen3).STACKED
    params = prepare(cfg, load(component.open(), abstract, stacked, places), mesh)
    return LocalVlm(
        name or Path(folder).resolve().name,
        networks(cfg, attention),
        params,
        reads,
        cfg if sees else None,
        mesh=mesh,
        **limits,
    )


def parameter_bytes(cfg: Qwen3VLConfig | Qwen3Config, dtype: Any) -> int:
    """Return the bytes of a model's parameters."""
    sees = isinstance(cfg, Qwen3VLConfig)
    tree = model.abstract_params(cfg, dtype) if sees else language.abstract_params(cfg, dtype)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
