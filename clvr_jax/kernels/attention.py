"""The attention entry point: one signature, several implementations chosen by device and shape.

Shapes: q (b, l, h, k), keys and values (b, m, g, k) with h a multiple of g (grouped heads),
lengths (b,) counting the real keys of each row, residual (b, l, h): log-sum-exp of the scaled
scores in float32. Every implementation takes the same arguments and returns (output, residual);
the residual is what joins partial attentions exactly.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from clvr_jax.kernels import blocked, cudnn, reference
from clvr_jax.typing import Array, Float, Int

Heads = Float[Array, "b l h k"]
Residual = Float[Array, "b l h"]

IMPLEMENTATIONS: dict[str, Callable] = {
    "reference": reference.attention,
    "blocked": blocked.attention,
    "cudnn": cudnn.attention,
}
# on a CPU, scores up to this many bytes are computed whole
_WHOLE_SCORES = 2**20


def choose(q: Heads, k: Float[Array, "b m g k"], offset: bool = False) -> str:
    """Return the name of the implementation for these operands on the default backend."""
    if cudnn.supports(q) and not offset:
        return "cudnn"
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
    implementation: str | None = None,
) -> Heads:
    """Softmax attention with scale 1/sqrt(k), over one key array or several joined exactly.

    Args:
      q: queries.
      keys: keys, or a sequence of key arrays that are attended as if concatenated.
      values: values, as `keys`.
      causal: query i sees keys 0..i; single key array only.
      lengths: keys from this index on are not seen; single key array only.
      offset: index of the first query among the keys, with `causal`: query i sees keys
        0..offset + i. `cudnn` cannot do this: asked for it, another implementation takes over.
      implementation: a name in `IMPLEMENTATIONS`; None chooses by device and shape.

    Returns:
      The attention output in the dtype of `q`.

    Raises:
      ValueError: the implementation is unknown or cannot run these operands here, or a mask was
        given together with several key arrays.
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
    if offset is not None and implementation == "cudnn":
        implementation = None
    if len(keys) > 1 and (causal or lengths is not None):
        raise ValueError("several key arrays are joined without masks; concatenate them instead")
    if len(keys) > 1 and (implementation or choose(q, keys[0])) == "cudnn":
        # its backward pass leaves out the gradient of the residual
        keys, values = [jnp.concatenate(keys, axis=1)], [jnp.concatenate(values, axis=1)]
    parts = []
    for k, v in zip(keys, values, strict=True):
        run = IMPLEMENTATIONS[implementation or choose(q, k, offset is not None)]
        masks = {"causal": causal, "lengths": lengths, "offset": offset}
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
