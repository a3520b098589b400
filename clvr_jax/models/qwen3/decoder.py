"""The Qwen3 decoder as a text encoder: hidden states after chosen layers, nothing beyond them.

Reference: transformers `modeling_qwen3.py`, and diffusers' `_get_qwen3_prompt_embeds` for klein.
"""

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from clvr_jax.kernels.attention import attend
from clvr_jax.models.layers import Linear, RMSNorm, stack
from clvr_jax.models.qwen3.config import Qwen3Config
from clvr_jax.parallel import constrain
from clvr_jax.typing import Array, Float, Int, Params, Tokens

KLEIN_LAYERS = (9, 18, 27)  # hidden states that klein reads: after this many layers


class Decoder(nn.Module):
    """A causal decoder over right-padded token ids.

    Attributes:
      cfg: sizes; `cfg.layers` may be fewer than the checkpoint's where later ones are not used.
      remat: what the backward pass keeps of a layer (`clvr_jax.models.layers.REMAT`).
      implementation: attention implementation, None to choose by device and shape.
      scan: stacked parameters and one traced layer, or unrolled layers.
    """

    cfg: Qwen3Config
    remat: str = "none"
    implementation: str | None = None
    scan: bool = True

    @nn.compact
    def __call__(
        self,
        ids: Int[Array, "b s"],
        lengths: Int[Array, "b"],
        capture: tuple[int, ...] = KLEIN_LAYERS,
    ) -> Float[Array, "b s features"]:
        """Return the residual stream after each layer count in `capture`, side by side.

        Padding is part of the result: a padding row attends the real tokens only (neither itself
        nor other padding), at rotary positions that simply go on. No final norm is applied.

        Args:
          ids: right-padded token ids.
          lengths: real tokens of each row.
          capture: increasing layer counts, at most `cfg.layers`.

        Raises:
          ValueError: `capture` asks for layers that are not there.
        """
        c = self.cfg
        if not capture or list(capture) != sorted(set(capture)) or capture[-1] > c.layers:
            raise ValueError(f"capture {capture} must increase and stay within {c.layers} layers")
        embedding = Embedding(c.vocab, c.width, name="embed_tokens")
        x = constrain(embedding(ids), "batch", None, None)
        angles = _angles(ids.shape[1], c)
        wanted = jnp.asarray(capture)[:, None, None, None]
        kept = jnp.zeros((len(capture), *x.shape), x.dtype)
        layers = stack(
            Layer,
            c.layers,
            (0, nn.broadcast, nn.broadcast, nn.broadcast),
            scan=self.scan,
            remat=self.remat,
        )
        (x, kept), _ = layers("layers", c, self.implementation)(
            (x, kept), jnp.arange(1, c.layers + 1), angles, lengths, wanted
        )
        return einops.rearrange(kept, "n b s d -> b s (n d)")


class Embedding(nn.Module):
    """Rows of a table, float until asked otherwise."""

    vocab: int
    width: int

    @nn.compact
    def __call__(self, ids: Int[Array, "b s"]) -> Tokens:
        table = self.param("embedding", nn.initializers.normal(1.0), (self.vocab, self.width))
        return jnp.take(table, ids, axis=0)


class Layer(nn.Module):
    """Pre-norm attention and gated MLP; keeps the stream if its number is wanted."""

    cfg: Qwen3Config
    implementation: str | None

    @nn.compact
    def __call__(self, carry, number, angles, lengths, wanted):
        x, kept = carry
        c = self.cfg
        h = RMSNorm(c.eps, name="input_layernorm")(x)
        x = x + SelfAttention(c, self.implementation, name="self_attn")(h, angles, lengths)
        h = RMSNorm(c.eps, name="post_attention_layernorm")(x)
        x = constrain(x + Mlp(c, name="mlp")(h), "batch", None, None)
        return (x, jnp.where(wanted == number, x, kept)), None


class SelfAttention(nn.Module):
    """Grouped-query causal attention; queries and keys normalised per head before rotation."""

    cfg: Qwen3Config
    implementation: str | None

    @nn.compact
    def __call__(self, x: Tokens, angles, lengths) -> Tokens:
        c = self.cfg
        split = lambda name, heads: constrain(
            Linear((heads, c.head_width), name=name)(x), "batch", None, "heads", None
        )
        q, k, v = split("q_proj", c.heads), split("k_proj", c.kv_heads), split("v_proj", c.kv_heads)
        q = rotate_half(RMSNorm(c.eps, name="q_norm")(q), angles)
        k = rotate_half(RMSNorm(c.eps, name="k_norm")(k), angles)
        out = attend(q, k, v, causal=True, lengths=lengths, implementation=self.implementation)
        out = checkpoint_name(out, "attention")
        return Linear(c.width, name="o_proj")(einops.rearrange(out, "b l h k -> b l (h k)"))


class Mlp(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    cfg: Qwen3Config

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        gate = Linear(self.cfg.mlp_width, name="gate_proj")(x)
        up = Linear(self.cfg.mlp_width, name="up_proj")(x)
        h = constrain(nn.silu(gate) * up, "batch", None, "mlp")
        return Linear(self.cfg.width, name="down_proj")(h)


class _Rest(nn.Module):
    """What a whole checkpoint has beside the layers: final norm and, if untied, the head."""

    cfg: Qwen3Config

    @nn.compact
    def __call__(self, x: Tokens):
        x = RMSNorm(self.cfg.eps, name="norm")(x)
        return x if self.cfg.tied else Linear(self.cfg.vocab, name="lm_head")(x)


def rotate_half(x: Float[Array, "b l h k"], angles: Float[Array, "l half"]):
    """Rotate channel j with channel j + k/2 by angle j of each position, in float32."""
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def _angles(length: int, cfg: Qwen3Config) -> Float[Array, "l half"]:
    # float32: bfloat16 rounds position 257 to 256
    exponent = jnp.arange(0, cfg.head_width, 2, dtype=jnp.float32) / cfg.head_width
    return jnp.arange(length, dtype=jnp.float32)[:, None] / cfg.rope_theta**exponent


def abstract_params(cfg: Qwen3Config, dtype=jnp.float32, *, head: bool = True) -> Params:
    """Return the parameter tree as shapes; with `head`, final norm and untied head included."""

    def init():
        key, ids = jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
        params = Decoder(cfg).init(key, ids, jnp.ones(1, jnp.int32), (cfg.layers,))["params"]
        if head:
            params |= _Rest(cfg).init(key, jnp.zeros((1, 1, cfg.width)))["params"]
        return params

    shapes = jax.eval_shape(init)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)
