"""Attention over blocks of queries: scores of one block at a time, on any device and dtype."""

import functools

import einops
import jax
import jax.numpy as jnp

BLOCK_BYTES = 32 * 2**20  # scores of one block of all heads, float32
CPU_ROWS = 512  # queries of a block of one head: its scores stay in cache


def block_rows(b: int, length: int, heads: int, keys: int) -> int:
    """Return queries per block: a power of two from 16 to 1024, scores near `BLOCK_BYTES`."""
    fitting = BLOCK_BYTES // max(4 * b * heads * keys, 1)
    rows = 16
    while rows * 2 <= min(fitting, 1024, length):
        rows *= 2
    return rows


def spans(rows: int, blocks: int) -> list[int]:
    """Return how many keys a block of queries may be given: powers of two blocks, or all."""
    return [rows * min(2**i, blocks) for i in range((blocks - 1).bit_length() + 1)]


def attention(q, k, v, *, causal=False, lengths=None, offset=None, segments=None, residual=False):
    """Return (output (b, l, h, k), residual (b, l, h) or None).

    The backward pass recomputes each block's scores, so nothing of size l x m is ever kept. On
    CPUs heads follow one another, as plain matrix products, and of causal self-attention a block
    meets only the `spans` of keys that hold what it sees; elsewhere heads run together.
    """
    b, length, heads, width = q.shape
    groups = k.shape[2]
    cpu = jax.default_backend() == "cpu"
    rows = min(CPU_ROWS, length) if cpu else block_rows(b, length, heads, k.shape[1])
    blocks = -(-length // rows)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    near = cpu and causal and offset is None and length == k.shape[1]
    sizes = spans(rows, blocks) if near else [k.shape[1]]
    beyond = ((0, 0), (0, blocks * rows - length))
    # the blocks' gradients of keys and values add up in float32, whatever the operands' type
    k_sum, v_sum = (einops.rearrange(x.astype(wide), "b m g k -> (b g) k m") for x in (k, v))
    if near:  # a block's keys end where it ends
        k_sum, v_sum = (jnp.pad(x, ((0, 0), *beyond)) for x in (k_sum, v_sum))
    padded = jnp.pad(q, (*beyond, (0, 0), (0, 0)))
    queries = einops.rearrange(padded, "b (n l) (g r) k -> n (b g) (r l) k", n=blocks, g=groups)
    real = None if lengths is None else jnp.repeat(lengths, groups)
    first = None if offset is None else jnp.repeat(offset, groups)
    query_ids = key_ids = None
    if segments is not None:
        # queries beyond the end go with the last one: a row that sees nothing would be 0 / 0
        ids = jnp.repeat(jnp.pad(segments[0], beyond, mode="edge"), groups, axis=0)
        query_ids = einops.rearrange(ids, "bg (n l) -> n bg l", n=blocks)
        key_ids = ids if near else jnp.repeat(segments[1], groups, axis=0)

    def attend(places, index, part, ids, keys, values, count, start, segment):
        scores = jnp.matmul(part, keys.astype(k.dtype), preferred_element_type=wide)
        scores = scores * width**-0.5
        if count is not None:
            scores = jnp.where(places < count, scores, -jnp.inf)
        if causal:
            row = index * rows + jnp.arange(part.shape[0]) % rows + (0 if start is None else start)
            scores = jnp.where(places <= row[:, None], scores, -jnp.inf)
        if ids is not None:
            seen = jnp.tile(ids, part.shape[0] // rows)[:, None] == segment
            scores = jnp.where(seen, scores, -jnp.inf)
        top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        out = jnp.matmul(
            weights.astype(v.dtype), values.astype(v.dtype).T, preferred_element_type=wide
        )
        return (out / total).astype(q.dtype), (jnp.log(total) + top)[:, 0]

    def head(index, part, ids, keys, values, count, start, segment):
        if len(sizes) == 1:
            places = jnp.arange(keys.shape[1])
            return attend(places, index, part, ids, keys, values, count, start, segment)
        end = (index + 1) * rows
        # the first key of the segments that these queries are of
        earliest = 0 if ids is None else jnp.argmax(ids[:, None] == segment, axis=1).min()

        def among(size, part, ids, keys, values, count, segment):
            begin = jnp.maximum(end - size, 0)
            cut = lambda x: x if x is None else jax.lax.dynamic_slice_in_dim(x, begin, size, -1)
            places = begin + jnp.arange(size)
            return attend(
                places, index, part, ids, cut(keys), cut(values), count, start, cut(segment)
            )

        enough = jnp.sum(end - earliest > jnp.asarray(sizes[:-1]))
        # without checkpoints every branch hands back what any of them needs for its gradient
        ways = [jax.checkpoint(functools.partial(among, size)) for size in sizes]
        return jax.lax.switch(enough, ways, part, ids, keys, values, count, segment)

    @jax.checkpoint
    def block(args):
        index, part, ids = args
        one = lambda operands: head(index, *operands)
        operands = (part, ids, k_sum, v_sum, real, first, key_ids)
        return jax.lax.map(one, operands) if cpu else jax.vmap(one)(operands)

    out, lse = jax.lax.map(block, (jnp.arange(blocks), queries, query_ids))
    out = einops.rearrange(out, "n (b g) (r l) k -> b (n l) (g r) k", b=b, l=rows)[:, :length]
    if not residual:
        return out, None
    return out, einops.rearrange(lse, "n (b g) (r l) -> b (n l) (g r)", b=b, l=rows)[:, :length]
