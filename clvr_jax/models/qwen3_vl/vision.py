"""Qwen3-VL's vision tower: patches of stills to token features and DeepStack features.

Reference: transformers `modeling_qwen3_vl.py`, class Qwen3VLVisionModel.
"""

from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from clvr_jax.kernels.attention import attend
from clvr_jax.models.layers import (
    LayerNorm,
    Linear,
    biased_product,
    rotary_frequencies,
    stack,
)
from clvr_jax.models.qwen3.decoder import rotate_half
from clvr_jax.models.qwen3_vl.config import VISION_EPS, VISION_ROPE_THETA, VisionConfig
from clvr_jax.parallel import constrain
from clvr_jax.typing import Array, Float, Int, Tokens

Grid = tuple[int, int]  # rows and columns of an image in patches


@struct.dataclass
class Places:
    """What depends on the images' sizes alone, per image and patch, patches cell by cell.

    Attributes:
      taps: the four rows of the position table that surround a patch (b, p, 4).
      weights: their bilinear weights (b, p, 4).
      rows: row and column of a patch (b, p, 2).
      lengths: real patches of each image (b,); the rest is padding.
    """

    taps: Any
    weights: Any
    rows: Any
    lengths: Any


class Vision(nn.Module):
    """Patches to features of the language model's width.

    Attributes:
      cfg: sizes.
      remat: what the backward pass keeps of a block.
      implementation: attention implementation, None to choose by device and shape.
      scan: stacked parameters and one traced block, or unrolled blocks.
    """

    cfg: VisionConfig
    remat: str = "none"
    implementation: str | None = None
    scan: int = 1

    @nn.compact
    def __call__(
        self, patches: Float[Array, "b p pixels"], places: Places
    ) -> Float[Array, "b n parts out"]:
        """Return features of every cell: part 0 for the embedding, then DeepStack's, in order.

        Args:
          patches: normalised pixels of a patch, (channel, time, y, x); for stills, whose frames are
            equal, (channel, y, x) does as well and costs half. An image is attended by itself.
          places: of these images.
        """
        c = self.cfg
        x = PatchEmbed(c, name="patch_embed")(patches)
        x = x + PositionTable(c, name="pos_embed")(places.taps, places.weights).astype(x.dtype)
        x = constrain(x, "batch", "tokens", None)
        kept = jnp.zeros((len(c.deepstack), *x.shape), x.dtype)
        wanted = jnp.asarray(c.deepstack, jnp.int32)[:, None, None, None]
        blocks = stack(Block, c.layers, (0, *(nn.broadcast,) * 3), scan=self.scan, remat=self.remat)
        (x, kept), _ = blocks("blocks", c, self.implementation)(
            (x, kept), jnp.arange(c.layers), angles(places.rows, c), places.lengths, wanted
        )
        parts = Merger(c, name="merger")(None, x)[1][None]
        if c.deepstack:
            mergers = stack(Merger, len(c.deepstack), 0, scan=self.scan)
            _, later = mergers("deepstack_merger_list", c, True)(None, kept)
            parts = jnp.concatenate([parts, later])
        return jnp.moveaxis(parts, 0, 2)


class PatchEmbed(nn.Module):
    """One product per patch: the reference's convolution, whose stride is its kernel."""

    cfg: VisionConfig

    @nn.compact
    def __call__(self, patches: Float[Array, "b p pixels"]) -> Tokens:
        c = self.cfg
        shape = (c.in_channels, c.temporal_patch, c.patch, c.patch, c.width)
        init = lambda key, shape: jax.random.normal(key, shape) * c.patch_width**-0.5
        kernel = self.param("kernel", init, shape)
        bias = self.param("bias", nn.initializers.zeros, (c.width,))
        if patches.shape[-1] * c.temporal_patch == c.patch_width:
            kernel = jnp.sum(kernel.astype(jnp.float32), axis=1)
        kernel = kernel.reshape(-1, c.width).astype(patches.dtype)
        return biased_product(patches, kernel, bias)


class PositionTable(nn.Module):
    """Bilinear lookup in a square table, weighted and summed in float32."""

    cfg: VisionConfig

    @nn.compact
    def __call__(self, taps: Int[Array, "b p 4"], weights: Float[Array, "b p 4"]):
        shape = (self.cfg.positions, self.cfg.width)
        table = self.param("embedding", nn.initializers.normal(1.0), shape)
        # a few MB; spread by columns, what every device looks up would be exchanged instead
        table = constrain(table, None, None)
        rows = jnp.take(table, taps, axis=0).astype(jnp.float32)
        return jnp.sum(rows * weights[..., None], axis=2)


class Block(nn.Module):
    """Pre-norm attention within an image and an MLP; keeps the stream if its number is wanted."""

    cfg: VisionConfig
    implementation: str | None

    @nn.compact
    def __call__(self, carry, number, turns, lengths, wanted):
        x, kept = carry
        c = self.cfg
        h = LayerNorm(VISION_EPS, name="norm1")(x)
        x = x + Attention(c, self.implementation, name="attn")(h, turns, lengths)
        h = LayerNorm(VISION_EPS, name="norm2")(x)
        x = constrain(x + Mlp(c, name="mlp")(h), "batch", "tokens", None)
        return (x, jnp.where(wanted == number, x, kept)), None


