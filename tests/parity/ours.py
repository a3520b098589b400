"""The same models in JAX: weights written by the reference, read by our own conversion."""

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from clvr_jax.generate.image import ImageModel
from clvr_jax.models.flux2 import transformer, vae
from clvr_jax.models.qwen3 import language
from clvr_jax.models.qwen3_vl import model as qwen3_vl
from clvr_jax.models.qwen3_vl import vision
from clvr_jax.typing import Params
from conversion.components import KINDS, Component
from conversion.load import load
from launch import build

_COMPONENTS = {
    "Flux2Transformer2DModel": "transformer",
    "AutoencoderKLFlux2": "vae",
    "Qwen3ForCausalLM": "text_encoder",
    "Qwen3VLForConditionalGeneration": "vlm",
}


def carry(model, *, whole: bool = False) -> tuple[Any, Params]:
    """Return our config and float32 parameters of a reference model, by way of its files.

    A text encoder keeps the 27 layers that klein reads, unless the `whole` language model is asked
    for.
    """
    name = _COMPONENTS[type(model).__name__]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        values = json.loads((Path(folder) / "config.json").read_text())
        config = KINDS[name].from_json(values)
        component = Component(name, "diffusers", Path(folder), config)
        if name == "transformer":
            abstract = transformer.abstract_params(config)
        elif name == "vae":
            abstract = vae.abstract_params(config)
        elif name == "vlm" or whole:
            abstract = component.abstract()
        else:
            config = config.as_text_encoder()
            abstract = language.abstract_params(config, head=False)
        return config, load(component.open(), abstract, component.stacked)


def image_model(folder: Path) -> ImageModel:
    """Return what samples from a pipeline folder, built as the commands build it."""
    return build.load_image_model(build.inspect_weights(str(folder)), dtype="float32")


@functools.cache
def vision_program(cfg, scan: bool = True):
    """The compiled vision tower of these sizes."""
    return jax.jit(vision.Vision(cfg, scan=scan).apply)


@functools.cache
def language_program(cfg, scan: bool = True):
    """The compiled language model of these sizes."""
    apply = language.LanguageModel(cfg, scan=scan).apply
    return jax.jit(apply, static_argnames=("capture", "fresh"))


def image_features(cfg, params: Params, batch, patches: int | None = None) -> np.ndarray:
    """Features (images, cells, parts, width) of a batch's images, padded to `patches` each."""
    places = vision.places(batch.all_grids, cfg.vision, patches)
    pixels = np.zeros((*places.taps.shape[:2], batch.pixels[0].shape[-1]), np.float32)
    for place, image in zip(pixels, batch.pixels, strict=True):
        place[: len(image)] = image
    pixels = pixels.astype(params["visual"]["patch_embed"]["bias"].dtype)
    return vision_program(cfg.vision)({"params": params["visual"]}, pixels, places)


def language_inputs(cfg, params: Params, batch, patches: int | None = None) -> dict[str, Any]:
    """Arguments of the language model for a batch of conversations."""
    positions = np.zeros((*batch.ids.shape, 3), np.int32)
    for row, ids, length, grids in zip(
        positions, batch.ids, batch.lengths, batch.grids, strict=True
    ):
        row[:length], _ = qwen3_vl.position_ids(ids[:length], list(grids), cfg)
    inputs = {"ids": batch.ids, "positions": positions}
    if batch.pixels:
        features = image_features(cfg, params, batch, patches)
        _, cells, parts, width = features.shape
        inputs["features"] = features.reshape(-1, parts, width)
        rows = [i * cells + np.arange(h * w // 4) for i, (h, w) in enumerate(batch.all_grids)]
        inputs["places"] = np.full(batch.ids.shape, -1, np.int32)
        inputs["places"][batch.ids == cfg.image_token] = np.concatenate(rows)
    return inputs
