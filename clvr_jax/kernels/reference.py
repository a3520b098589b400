"""Attention written as its definition: the yardstick of the other implementations."""

import einops
import jax
import jax.numpy as jnp


def scores_of(q, k, *, causal, lengths, offset, segments):
    """Return masked scaled scores (b, g, r, l, m), at least float32."""
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    grouped = einops.rearrange(q, "b l (g r) k -> b g r l k", g=k.shape[2])
    scores = jnp.einsum("bgrlk,bmgk->bgrlm", grouped, k, preferred_element_type=dtype)
    scores = scores * (q.shape[-1] ** -0.5)
    keys = jnp.arange(k.shape[1])
    if causal:
        last = (
            jnp.arange(q.shape[1]) if offset is None else offset[:, None] + jnp.arange(q.shape[1])
        )
        seen = keys <= last[..., None]  # (l, m), or (b, l, m) with offsets
        scores = jnp.where(seen if offset is None else seen[:, None, None], scores, -jnp.inf)
    if lengths is not None:
        seen = keys < lengths[:, None]
        scores = jnp.where(seen[:, None, None, None], scores, -jnp.inf)
    if segments is not None:
        seen = segments[0][:, :, None] == segments[1][:, None]
        scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    return scores


def attention(q, k, v, *, causal=False, lengths=None, offset=None, segments=None, residual=False):
    """Return (output (b, l, h, k), residual (b, l, h) or None); float64 operands stay float64."""
    masks = {"causal": causal, "lengths": lengths, "offset": offset, "segments": segments}
    scores = scores_of(q, k, **masks)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bgrlm,bmgk->blgrk", weights, v)
    out = einops.rearrange(out, "b l g r k -> b l (g r) k")
    if not residual:
        return out, None
    lse = jax.nn.logsumexp(scores, axis=-1)
    return out, einops.rearrange(lse, "b g r l -> b l (g r)")
