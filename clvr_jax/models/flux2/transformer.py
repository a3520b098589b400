"""The FLUX.2 klein transformer: double-stream blocks, single-stream blocks, shared modulation.

Reference: BFL `model.py`, diffusers `transformer_flux2.py`. Parameter names follow BFL's, except
that what it stores fused is stored by its parts, so that tensor parallelism never reshards inside a
block.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from clvr_jax.kernels.attention import attend
from clvr_jax.models.flux2.config import TransformerConfig
from clvr_jax.models.flux2.layout import Layout, Plan, lower, rotary
from clvr_jax.models.layers import Linear, RMSNorm, layer_norm, sinusoid, stack
from clvr_jax.parallel import constrain
from clvr_jax.typing import Array, Float, Latents, Params, Times, Tokens

Cache = Mapping[str, tuple[Any, Any]]  # per kind of block: keys and values (layer, b, m, h, k)


class Modulation(NamedTuple):
    """Parts (shift, scale, gate, ...) at the current t, and at t = 0 where a pattern needs them."""

    now: Float[Array, "b parts d"]
    zero: Float[Array, "b parts d"] | None


class Transformer(nn.Module):
    """Velocity of the noise tokens given text features, references and the noise level.

    Attributes:
      cfg: sizes.
      remat: what the backward pass keeps of a block (`clvr_jax.models.layers.REMAT`).
      implementation: attention implementation, None to choose by device and shape.
      scan: stacked parameters and so many traced blocks, or 0 for blocks apart (`layers.stack`).
    """

    cfg: TransformerConfig
    remat: str = "none"
    implementation: str | None = None
    scan: int = 1

    def __call__(
        self,
        image: Latents,
        text: Float[Array, "b s features"],
        t: Times,
        layout: Layout,
        cache: Cache | None = None,
    ) -> Float[Array, "b noise c"]:
        """Return dx/dt = noise - data for the noise tokens.

        Args:
          image: noise tokens, then the tokens of `layout.references`.
          text: text features, `layout.text` of them, padding included.
          t: noise level; multiplied by 1000 inside.
          layout: what the sequence holds.
          cache: keys and values of `layout.cached`, from `encode_references`.

        Raises:
          ValueError: the arrays do not have the lengths that `layout` says.
        """
        return self._forward(image, text, t, layout, cache)[0]

    def encode_references(
        self, references: Latents, layout: Layout, cache: Cache | None = None
    ) -> Cache:
        """Return keys and values of `layout.cached` and `layout.references`, in that order.

        Raises:
          ValueError: the pattern does not allow a cache, or lengths differ from the layout's.
        """
        layout = layout.references_only()
        b = references.shape[0]
        text = jnp.zeros((b, 0, self.cfg.text_width), references.dtype)
        new = self._forward(references, text, jnp.zeros(b), layout, cache)[1]
        if cache is None:
            return new
        return jax.tree.map(lambda old, add: jnp.concatenate([old, add], axis=2), cache, new)

    @nn.compact
    def _forward(self, image, text, t, layout, cache):
        c = self.cfg
        _check(image, text, layout, cache)
        plan = lower(layout)
        at = self._modulations(t, plan, image.dtype)
        rope = rotary(layout, c.rope_axes, c.rope_theta)
        x = constrain(Linear(c.width, name="img_in")(image), "batch", "tokens", None)
        y = constrain(Linear(c.width, name="txt_in")(text), "batch", "tokens", None)
        past = cache or {"double_blocks": None, "single_blocks": None}
        fields = (c, plan, self.implementation)

        axes = (0, nn.broadcast, nn.broadcast, nn.broadcast)
        blocks = stack(DoubleBlock, c.double_blocks, axes, scan=self.scan, remat=self.remat)
        (x, y), double = blocks("double_blocks", *fields)(
            (x, y),
            past["double_blocks"],
            at["double_stream_modulation_img"],
            at["double_stream_modulation_txt"],
            rope,
        )
        z = _hidden(jnp.concatenate([y, x], axis=1))
        axes = (0, nn.broadcast, nn.broadcast)
        blocks = stack(SingleBlock, c.single_blocks, axes, scan=self.scan, remat=self.remat)
        z, single = blocks("single_blocks", *fields)(
            z, past["single_blocks"], at["single_stream_modulation"], rope
        )
        x = z[:, layout.text : layout.text + layout.noise_tokens]
        out = FinalLayer(c, name="final_layer")(x, at["vec"])
        return out, {"double_blocks": double, "single_blocks": single}

    def _modulations(self, t, plan: Plan, dtype) -> dict[str, Any]:
        """The conditioning vector and the three modulations that all blocks share."""
        c = self.cfg
        embed = TimeEmbedding(c, name="time_in")
        vec, zero = embed(t, dtype), None
        if plan.zero is not None:
            zero = embed(jnp.zeros_like(t), dtype)
        at: dict[str, Any] = {"vec": vec}
        parts = {"double_stream_modulation_img": 6, "double_stream_modulation_txt": 6}
        for name, count in {**parts, "single_stream_modulation": 3}.items():
            lin = SharedModulation(count, c.width, name=name)
            at[name] = Modulation(lin(vec), None if zero is None else lin(zero))
        return at


class TimeEmbedding(nn.Module):
    """The conditioning vector of a noise level: sinusoid of 1000 t, then a two-layer MLP."""

    cfg: TransformerConfig

    @nn.compact
    def __call__(self, t: Times, dtype) -> Float[Array, "b d"]:
        h = sinusoid(t * 1000.0, self.cfg.time_width).astype(dtype)
        h = nn.silu(Linear(self.cfg.width, name="in_layer")(h))
        return Linear(self.cfg.width, name="out_layer")(h)


class SharedModulation(nn.Module):
    """`count` vectors for all blocks of a kind."""

    count: int
    width: int

    @nn.compact
    def __call__(self, vec: Float[Array, "b d"]) -> Float[Array, "b parts d"]:
        return Linear((self.count, self.width), name="lin")(nn.silu(vec))


class Stream(nn.Module):
    """The projections of one stream of a double block, or of a single block."""

    cfg: TransformerConfig
    plan: Plan
    implementation: str | None

    def setup(self):
        c = self.cfg
        self.qkv = Linear((3, c.heads, c.head_width))
        self.query_norm = RMSNorm(c.eps)
        self.key_norm = RMSNorm(c.eps)
        self.attn_out = Linear(c.width)
        self.mlp_in = Linear((2, c.mlp_width))
        self.mlp_out = Linear(c.width)

    def heads(self, h: Tokens) -> tuple[Float[Array, "b l h k"], ...]:
        """Queries and keys, normalised per head, and values."""
        qkv = constrain(self.qkv(h), "batch", "tokens", None, "heads", None)
        q, k, v = jnp.moveaxis(qkv, 2, 0)
        return self.query_norm(q), self.key_norm(k), v

    def merge(self, out: Float[Array, "b l h k"]) -> Tokens:
        """Project attention output back to the stream."""
        return self.attn_out(einops.rearrange(out, "b l h k -> b l (h k)"))

    def mlp(self, h: Tokens) -> Tokens:
        """Gated MLP: silu(gate) * up."""
        gate, up = jnp.moveaxis(constrain(self.mlp_in(h), "batch", "tokens", None, "mlp"), 2, 0)
        return self.mlp_out(nn.silu(gate) * up)


class DoubleBlock(nn.Module):
    """Text and image streams with their own weights, joined in attention."""

    cfg: TransformerConfig
    plan: Plan
    implementation: str | None

    @nn.compact
    def __call__(self, carry, cache, img_mod: Modulation, txt_mod: Modulation, rope):
        x, y = carry
        c, s = self.cfg, carry[1].shape[1]
        img = Stream(c, self.plan, self.implementation, name="img")
        txt = Stream(c, self.plan, self.implementation, name="txt")
        zero = _shift(self.plan.zero, -s)
        img_at = lambda part: _part(img_mod, part, x.shape[1], zero)
        txt_at = lambda part: _part(txt_mod, part, s, None)

        heads_x = img.heads(modulate(x, img_at(0), img_at(1), c.eps))
        heads_y = txt.heads(modulate(y, txt_at(0), txt_at(1), c.eps))
        q, k, v = (jnp.concatenate(pair, axis=1) for pair in zip(heads_y, heads_x))
        q, k = rotate(q, rope), rotate(k, rope)
        out = attend_plan(q, k, v, self.plan, cache, self.implementation)
        x = x + img_at(2) * img.merge(out[:, s:])
        y = y + txt_at(2) * txt.merge(out[:, :s])
        x = x + img_at(5) * img.mlp(modulate(x, img_at(3), img_at(4), c.eps))
        y = y + txt_at(5) * txt.mlp(modulate(y, txt_at(3), txt_at(4), c.eps))
        return (_hidden(x), _hidden(y)), _kept(k, v, self.plan)


class SingleBlock(Stream):
    """Attention and MLP in parallel on the joint sequence."""

    def __call__(self, z: Tokens, cache, mod: Modulation, rope):
        at = lambda part: _part(mod, part, z.shape[1], self.plan.zero)
        h = modulate(z, at(0), at(1), self.cfg.eps)
        q, k, v = self.heads(h)
        q, k = rotate(q, rope), rotate(k, rope)
        out = attend_plan(q, k, v, self.plan, cache, self.implementation)
        z = z + at(2) * (self.merge(out) + self.mlp(h))
        return _hidden(z), _kept(k, v, self.plan)


class FinalLayer(nn.Module):
    """Adaptive LayerNorm (shift, then scale, as BFL stores them) and the output projection."""

    cfg: TransformerConfig

    @nn.compact
    def __call__(self, x: Tokens, vec: Float[Array, "b d"]) -> Latents:
        c = self.cfg
        parts = Linear((2, c.width), name="adaLN_modulation")(nn.silu(vec))
        h = modulate(x, parts[:, :1], parts[:, 1:], c.eps)
        return Linear(c.channels, name="linear")(h)


def modulate(x: Tokens, shift, scale, eps: float) -> Tokens:
    """(1 + scale) LN(x) + shift in float32, rounded once."""
    h = layer_norm(x, eps) * (1 + scale.astype(jnp.float32)) + shift.astype(jnp.float32)
    return h.astype(x.dtype)


def rotate(x: Float[Array, "b l h k"], rope) -> Float[Array, "b l h k"]:
    """Rotate the interleaved pairs (2m, 2m + 1) by angle m of each token, in float32."""
    cos, sin = (table[:, None] for table in rope)
    pairs = einops.rearrange(x.astype(jnp.float32), "b l h (m two) -> b l h m two", two=2)
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def attend_plan(q, k, v, plan: Plan, cache, implementation) -> Float[Array, "b l h k"]:
    """Run a plan's attention calls; cached keys are joined, not concatenated."""
    outs = []
    for call in plan.calls:
        keys = [k[:, start:stop] for start, stop in call.keys]
        values = [v[:, start:stop] for start, stop in call.keys]
        if call.cache:
            keys.append(cache[0])
            values.append(cache[1])
        start, stop = call.query
        outs.append(attend(q[:, start:stop], keys, values, implementation=implementation))
    return checkpoint_name(jnp.concatenate(outs, axis=1), "attention")


