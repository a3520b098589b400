"""Attention over blocks of queries: scores of one block at a time, on any device and dtype."""

import einops
import jax
import jax.numpy as jnp

from clvr_jax.kernels import reference

BLOCK_BYTES = 32 * 2**20  # scores of one block, float32


def block_length(b: int, length: int, heads: int, keys: int) -> int:
    """Return queries per block: a power of two from 16 to 1024, scores near `BLOCK_BYTES`."""
    fitting = BLOCK_BYTES // max(4 * b * heads * keys, 1)
    block = 16
    while block * 2 <= min(fitting, 1024, length):
        block *= 2
    return block


def attention(q, k, v, *, causal=False, lengths=None, residual=False):
    """Return (output (b, l, h, k), residual (b, l, h) or None).

    The backward pass recomputes each block's scores, so nothing of size l x m is ever kept.
    """
    b, length, heads, _ = q.shape
    block = block_length(b, length, heads, k.shape[1])
    blocks = -(-length // block)
    padded = jnp.pad(q, ((0, 0), (0, blocks * block - length), (0, 0), (0, 0)))
    padded = einops.rearrange(padded, "b (n l) h k -> n b l h k", n=blocks)

    # the blocks' gradients of keys and values add up in float32, whatever the operands' type
    wide = jnp.promote_types(k.dtype, jnp.float32)
    k_sum, v_sum = k.astype(wide), v.astype(wide)

    @jax.checkpoint
    def one(args):
        index, part = args
        keys, values = k_sum.astype(k.dtype), v_sum.astype(v.dtype)
        return reference.attention(
            part,
            keys,
            values,
            causal=causal,
            lengths=lengths,
            residual=residual,
            offset=index * block,
        )

    out, lse = jax.lax.map(one, (jnp.arange(blocks), padded))
    out = einops.rearrange(out, "n b l h k -> b (n l) h k")[:, :length]
    if lse is not None:
        lse = einops.rearrange(lse, "n b l h -> b (n l) h")[:, :length]
    return out, lse