class Attention(nn.Module):
    """Full attention over an image's patches; the whole head is rotated by row and column."""

    cfg: VisionConfig
    implementation: str | None

    @nn.compact
    def __call__(self, x: Tokens, turns, lengths) -> Tokens:
        c = self.cfg
        qkv = Linear((3, c.heads, c.head_width), bias=True, name="qkv")(x)
        q, k, v = (constrain(qkv[:, :, i], "batch", "tokens", "heads", None) for i in range(3))
        q, k = rotate_half(q, turns), rotate_half(k, turns)
        out = attend(q, k, v, lengths=lengths, implementation=self.implementation)
        out = checkpoint_name(out, "attention")
        out = einops.rearrange(out, "b l h k -> b l (h k)")
        return Linear(c.width, bias=True, name="proj")(out)


class Mlp(nn.Module):
    """Two products around GELU in its tanh form."""

    cfg: VisionConfig

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        h = Linear(self.cfg.mlp_width, bias=True, name="linear_fc1")(x)
        h = constrain(nn.gelu(h, approximate=True), "batch", "tokens", "mlp")
        return Linear(self.cfg.width, bias=True, name="linear_fc2")(h)


class Merger(nn.Module):
    """A cell of patches to one feature; GELU here is the exact one.

    The main merger normalises each patch and then joins them; DeepStack's join first.
    """

    cfg: VisionConfig
    joined_norm: bool = False

    @nn.compact
    def __call__(self, carry, x: Float[Array, "b p d"]):
        join = lambda h: einops.rearrange(h, "b (n cell) d -> b n (cell d)", cell=self.cfg.cell)
        norm = LayerNorm(VISION_EPS, name="norm")
        # said here as well, or XLA gathers the cells of all images rather than the kernels
        x = constrain(norm(join(x)) if self.joined_norm else join(norm(x)), "batch", "tokens", None)
        h = Linear(x.shape[-1], bias=True, name="linear_fc1")(x)
        h = constrain(nn.gelu(h, approximate=False), "batch", "tokens", "mlp")
        out = Linear(self.cfg.out_width, bias=True, name="linear_fc2")(h)
        return carry, constrain(out, "batch", "tokens", None)


def angles(rows: Int[Array, "b p 2"], cfg: VisionConfig) -> Float[Array, "b p half"]:
    """Return rotary angles: the first half of the frequencies turns with the row."""
    frequencies = rotary_frequencies(cfg.head_width // 2, VISION_ROPE_THETA)
    turns = rows.astype(jnp.float32)[..., None] * frequencies
    return einops.rearrange(turns, "b p two j -> b p (two j)")


def places(grids: list[Grid], cfg: VisionConfig, patches: int | None = None) -> Places:
    """Return what the tower needs to know of images of these sizes (numpy).

    Args:
      grids: rows and columns of each image in patches.
      cfg: sizes.
      patches: places of each image, padding included; None for the largest image.

    Raises:
      ValueError: an image is not a whole number of cells, or does not fit.
    """
    count = patches or max(rows * cols for rows, cols in grids)
    b = len(grids)
    out = Places(
        taps=np.zeros((b, count, 4), np.int32),
        weights=np.zeros((b, count, 4), np.float32),
        rows=np.zeros((b, count, 2), np.int32),
        lengths=np.zeros(b, np.int32),
    )
    for i, (rows, cols) in enumerate(grids):
        if rows % cfg.merge or cols % cfg.merge or not 0 < rows * cols <= count:
            raise ValueError(
                f"an image of {rows} x {cols} patches: both must be positive multiples of "
                f"{cfg.merge}, and at most {count} patches together"
            )
        own = rows * cols
        order = patch_order(rows, cols, cfg.merge)
        row, col = order // cols, order % cols
        (low_r, high_r, part_r), (low_c, high_c, part_c) = (
            _taps(row, rows, cfg.side),
            _taps(col, cols, cfg.side),
        )
        taps = [r * cfg.side + c for r in (low_r, high_r) for c in (low_c, high_c)]
        weights = [r * c for r in (1 - part_r, part_r) for c in (1 - part_c, part_c)]
        out.taps[i, :own], out.weights[i, :own] = np.stack(taps, -1), np.stack(weights, -1)
        out.rows[i, :own], out.lengths[i] = np.stack([row, col], -1), own
    return out


def patch_order(rows: int, cols: int, merge: int) -> np.ndarray:
    """Return the raster index of every patch in cell order: cells row by row, then within each."""
    raster = np.arange(rows * cols).reshape(rows // merge, merge, cols // merge, merge)
    return raster.transpose(0, 2, 1, 3).reshape(-1)


def _taps(index: np.ndarray, size: int, side: int):
    """Lower tap, upper tap and weight of the upper one: the table's ends lie on the image's ends.

    In float32 throughout, as the reference computes it.
    """
    source = index.astype(np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))
    low = np.floor(source)
    taps = low.astype(np.int32)
    return taps, np.minimum(taps + 1, side - 1), (source - low).astype(np.float32)
