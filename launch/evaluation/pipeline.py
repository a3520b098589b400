"""What a pipeline of weights gives an evaluation: pictures, text lengths, its VAE, its names."""

import functools
from typing import Any

import jax
import numpy as np

from clvr_jax.generate import image, prompt
from clvr_jax.miniature.render import SIDE
from conversion.sources import fingerprint
from launch.evaluation.miniature import Parts
from launch.evaluation.sampling import Draw


def parts_of(weights: Any, model: Any, steps: int, guidance: float) -> Parts:
    """Return what a loaded pipeline draws with.

    Args:
      weights: as looked at.
      model: loaded.
      steps, guidance: of the sampling.
    """

    def bucket(count: int) -> int:
        # longer than any that was trained: drawn all the same, so that no prompt is left out
        longest = weights.texts[-1]
        fits = (text for text in weights.texts if count <= text)
        return next(fits, -(-count // longest) * longest)

    def tokens(texts: list[str]) -> list[int]:
        rows = [prompt.render(text) for text in texts]
        return [len(ids) for ids in model.tokenizer(rows, add_special_tokens=False)["input_ids"]]

    @functools.partial(jax.jit, static_argnums=0)
    def through(nets, params, values):
        latents = image.encode_image(nets, params, values, values.dtype)
        return image.decode(nets, params, latents)

    def recode(pictures: np.ndarray) -> np.ndarray:
        dtype = jax.tree.leaves(model.params["vae"])[0].dtype
        values = _values(pictures).astype(dtype)
        return np.asarray(through(model.networks, model.params["vae"], values))

    draw = draw_with(model, steps, guidance, weights.pattern, SIDE)
    return Parts(draw, tokens, bucket, recode, weights.texts)


def draw_with(model: Any, steps: int, guidance: float, pattern: str, side: int) -> Draw:
    """Return what draws with a model.

    Args:
      model: an `ImageModel`.
      steps, guidance, pattern: see `clvr_jax.generate.image.Settings`.
      side: pixels.
    """

    def draw(texts, references, seeds, text_tokens):
        settings = image.Settings(side, side, steps, guidance, text_tokens, pattern)
        values = [[_values(picture) for picture in row] for row in references]
        pictures, finite = image.generate_each(model, texts, values, seeds, settings)
        image.require_finite(finite, list(zip(texts, seeds, strict=True)))
        return pictures

    return draw


def _values(pictures: np.ndarray) -> np.ndarray:
    """Levels of 0 to 255 as values in [-1, 1]."""
    return pictures.astype(np.float32) / 127.5 - 1


def fingerprints(weights: Any) -> dict[str, str]:
    """Return the fingerprint of each component: the same for one set of weights in any layout."""
    return {
        name: fingerprint(part.open(), part.abstract(), part.stacked)
        for name, part in weights.found.components.items()
    }
