"""Pictures for tests: real renders, and stand-ins with a detector that are exact and instant."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from clvr_jax.miniature import render
from clvr_jax.miniature.pictures import Picture, rendered
from clvr_jax.miniature.readings import Readings, certain
from clvr_jax.miniature.scene import CELLS, Scene


def renders(codes: np.ndarray, seeds: Sequence[int]) -> np.ndarray:
    """Return real renders of codes (b, 16), 128 at once: one program serves all tests."""
    return rendered([Picture(*each) for each in zip(codes, seeds, strict=True)], 128)


def picture(scene: Scene) -> Image.Image:
    """Return a picture whose first pixels are the scene's codes, for `glance`."""
    pixels = np.zeros((render.SIDE, render.SIDE, 3), np.uint8)
    pixels[0, :CELLS, 0] = scene.codes()
    return Image.fromarray(pixels)


def glance(pictures: np.ndarray) -> Readings:
    """Return what `picture` drew."""
    return certain(pictures[:, 0, :CELLS, 0])
