"""Qwen3-VL: vision tower and language model as one parameter tree, `visual` and `language`."""

import jax
import jax.numpy as jnp
import numpy as np

from clvr_jax.models.qwen3 import language
from clvr_jax.models.qwen3_vl import vision
from clvr_jax.models.qwen3_vl.config import Qwen3VLConfig
from clvr_jax.typing import Params


def abstract_params(cfg: Qwen3VLConfig, dtype=jnp.float32) -> Params:
    """Return the parameter tree as shapes, everything that a checkpoint holds."""
    cell = vision.places([(cfg.vision.merge, cfg.vision.merge)], cfg.vision)

    def init(cell):
        patches = jnp.zeros((1, cfg.vision.cell, cfg.vision.patch_width))
        return vision.Vision(cfg.vision).init(jax.random.key(0), patches, cell)["params"]

    visual = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype), jax.eval_shape(init, cell)
    )
    return {"language": language.abstract_params(cfg.text, dtype), "visual": visual}


def position_ids(
    tokens: np.ndarray, grids: list[vision.Grid], cfg: Qwen3VLConfig, start: int = 0
) -> tuple[np.ndarray, int]:
    """Return positions (l, 3) along time, height and width, and the position that comes next.

    Text counts one by one on all axes. An image of H x W cells begins where the text stopped:
    time stays, height and width count its cells, and what follows goes on after max(H, W).
    Source: transformers' `modeling_qwen3_vl.py`, `get_rope_index`.

    Args:
      tokens: unpadded token ids of one sequence, or of its next part.
      grids: rows and columns in patches of the images in `tokens`, in order.
      cfg: sizes and special tokens.
      start: position of the first token: 0, or what the previous part returned.

    Raises:
      ValueError: the image tokens are not as many as the grids say.
    """
    tokens = np.asarray(tokens)
    positions = np.zeros((len(tokens), 3), np.int32)
    image = tokens == cfg.image_token
    remaining, i, position = list(grids), 0, start
    while i < len(tokens):
        if not image[i]:
            stop = i + (int(np.argmax(image[i:])) if image[i:].any() else len(tokens) - i)
            positions[i:stop] = np.arange(position, position + stop - i)[:, None]
            position += stop - i
            i = stop
            continue
        if not remaining:
            raise ValueError(f"there are image tokens beyond the {len(grids)} given images")
        rows, cols = (side // cfg.vision.merge for side in remaining.pop(0))
        stop = i + rows * cols
        if stop > len(tokens) or not image[i:stop].all():
            raise ValueError(
                f"an image of {rows} x {cols} cells needs {rows * cols} image tokens from token "
                f"{i} on, found {int(np.argmin(image[i:])) or len(tokens) - i}"
            )
        row, col = np.divmod(np.arange(rows * cols), cols)
        positions[i:stop, 0] = position
        positions[i:stop, 1], positions[i:stop, 2] = position + row, position + col
        position += max(rows, cols)
        i = stop
    if remaining:
        raise ValueError(f"{len(remaining)} of {len(grids)} images have no image tokens")
    return positions, position
