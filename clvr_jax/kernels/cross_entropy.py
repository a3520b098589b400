"""Weighted cross-entropy over a large vocabulary, a few positions of every row at a time.

The logits of one sequence of 8192 tokens are 5 GB. Here those of a chunk are made, used and
dropped, and made again in the backward pass, which is written out: gradients of the logits enter
the products in the operands' dtype, as they do where logits are kept, while the head's gradient
adds up in float32 over the chunks. On a mesh every device keeps its rows, its tokens and its part
of the vocabulary; what is exchanged is one maximum and two sums a position, the gradient of the
hidden states over the vocabulary, and once that of the head over the rows.
"""

import functools
from collections.abc import Callable

import einops
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from clvr_jax import parallel
from clvr_jax.typing import Array, Float, Int


def cross_entropy(
    head: Float[Array, "_ _"],
    hidden: Float[Array, "b l d"],
    targets: Int[Array, "b l"],
    weights: Float[Array, "b l"],
    *,
    vocab_axis: int,
    chunk: int,
) -> Float[Array, ""]:
    """Return the sum of weight * -log softmax(hidden @ head)[target], float32.

    Args:
      head: (vocab, d) with `vocab_axis` 0, or (d, vocab) with 1.
      hidden: inputs of the head.
      targets: indices into the vocabulary; any number where the weight is 0.
      weights: positions of weight 0 add exactly 0 to the sum and to every gradient.
      vocab_axis: see `head`.
      chunk: positions of a row whose logits exist at once.

    Raises:
      ValueError: `chunk` is not positive.
    """
    if chunk < 1:
        raise ValueError(f"cross-entropy takes at least 1 position at a time, got chunk={chunk}")
    return _cross_entropy(vocab_axis, chunk, head, hidden, targets, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _cross_entropy(vocab_axis, chunk, head, hidden, targets, weights):
    return _forward(vocab_axis, chunk, head, hidden, targets, weights)[0]


def _forward(vocab_axis, chunk, head, hidden, targets, weights):
    kernel = head.astype(hidden.dtype)
    rows, table, axes = _places(kernel, hidden, vocab_axis)

    def local(kernel, hidden, targets):
        def one(_, part):
            h, target = part
            scores, columns = _scores(kernel, h, vocab_axis, axes)
            top = _over(jax.lax.pmax, jnp.max(scores, axis=-1), axes)
            total = jnp.sum(jnp.exp(scores - top[..., None]), axis=-1)
            hit = jnp.sum(jnp.where(columns == target[..., None], scores, 0), axis=-1)
            total, hit = _over(jax.lax.psum, (total, hit), axes)
            normal = jnp.log(total) + top
            return None, (normal, normal - hit)

        length = hidden.shape[1]
        parts = jax.lax.scan(one, None, (_cut(hidden, chunk), _cut(targets, chunk)))[1]
        return tuple(_joined(part, length) for part in parts)

    spread = _spread(local, (table, P(*rows, None), rows), (rows, rows))
    normal, losses = spread(kernel, hidden, targets)
    total = jnp.sum(jnp.where(weights != 0, weights * losses, 0))
    return total, (head, hidden, targets, weights, normal, losses)


def _backward(vocab_axis, chunk, kept, cotangent):
    head, hidden, targets, weights, normal, losses = kept
    kernel = head.astype(hidden.dtype)
    rows, table, axes = _places(kernel, hidden, vocab_axis)
    row_axes = _flat(rows)

    def local(kernel, hidden, targets, scale, normal):
        def one(total, part):
            h, target, factor, norm = part
            scores, columns = _scores(kernel, h, vocab_axis, axes)
            slope = jnp.exp(scores - norm[..., None]) - (columns == target[..., None])
            slope = (slope * factor[..., None]).astype(h.dtype)
            to_hidden = _product(slope, kernel, 2, vocab_axis, scores.dtype)
            pair = (slope, h) if vocab_axis == 0 else (h, slope)
            total += jnp.einsum("bci,bcj->ij", *pair, preferred_element_type=total.dtype)
            return total, _over(jax.lax.psum, to_hidden, axes).astype(h.dtype)

        zero = jnp.zeros(kernel.shape, jnp.promote_types(kernel.dtype, jnp.float32))
        parts = tuple(_cut(x, chunk) for x in (hidden, targets, scale, normal))
        to_kernel, to_hidden = jax.lax.scan(one, zero, parts)
        return _over(jax.lax.psum, to_kernel, row_axes), _joined(to_hidden, hidden.shape[1])

    spread = _spread(local, (table, P(*rows, None), rows, rows, rows), (table, P(*rows, None)))
    to_head, to_hidden = spread(kernel, hidden, targets, weights * cotangent, normal)
    to_weights = (losses * cotangent).astype(weights.dtype)
    return to_head.astype(head.dtype), to_hidden, None, to_weights


_cross_entropy.defvjp(_forward, _backward)


def _places(kernel, hidden, vocab_axis: int) -> tuple[P, P, tuple[str, ...]]:
    """Return how rows (b, l) and the head lie on the mesh, and the axes of the vocabulary."""
    rows = parallel.spec(hidden.shape, "batch", "tokens", None)
    if rows is None:
        return P(None, None), P(None, None), ()
    names = ("vocab", None) if vocab_axis == 0 else (None, "vocab")
    table = parallel.spec(kernel.shape, *names)
    return P(*rows[:2]), table, _flat(table)


def _spread(local: Callable, inputs, outputs) -> Callable:
    if jax.sharding.get_abstract_mesh().empty:
        return local
    return jax.shard_map(local, in_specs=inputs, out_specs=outputs, check_vma=False)


def _over(reduce: Callable, x, axes: tuple[str, ...]):
    return reduce(x, axes) if axes else x


def _flat(spec: P) -> tuple[str, ...]:
    parts = ((part,) if isinstance(part, str) else (part or ()) for part in spec)
    return tuple(axis for part in parts for axis in part)


def _scores(kernel, h, vocab_axis: int, axes):
    """Return the logits of a chunk on this device, and which columns of the vocabulary they are."""
    wide = jnp.promote_types(h.dtype, jnp.float32)
    scores = _product(h, kernel, 2, 1 - vocab_axis, wide)
    first = jax.lax.axis_index(axes) * scores.shape[-1] if axes else 0
    return scores, first + jnp.arange(scores.shape[-1])


def _product(x, kernel, x_axis: int, kernel_axis: int, dtype):
    contract = (((x_axis,), (kernel_axis,)), ((), ()))
    return jax.lax.dot_general(x, kernel, contract, preferred_element_type=dtype)


def _cut(x: Array, chunk: int) -> Array:
    """Cut (b, l, ...) into (n, b, c, ...) with c <= chunk, filled up with zeros."""
    blocks = -(-x.shape[1] // chunk)
    size = -(-x.shape[1] // blocks)
    fill = ((0, 0), (0, blocks * size - x.shape[1]), *[(0, 0)] * (x.ndim - 2))
    return einops.rearrange(jnp.pad(x, fill), "b (n c) ... -> n b c ...", n=blocks)


def _joined(x: Array, length: int) -> Array:
    return einops.rearrange(x, "n b c ... -> b (n c) ...")[:, :length]
