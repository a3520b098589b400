"""From the next token's scores to a token, row by row under each row's own options, on the device.

The order is that of transformers' `generate`: penalties, grammar, temperature, top-k, top-p, min-p.
Thresholds are found by bisection over the bits of a float, which is exact and needs no sort of the
vocabulary: a sort of 152 thousand scores takes longer than the rest of sampling together.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from clvr_jax.typing import Array, Float, Int

Scores = Float[Array, "b v"]


@struct.dataclass
class Sampling:
    """Options of every row; fields are arrays (b,).

    Attributes:
      temperature: 0 is greedy.
      top_k: likeliest tokens to keep, 0 for all.
      top_p: probability to keep, 1 for all.
      min_p: share of the likeliest token's probability below which none is kept.
      repetition: penalty of tokens in the conversation so far; 1 is none.
      presence: subtracted from scores of tokens that this turn has generated.
      frequency: subtracted as often as it has generated them.
      seed: of the row's noise.
    """

    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    repetition: Any
    presence: Any
    frequency: Any
    seed: Any


def sample(
    scores: Scores,
    options: Sampling,
    seen: Array,
    counts: Int[Array, "b v"],
    step: Int[Array, "b"],
    mask: Array | None = None,
) -> Int[Array, "b"]:
    """Return one token a row.

    The noise of a row depends on its seed and step alone, not on its neighbours.

    Args:
      scores: raw scores, float32.
      options: of every row.
      seen: (b, v) bool, tokens of the conversation before this turn.
      counts: how often this turn has generated each token.
      step: tokens that this turn has generated.
      mask: (b, v / 32 rounded up) int32, bit v % 32 of word v / 32 allows token v; or None.
    """
    scores = penalised(scores, options, seen, counts)
    if mask is not None:
        scores = jnp.where(allowed(mask, scores.shape[1]), scores, -jnp.inf)
    greedy = jnp.argmax(scores, axis=-1)

    def draw():
        warm = warped(scores, options)

        def noise(seed, step):
            key = jax.random.fold_in(jax.random.key(seed), step)
            return jax.random.gumbel(key, scores.shape[1:])

        return jnp.argmax(warm + jax.vmap(noise)(options.seed, step), axis=-1)

    hot = options.temperature > 0
    drawn = jax.lax.cond(jnp.any(hot), draw, lambda: greedy)
    return jnp.where(hot, drawn, greedy).astype(jnp.int32)


def penalised(scores: Scores, options: Sampling, seen: Array, counts: Int[Array, "b v"]) -> Scores:
    """Return scores after the penalties; a row without any is unchanged to the bit."""
    column = lambda values: values[:, None]
    generated = counts > 0
    factor = jnp.where(seen | generated, column(options.repetition), 1.0)
    scores = jnp.where(scores > 0, scores / factor, scores * factor)
    scores = scores - jnp.where(generated, column(options.presence), 0.0)
    return scores - counts * column(options.frequency)


def warped(scores: Scores, options: Sampling) -> Scores:
    """Return log-weights after temperature and truncation; -inf where a token is cut."""
    temperature = jnp.where(options.temperature > 0, options.temperature, 1.0)
    scores = scores / temperature[:, None]
    cuts = (options.top_k > 0) | (options.top_p < 1) | (options.min_p > 0)
    return jax.lax.cond(jnp.any(cuts), lambda: _truncated(scores, options), lambda: scores)


def allowed(mask: Int[Array, "b words"], vocab: int) -> Array:
    """Return (b, vocab) bool of a bit mask."""
    bits = (mask[:, :, None] >> jnp.arange(32)) & 1
    return bits.reshape(len(mask), -1)[:, :vocab] == 1


def _truncated(scores: Scores, options: Sampling) -> Scores:
    top_k = jnp.where(options.top_k > 0, options.top_k, scores.shape[1])
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))  # the largest is 1
    # keep a token if fewer than k are heavier (ties stay together)
    heavier = lambda bar: jnp.sum(weights > bar, axis=-1)
    bar = _least(lambda bar: heavier(bar[:, None]) < top_k, len(scores))
    weights = jnp.where(weights >= bar[:, None], weights, 0.0)
    # keep a token if those heavier than it have less than p together
    total = jnp.sum(weights, axis=-1)
    mass = lambda bar: jnp.sum(jnp.where(weights > bar[:, None], weights, 0.0), axis=-1)
    bar = _least(lambda bar: mass(bar) < options.top_p * total, len(scores))
    bar = jnp.where(options.top_p < 1, bar, 0.0)
    bar = jnp.maximum(bar, options.min_p)
    return jnp.where((weights > 0) & (weights >= bar[:, None]), scores, -jnp.inf)


def _least(good, rows: int) -> Float[Array, "b"]:
    """Return each row's smallest float in [0, 1] for which `good`, monotone in it, holds."""
    one = 0x3F800000  # the bits of 1.0; those of floats in [0, 1] are ordered as integers

    def halve(_, bounds):
        low, high = bounds  # good at high; not good below low
        middle = (low + high) // 2
        holds = good(jax.lax.bitcast_convert_type(middle, jnp.float32))
        return jnp.where(holds, low, middle + 1), jnp.where(holds, middle, high)

    bounds = jnp.zeros(rows, jnp.int32), jnp.full(rows, one, jnp.int32)
    return jax.lax.bitcast_convert_type(jax.lax.fori_loop(0, 31, halve, bounds)[1], jnp.float32)
