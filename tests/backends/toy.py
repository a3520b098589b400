"""A toy Qwen3-VL folder and pictures for it."""

import functools
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from launch import build_vlm, toy


@functools.cache
def folder() -> Path:
    """A toy Qwen3-VL in transformers' layout, written once a process."""
    place = Path(tempfile.mkdtemp()) / "toy-vl"
    toy.write_vlm(place, seed=1)
    return place


def load(**limits):
    """A model over the toy folder; close it."""
    limits = {"cache_bytes": 2**26, "context": 2048, "max_rows": 8, **limits}
    return build_vlm.load_vlm(build_vlm.find(str(folder())), dtype="float32", **limits)


def picture(seed: int = 0, height: int = 96, width: int = 128) -> Image.Image:
    """Random pixels in random blocks."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST)