def _part(mod: Modulation, part: int, length: int, zero: tuple[int, int] | None):
    """One part of a modulation, per token where some tokens are at t = 0."""
    now = mod.now[:, part : part + 1]
    if zero is None:
        return now
    index = jnp.arange(length)[:, None]
    return jnp.where((index >= zero[0]) & (index < zero[1]), mod.zero[:, part : part + 1], now)


def _shift(span, by: int):
    return None if span is None else (span[0] + by, span[1] + by)


def _hidden(x: Tokens) -> Tokens:
    return constrain(x, "batch", "tokens", None)


def _kept(k, v, plan: Plan):
    """Keys and values of the references, for the cache (empty unless the pattern allows one)."""
    start, stop = plan.zero or (0, 0)
    return k[:, start:stop], v[:, start:stop]


def _check(image, text, layout: Layout, cache) -> None:
    given = (
        image.shape[1],
        text.shape[1],
        0 if cache is None else cache["single_blocks"][0].shape[2],
    )
    expected = (layout.image_tokens, layout.text, layout.cached_tokens)
    if given != expected:
        raise ValueError(f"image, text and cached tokens are {given}, but {layout} has {expected}")


def abstract_params(cfg: TransformerConfig, dtype=jnp.float32) -> Params:
    """Return the parameter tree as shapes, without allocating anything."""
    layout = Layout(text=1, noise=(1, 1))

    def init():
        image, text = jnp.zeros((1, 1, cfg.channels)), jnp.zeros((1, 1, cfg.text_width))
        return Transformer(cfg).init(jax.random.key(0), image, text, jnp.zeros(1), layout)

    shapes = jax.eval_shape(init)["params"]
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)
