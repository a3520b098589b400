"""Sampling of pictures: text, denoise, encode, decode."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from clvr_jax.generate import image as generation
from launch import build
from launch.aot import placed, whole
from launch.bench.image import networks


def programs(
    model: str, mesh: Mesh, size: tuple[int, int], steps: int, batch: int, references: int
) -> dict[str, Callable[[], Any]]:
    """Return calls that lower each program, in bfloat16.

    Args:
      model: a key of `launch.bench.image.MODELS`.
      mesh: of devices that need not exist.
      size: height and width of the picture and of its references.
      steps: denoising steps.
      batch: pictures at once.
      references: how many.
    """
    nets = networks(model)

    def array(*shape, dtype=jnp.bfloat16):
        return whole(jax.ShapeDtypeStruct(shape, dtype), mesh)

    params = {k: placed(tree, mesh) for k, tree in build.abstract(nets, jnp.bfloat16).items()}
    settings = generation.Settings(height=size[0], width=size[1], steps=steps)
    layout = generation.layout_of(nets, settings, [size] * references)
    b, s, cfg = batch, settings.text_tokens, nets.transformer.cfg
    noise = array(b, *layout.noise, cfg.channels, dtype=jnp.float32)
    return {
        "text": lambda: generation.encode_text.lower(
            nets, params["text_encoder"], array(b, s, dtype=jnp.int32), array(b, dtype=jnp.int32)
        ),
        "denoise": lambda: generation.denoise.lower(
            nets,
            layout,
            settings.steps,
            settings.rounding,
            params["transformer"],
            {},
            noise,
            array(b, s, cfg.text_width),
            array(1, layout.image_tokens - layout.noise_tokens, cfg.channels),
            None,
            None,
            array(dtype=jnp.float32),
        ),
        "encode": lambda: generation.encode_image.lower(
            nets, params["vae"], array(1, *size, 3, dtype=jnp.float32), jnp.bfloat16
        ),
        "decode": lambda: generation.decode.lower(
            nets, params["vae"], array(b, *layout.noise, cfg.channels)
        ),
    }
