"""Random examples of awkward lengths, and a toy model that reads them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from clvr_jax.data.packing import Shape
from clvr_jax.data.plan import FILLING, Step
from clvr_jax.models.qwen3.language import LanguageModel
from clvr_jax.models.qwen3_vl.config import VARIANTS
from clvr_jax.models.qwen3_vl.model import abstract_params, position_ids
from clvr_jax.models.qwen3_vl.processor import Picture
from clvr_jax.models.qwen3_vl.vision import Vision
from clvr_jax.sft.vlm.examples import Example
from clvr_jax.sft.vlm.loss import Networks
from clvr_jax.tree import flatten, unflatten

TINY = VARIANTS["tiny"]
# small patches: the pixels are not what is tested
CFG = dataclasses.replace(
    TINY,
    text=dataclasses.replace(TINY.text, vocab=128, layers=3, width=16, mlp_width=24),
    vision=dataclasses.replace(TINY.vision, patch=2, layers=3, out_width=16),
    image_token=120,
    vision_start=121,
    vision_end=122,
    video_token=123,
)
NETWORKS = Networks(LanguageModel(CFG.text), Vision(CFG.vision), chunk=8)
LEVELS = np.tile((np.arange(256) / 127.5 - 1).astype(np.float32), (3, 1))
FROZEN = {"levels": jnp.asarray(LEVELS)}


@functools.cache
def params():
    """Random parameters under which attention is sharp and every part matters."""
    rng = np.random.default_rng(0)

    def draw(path, shape):
        noise = rng.standard_normal(shape).astype(np.float32)
        if path.endswith(("scale", "bias")):
            return (1.0 if path.endswith("scale") else 0.0) + 0.2 * noise
        if path.endswith("embedding"):
            return noise
        layers = path.split("/")[1] in ("layers", "blocks", "deepstack_merger_list")
        inputs = shape[int(layers)] if "patch_embed" not in path else np.prod(shape[:-1])
        return 1.5 * noise / np.sqrt(inputs)

    shapes = flatten(abstract_params(CFG))
    return unflatten({path: draw(path, leaf.shape) for path, leaf in shapes.items()})


def example(*parts, seed=0) -> Example:
    """An example: n tokens are asked, -n answered, (rows, cols) is a picture."""
    rng = np.random.default_rng(seed)
    ids, trained, pictures = [], [], []
    for part in parts:
        if isinstance(part, tuple):
            count = part[0] * part[1]
            patches = rng.integers(0, 256, (count, CFG.vision.patch_width // 2), dtype=np.uint8)
            pictures.append((len(ids) + 1, Picture(patches, part)))
            ids += [CFG.vision_start, *[CFG.image_token] * (count // 4), CFG.vision_end]
        else:
            ids += rng.integers(1, 120, abs(part)).tolist()
        trained += [part < 0 if isinstance(part, int) else False] * (len(ids) - len(trained))
    ids = np.array(ids, np.int32)
    positions, _ = position_ids(ids, [p.grid for _, p in pictures], CFG)
    return Example(ids, np.array(trained), positions, tuple(pictures))


@functools.cache
def examples() -> tuple[Example, ...]:
    """Text alone, one token, pictures first and last, several turns."""
    parts = [
        (3, (4, 6), 2, -5),
        (1, -1),
        ((2, 2), 2, -3, (8, 4), 1, -7),
        (7, -4),
        (2, (4, 4), (2, 6), (2, 2), 1, -2, 5, -6),
        (2, -9, (6, 4), -1),
    ]
    return tuple(example(*p, seed=i) for i, p in enumerate(parts))


def step(*rows, accumulation=1, tokens=40, images=4, patches=64) -> Step:
    """A step of rows of indices."""
    table = np.full((len(rows), max(map(len, rows), default=0) or 1), FILLING)
    for place, row in zip(table, rows, strict=True):
        place[: len(row)] = row
    shape = Shape(tokens, images, patches)
    return Step(shape, table.reshape(accumulation, len(rows) // accumulation, -1))


def first(batch):
    """The first micro-batch."""
    return jax.tree.map(lambda x: x[0], batch)
