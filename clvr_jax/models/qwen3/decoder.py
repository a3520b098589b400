"""Qwen3's layers, and its decoder as a text encoder: hidden states after chosen layers.

Reference: transformers `modeling_qwen3.py`, and diffusers' `_get_qwen3_prompt_embeds` for klein.
`language.py` is the same layers as a language model.
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
from clvr_jax.models.layers import Linear, RMSNorm, rotary_frequencies, stack
from clvr_jax.models.qwen3.cache import KV, attend_cached
from clvr_jax.models.qwen3.config import Qwen3Config
from clvr_jax.parallel import constrain
from clvr_jax.typing import Array, Float, Int, Tokens


@struct.dataclass
class Context:
    """What every layer is given besides its input.

    Attributes:
      angles: rotary angles (rows, l, half), rows being b, or 1 for the same positions in every row.
      lengths: real tokens of each right-padded row, or None where none is padding.
      offset: tokens of each row that are cached already, with a cache.
      wanted: layer counts after which the stream is kept (n, 1, 1, 1), or None.
      deepstack: (n, b, l, d), entry i is added to the output of layer i, or None.
      segments: sequence that each token of a packed row belongs to (b, l), 0 for padding, or None.
      fresh: the cache holds nothing yet, so that only the new tokens are attended.
    """

    angles: Any
    lengths: Any = None
    offset: Any = None
    wanted: Any = None
    deepstack: Any = None
    segments: Any = None
    fresh: bool = struct.field(pytree_node=False, default=False)


class Decoder(nn.Module):
    """A causal decoder over right-padded token ids.

    Attributes:
      cfg: sizes; `cfg.layers` may be fewer than the checkpoint's where later ones are not used.
      remat: what the backward pass keeps of a layer (`clvr_jax.models.layers.REMAT`).
      implementation: attention implementation, None to choose by device and shape.
      scan: stacked parameters and so many traced layers, or 0 for layers apart (`layers.stack`).
    """

    cfg: Qwen3Config
    remat: str = "none"
    implementation: str | None = None
    scan: int = 1

    @nn.compact
    def __call__(
        self,
        ids: Int[Array, "b s"],
        lengths: Int[Array, "b"],
        capture: tuple[int, ...] | None = None,
    ) -> Float[Array, "b s features"]:
        """Return the residual stream after each layer count in `capture`, side by side.

        Padding is part of the result: a padding row attends the real tokens only (neither itself
        nor other padding), at rotary positions that simply go on. No final norm is applied.

        Args:
          ids: right-padded token ids.
          lengths: real tokens of each row.
          capture: increasing layer counts, at most `cfg.layers`; None for `cfg.features`.

        Raises:
          ValueError: `capture` asks for layers that are not there.
        """
        c = self.cfg
        capture = c.features if capture is None else capture
        if not capture or list(capture) != sorted(set(capture)) or capture[-1] > c.layers:
            raise ValueError(f"capture {capture} must increase and stay within {c.layers} layers")
        x = constrain(
            Embedding(c.vocab, c.width, name="embed_tokens")(ids), "batch", "tokens", None
        )
        context = Context(
            angles=angles(jnp.arange(ids.shape[1])[None], c),
            lengths=lengths,
            wanted=jnp.asarray(capture)[:, None, None, None],
        )
        kept = jnp.zeros((len(capture), *x.shape), x.dtype)
        layers = stack(Layer, c.layers, (0, nn.broadcast), scan=self.scan, remat=self.remat)
        (x, kept), _ = layers("layers", c, self.implementation)(
            (x, kept), (jnp.arange(1, c.layers + 1), None), context
        )
        return einops.rearrange(kept, "n b s d -> b s (n d)")


class Embedding(nn.Module):
    """Rows of a table, float until asked otherwise."""

    vocab: int
    width: int

    @nn.compact
    def __call__(self, ids: Int[Array, "b s"]) -> Tokens:
        table = self.param("embedding", nn.initializers.normal(1.0), (self.vocab, self.width))
        if ids.size >= self.vocab:
            # either is exchanged, the tokens of all devices or their columns of the table: the less
            table = constrain(table, "vocab", None)
        return jnp.take(table, ids, axis=0)


class Layer(nn.Module):
    """Pre-norm attention and gated MLP; keeps the stream if its number is wanted.

    The call takes ((stream, kept streams), (number from 1, cache of this layer or None), context)
    and returns ((stream, kept), cache).

    Attributes:
      cfg: sizes.
      implementation: attention implementation, None to choose.
      fused: kernels that read the same input lie in one (`serving.prepare`).
    """

    cfg: Qwen3Config
    implementation: str | None
    fused: bool = False

    @nn.compact
    def __call__(self, carry, layer, context: Context):
        (x, kept), (number, cache) = carry, layer
        c = self.cfg
        h = RMSNorm(c.eps, name="input_layernorm")(x)
        attention = SelfAttention(c, self.implementation, self.fused, name="self_attn")
        h, cache = attention(h, context, cache)
        x = x + h
        h = RMSNorm(c.eps, name="post_attention_layernorm")(x)
        x = constrain(x + Mlp(c, self.fused, name="mlp")(h), "batch", "tokens", None)
        if context.wanted is not None:
            kept = jnp.where(context.wanted == number, x, kept)
        if context.deepstack is not None:  # after keeping: captured states are without it
            x = x + _deepstack(context.deepstack, number)
        return (x, kept), cache


class SelfAttention(nn.Module):
    """Grouped-query causal attention; queries and keys normalised per head before rotation."""

    cfg: Qwen3Config
    implementation: str | None
    fused: bool = False

    @nn.compact
    def __call__(self, x: Tokens, context: Context, cache: KV | None) -> tuple[Tokens, KV | None]:
        c = self.cfg
        q, k, v = self._heads(x)
        q = rotate_half(RMSNorm(c.eps, name="q_norm")(q), context.angles)
        k = rotate_half(RMSNorm(c.eps, name="k_norm")(k), context.angles)
        if cache is not None:
            cache = cache.write(k, v, context.offset)
        if cache is None or context.fresh:
            masks = {"lengths": context.lengths, "segments": context.segments}
            out = attend(q, k, v, causal=True, **masks, implementation=self.implementation)
        else:
            out = attend_cached(q, cache, context.offset, self.implementation)
        out = checkpoint_name(out, "attention")
        out = einops.rearrange(out, "b l h k -> b l (h k)")
        return Linear(c.width, name="o_proj")(out), cache

    def _heads(self, x: Tokens):
        """Queries (b, l, h, k), keys and values (b, l, g, k) before norm and rotation."""
        c = self.cfg
        if self.fused:
            queries = c.heads // c.kv_heads
            qkv = Linear(c.kv_heads * (queries + 2) * c.head_width, name="qkv_proj")(x)
            qkv = _grouped(qkv, c.kv_heads, queries + 2)
            qkv = constrain(qkv, "batch", "tokens", "heads", None, None)
            q = einops.rearrange(qkv[..., :queries, :], "b l g r k -> b l (g r) k")
            return q, qkv[..., queries, :], qkv[..., queries + 1, :]
        split = lambda name, heads: constrain(
            Linear((heads, c.head_width), name=name)(x), "batch", "tokens", "heads", None
        )
        return split("q_proj", c.heads), split("k_proj", c.kv_heads), split("v_proj", c.kv_heads)


class Mlp(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    cfg: Qwen3Config
    fused: bool = False

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        width, groups = self.cfg.mlp_width, self.cfg.kv_heads
        if self.fused:
            both = _grouped(Linear(2 * width, name="gate_up_proj")(x), groups, 2)
            both = constrain(both, "batch", "tokens", "mlp", None, None)
            h = (nn.silu(both[..., 0, :]) * both[..., 1, :]).reshape(*x.shape[:2], width)
        else:
            gate, up = Linear(width, name="gate_proj")(x), Linear(width, name="up_proj")(x)
            h = nn.silu(gate) * up
        h = constrain(h, "batch", "tokens", "mlp")
        return Linear(self.cfg.width, name="down_proj")(h)


def _grouped(x: Tokens, groups: int, parts: int) -> Float[Array, "b l groups parts _"]:
    # a product first, then groups: XLA would have TPUs copy the kernel into groups instead
    x = jax.lax.optimization_barrier(x)
    return x.reshape(*x.shape[:2], groups, parts, -1)


def rotate_half(x: Float[Array, "b l h k"], angles: Float[Array, "rows l half"]):
    """Rotate channel j with channel j + k/2 by angle j of each position, in float32."""
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def angles(
    positions: Int[Array, "rows l"] | Int[Array, "rows l 3"], cfg: Qwen3Config
) -> Float[Array, "rows l half"]:
    """Return the rotary angles of positions, or of positions along time, height and width.

    With `cfg.mrope_section` the axes are interleaved over the frequencies (M-RoPE of Qwen3-VL):
    frequency j turns with height where j % 3 == 1, with width where j % 3 == 2, as long as
    j < 3 * section of that axis, and with time elsewhere. Source: transformers'
    `modeling_qwen3_vl.py`, `recomposition_frequencies`.
    """
    frequencies = rotary_frequencies(cfg.head_width, cfg.rope_theta)
    places = positions.astype(jnp.float32)  # bfloat16 rounds position 257 to 256
    if positions.ndim == 2:
        return places[..., None] * frequencies
    return jnp.take(places, axes_of_frequencies(cfg), axis=-1) * frequencies


def axes_of_frequencies(cfg: Qwen3Config) -> np.ndarray:
    """Return which axis (0 time, 1 height, 2 width) turns each rotary frequency."""
    _, height, width = cfg.mrope_section or (0, 0, 0)
    j = np.arange(cfg.head_width // 2)
    axes = np.zeros_like(j)
    axes[(j % 3 == 1) & (j < 3 * height)] = 1
    axes[(j % 3 == 2) & (j < 3 * width)] = 2
    return axes


def _deepstack(features, number):
    """Return what is added to the output of layer `number` (from 1): its features, or zero."""
    count = len(features)
    if isinstance(number, int):
        return features[number - 1] if number <= count else jnp.zeros((), features.dtype)
    return jnp.where(number <= count, features[jnp.minimum(number, count) - 1], 0)
