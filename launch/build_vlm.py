"""The composition root of language models: weights, processor and mesh brought together."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from clvr_jax import parallel
from clvr_jax.backends.local import LocalVlm
from clvr_jax.backends.local.reader import cache_places
from clvr_jax.generate.text import Networks
from clvr_jax.models.qwen3 import language, serving
from clvr_jax.models.qwen3.cache import token_bytes
from clvr_jax.models.qwen3.config import Qwen3Config
from clvr_jax.models.qwen3.language import LanguageModel
from clvr_jax.models.qwen3_vl import model, processor, vision
from clvr_jax.models.qwen3_vl.config import Qwen3VLConfig
from clvr_jax.typing import Params
from conversion import detect
from conversion.components import Component
from conversion.load import load
from launch import build

_CONTEXT = 16_384  # tokens: what a conversation may take unless a config says otherwise


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


def context_of(cfg: Qwen3VLConfig | Qwen3Config, config: Any) -> int:
    """Return the most tokens of a conversation with a model, under a config of configs/vlm.py.

    Raises:
      ValueError: it is more than the model has positions, or no conversation.
    """
    most = _text(cfg).max_positions
    context = min(_CONTEXT, most) if config.context == -1 else config.context
    if not 1 < context <= most:
        raise ValueError(
            f"the context is {context} tokens, the checkpoint's positions end at {most}; give "
            f"fewer, or -1 for {min(_CONTEXT, most)}"
        )
    return context


def networks(cfg: Qwen3VLConfig | Qwen3Config, attention: str = "auto") -> Networks:
    """Return the networks of a model, as they serve.

    Raises:
      ValueError: `attention` is unknown.
    """
    fields = {"implementation": build.resolve_attention(attention)}
    sees = vision.Vision(cfg.vision, **fields) if isinstance(cfg, Qwen3VLConfig) else None
    return Networks(LanguageModel(_text(cfg), scan=False, fused=True, **fields), sees)


def prepare(cfg: Qwen3VLConfig | Qwen3Config, params: Params, mesh: Mesh | None) -> Params:
    """Return parameters as a `LocalVlm` takes them; frees the given, stacked ones."""
    sees, text = isinstance(cfg, Qwen3VLConfig), _text(cfg)
    stacked = params["language"] if sees else params
    places = None
    if mesh is not None:
        places = parallel.shardings(serving.abstract(stacked, text), mesh)
    prepared = {"language": serving.prepare(stacked, text, places)}
    return {**prepared, "visual": params["visual"]} if sees else prepared


def abstract(cfg: Qwen3VLConfig | Qwen3Config, dtype: Any) -> Params:
    """Return a model's parameters as shapes, stacked."""
    make = model if isinstance(cfg, Qwen3VLConfig) else language
    return make.abstract_params(cfg, dtype)


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
    nets = networks(cfg, attention)  # a wrong option is told before weights are read
    sees = isinstance(cfg, Qwen3VLConfig)
    folder = component.folder
    reads = processor.load(folder, cfg.vision if sees else None, **(template_options or {}))
    tree = abstract(cfg, dtype)
    places = parallel.shardings(tree, mesh) if mesh is not None else None
    params = prepare(cfg, load(component.open(), tree, component.stacked, places), mesh)
    return LocalVlm(
        name or Path(folder).resolve().name,
        nets,
        params,
        reads,
        cfg if sees else None,
        mesh=mesh,
        **limits,
    )


def from_config(source: str, config: Any, name: str = "", cache: int | None = None) -> LocalVlm:
    """Return the model at a path or hub id under a config of configs/vlm.py.

    Args:
      source: folder or hub id.
      config: how it is kept.
      name: what it is called; by default its folder.
      cache: bytes of all keys and values; None for what the config says.

    Raises:
      FileNotFoundError, ValueError: nothing is there, it is no such model, or it does not fit.
    """
    component = find(source)
    return load_vlm(
        component,
        dtype=build.resolve_dtype(config.dtype),
        mesh=build.make_mesh(config.mesh, config.devices),
        attention=config.attention,
        name=name,
        template_options=dict(config.template),
        context=context_of(component.config, config),
        cache_bytes=int(config.cache_gib * 2**30) if config.cache_gib > 0 else cache,
        max_rows=config.max_rows,
    )


def describe(source: str, config: Any) -> None:
    """Print parameters, bytes per device and what a conversation costs, without reading tensors."""
    component = find(source)
    cfg, dtype = component.config, jnp.dtype(build.resolve_dtype(config.dtype))
    mesh = build.make_mesh(config.mesh, config.devices)
    total = build.describe_tree("vlm", abstract(cfg, dtype), mesh)
    print(f"weights: {total / 2**30:.2f} GiB per device")
    token, context = token_bytes(_text(cfg), dtype.itemsize), context_of(cfg, config)
    print(
        f"cache: {token:,} bytes a token, {token * cache_places(context) / 2**30:.2f} GiB for a "
        f"conversation of {context:,} tokens while it is read, all devices together"
    )


def _text(cfg: Qwen3VLConfig | Qwen3Config) -> Qwen3Config:
    """The sizes of the language half."""
    return cfg.text if isinstance(cfg, Qwen3VLConfig) else cfg
