"""The attention entry point: one signature, several implementations chosen by device and shape.

Shapes: q (b, l, h, k), keys and values (b, m, g, k) with h a multiple of g (grouped heads),
lengths (b,) counting the real keys of each row, segments ((b, l), (b, m)) the segment of each query
and key, residual (b, l, h): log-sum-exp of the scaled scores in float32. Every implementation
takes the same arguments and returns (output, residual); the residual is what joins partial
attentions exactly.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from clvr_jax import parallel
from clvr_jax.kernels import blocked, cudnn, reference, splash
from clvr_jax.typing import Array, Float, Int

Heads = Float[Array, "b l h k"]
Residual = Float[Array, "b l h"]

IMPLEMENTATIONS: dict[str, Callable] = {
    "reference": reference.attention,
    "blocked": blocked.attention,
    "cudnn": cudnn.attention,
    "splash": splash.attention,
}
# backward passes that leave out the gradient of the residual
_WITHOUT_RESIDUAL = ("cudnn", "splash")
# what XLA, or JAX's own rule, spreads over a mesh well; the others would gather rows or heads
_SPREAD_BY_COMPILER = ("reference", "cudnn")
# on a CPU, scores up to this many bytes are computed whole
_WHOLE_SCORES = 2**20


def choose(q: Heads, k: Float[Array, "b m g k"], offset: bool = False) -> str:
    """Return the name of the implementation for these operands on the default backend."""
    if not offset:
        if cudnn.supports(q):
            return "cudnn"
        if splash.pays(q, k):
            return "splash"
    b, length, heads, _ = q.shape
    scores = 4 * b * heads * length * k.shape[1]
    limit = _WHOLE_SCORES if jax.default_backend() == "cpu" else 0
    return "reference" if scores <= limit else "blocked"


def attend(
    q: Heads,
    keys: Float[Array, "b m g k"] | Sequence[Float[Array, "b _ g k"]],
    values: Float[Array, "b m g k"] | Sequence[Float[Array, "b _ g k"]],
    *,
    causal: bool = False,
    lengths: Int[Array, "b"] | None = None,
    offset: Int[Array, "b"] | None = None,
    segments: Int[Array, "b l"] | None = None,
    implementation: str | None = None,
) -> Heads:
    """Softmax attention with scale 1/sqrt(k), over one key array or several joined exactly.

    On a mesh every device attends the rows, heads and, where the mesh spreads tokens, the queries
    that lie there (`parallel.spec`), to all keys of the row, which are gathered for that. Where a
    size does not divide, devices attend the same.

    Args:
      q: queries.
      keys: keys, or a sequence of key arrays that are attended as if concatenated.
      values: values, as `keys`.
      causal: query i sees keys 0..i; single key array only.
      lengths: keys from this index on are not seen; single key array only.
      offset: index of the first query among the keys, with `causal`: query i sees keys
        0..offset + i. `cudnn` and `splash` cannot do this: asked for, another takes over.
      segments: of self-attention, the sequence that each token of a row belongs to: queries see
        keys of their own segment only. Ids count from 1; padding is 0 and sees padding.
      implementation: a name in `IMPLEMENTATIONS`; None chooses by device and shape.

    Returns:
      The attention output in the dtype of `q`.

    Raises:
      ValueError: the implementation is unknown or cannot run these operands here, or masks were
        given that do not go together, or not with several key arrays.
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention implementation {implementation!r} is unknown; "
            f"choose from {', '.join(IMPLEMENTATIONS)} or None"
        )
    if not isinstance(keys, (list, tuple)):
        keys, values = [keys], [values]
    if offset is not None and not causal:
        raise ValueError("an offset moves the causal edge; it needs causal=True")
    if len(keys) > 1 and (causal or lengths is not None or segments is not None):
        raise ValueError("several key arrays are joined without masks; concatenate them instead")
    if segments is not None and (lengths is not None or offset is not None):
        raise ValueError("segments say what is padding and where rows begin: no lengths, no offset")
    if segments is not None and keys[0].shape[1] != q.shape[1]:
        raise ValueError(
            f"segments are of self-attention; got {q.shape[1]} queries, {keys[0].shape[1]} keys"
        )
    pair = None if segments is None else (segments, segments)
    masks = (lengths, offset, pair)
    rows = parallel.spec(q.shape, "batch", "tokens", "heads", None)
    name = implementation or choose(q, keys[0], offset is not None)
    if rows is None or not any(rows) or (not rows[1] and name in _SPREAD_BY_COMPILER):
        return _attend(q, keys, values, *masks, causal, implementation)
    return _apart(rows, q, keys, values, *masks, causal, implementation)


def _apart(rows, q, keys, values, lengths, offset, segments, causal, implementation) -> Heads:
    """Attend on every device the queries that lie there."""
    batch, tokens, heads, _ = rows
    if parallel.spec(keys[0].shape, "batch", None, "heads", None)[2] != heads:
        heads = None  # queries of one key head would lie apart
    # axes of one device count as rows: the gradients of what is not spread are summed
    ones = tuple(a for a, size in jax.sharding.get_abstract_mesh().shape.items() if size == 1)
    batch = (*((batch,) if isinstance(batch, str) else batch or ()), *ones)
    rows = jax.P(batch, tokens, heads, None)
    columns = jax.P(batch, None, heads, None)
    ids = None if segments is None else (jax.P(batch, tokens), jax.P(batch, None))

    def local(q, keys, values, lengths, offset, segments):
        if causal and tokens:
            first = jax.lax.axis_index(tokens) * q.shape[1]
            offset = first + (jnp.zeros(len(q), jnp.int32) if offset is None else offset)
        return _attend(q, keys, values, lengths, offset, segments, causal, implementation)

    return jax.shard_map(
        local,
        in_specs=(rows, columns, columns, jax.P(batch), jax.P(batch), ids),
        out_specs=rows,
        check_vma=False,  # neither cuDNN's calls nor Pallas kernels say over which axes they vary
    )(q, list(keys), list(values), lengths, offset, segments)


def _attend(q, keys, values, lengths, offset, segments, causal, implementation) -> Heads:
    name = implementation
    moved = causal and (offset is not None or q.shape[1] != keys[0].shape[1])
    masked = segments is not None  # cuDNN is then given a mask, which holds any causal edge
    if moved and (name == "splash" or (name == "cudnn" and not masked)):
        name = None
    moved = moved and not (masked and cudnn.supports(q))
    fused = [(name or choose(q, k, moved)) in _WITHOUT_RESIDUAL for k in keys]
    if len(keys) > 1 and any(fused):
        keys, values = [jnp.concatenate(keys, axis=1)], [jnp.concatenate(values, axis=1)]
    masks = {"causal": causal, "lengths": lengths, "offset": offset, "segments": segments}
    parts = []
    for k, v in zip(keys, values, strict=True):
        run = IMPLEMENTATIONS[name or choose(q, k, moved)]
        parts.append(run(q, k, v, **masks, residual=len(keys) > 1))
    return parts[0][0] if len(parts) == 1 else join(parts).astype(q.dtype)


def join(parts: Sequence[tuple[Heads, Residual]]) -> Float[Array, "b l h k"]:
    """Combine partial attentions over disjoint keys into attention over all of them (float32)."""
    outputs, residuals = zip(*parts, strict=True)
    weights = jax.nn.softmax(jnp.stack(residuals), axis=0)
    return sum(
        weight[..., None] * output.astype(jnp.float32)
        for weight, output in zip(weights, outputs, strict=True)
    )
