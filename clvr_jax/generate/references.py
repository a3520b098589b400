"""Pictures in and out: reference images for the VAE, pixels for files."""

import math

import numpy as np
from PIL import Image, ImageOps

MAX_AREA = 1024 * 1024
MAX_ASPECT = 8
MIN_SIDE = 64


def prepare(image: Image.Image, factor: int = 16) -> np.ndarray:
    """Return (height, width, 3) float32 in [-1, 1] by the rule of diffusers' klein pipeline.

    Larger than 1024 x 1024 is reduced to that area (Lanczos, aspect kept); then both sides are cut
    to multiples of `factor` around the centre. Nothing is enlarged.

    Raises:
      ValueError: a side is under 64 pixels or the aspect beyond 8.
    """
    image = ImageOps.exif_transpose(image).convert("RGB")
    width, height = image.size
    if min(width, height) < MIN_SIDE:
        raise ValueError(
            f"the reference is {width}x{height}; both sides must be at least {MIN_SIDE} pixels"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(
            f"the reference is {width}x{height}; the longer side may be at most {MAX_ASPECT} times "
            "the shorter; crop it"
        )
    if width * height > MAX_AREA:
        scale = math.sqrt(MAX_AREA / (width * height))
        width, height = int(width * scale), int(height * scale)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    wide, high = width // factor * factor, height // factor * factor
    left, top = (width - wide) // 2, (height - high) // 2
    image = image.crop((left, top, left + wide, top + high))
    return np.asarray(image, np.float32) / 255.0 * 2.0 - 1.0


def grid(images: np.ndarray, columns: int) -> np.ndarray:
    """Return one picture of (n, height, width, 3) images in rows of `columns`, 4 pixels apart."""
    n, height, width, _ = images.shape
    rows, gap = -(-n // columns), 4
    shape = (rows * (height + gap) - gap, columns * (width + gap) - gap, 3)
    sheet = np.full(shape, 255, np.uint8)
    for i, image in enumerate(images):
        y, x = (i // columns) * (height + gap), (i % columns) * (width + gap)
        sheet[y : y + height, x : x + width] = image
    return sheet
