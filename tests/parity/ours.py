"""The same models in JAX: weights written by the reference, read by our own conversion."""

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

from clvr_jax.generate.image import ImageModel
from clvr_jax.models.flux2 import transformer, vae
from clvr_jax.models.qwen3 import decoder
from clvr_jax.typing import Params
from conversion.components import KINDS, Component
from conversion.load import load
from launch import build

_COMPONENTS = {
    "Flux2Transformer2DModel": "transformer",
    "AutoencoderKLFlux2": "vae",
    "Qwen3ForCausalLM": "text_encoder",
}


def carry(model) -> tuple[Any, Params]:
    """Return our config and float32 parameters of a reference model, by way of its files.

    A text encoder keeps the 27 layers that klein reads.
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
        else:
            config = dataclasses.replace(config, layers=decoder.KLEIN_LAYERS[-1])
            abstract = decoder.abstract_params(config, head=False)
        return config, load(component.open(), abstract, component.stacked)


def image_model(folder: Path) -> ImageModel:
    """Return what samples from a pipeline folder, built as the commands build it."""
    return build.load_image_model(build.inspect_weights(str(folder)), dtype="float32")
