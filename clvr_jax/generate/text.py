"""Compiled programs that read and write text: look, prefill, score, decode, and move cache rows.

Each is a jitted function of (networks, shapes): the same shapes compile once. The cache is a value
that goes in, is given away, and comes out longer. Which sequence is where, and how many places of
a row are real, is the caller's knowledge (`clvr_jax.backends.local`).
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from clvr_jax.generate import sampling
from clvr_jax.models.qwen3 import cache, language
from clvr_jax.models.qwen3.cache import KV, spread
from clvr_jax.models.qwen3.language import LanguageModel
from clvr_jax.models.qwen3_vl.vision import Places, Vision
from clvr_jax.parallel import constrain
from clvr_jax.typing import Array, Float, Int, Params

CHUNK = 16  # tokens that one decode call generates at most: the host is asked no more often
_SCORED = 64  # rows whose scores over the vocabulary exist at once
_NOTHING = -1  # in the place of a token where a row had ended


@dataclasses.dataclass(frozen=True)
class Networks:
    """The networks, without parameters: what a program is specialised to.

    Attributes:
      language: unrolled, fused (`models.qwen3.serving`).
      vision: the vision tower, None for text-only models.
    """

    language: LanguageModel
    vision: Vision | None = None


@struct.dataclass
class New:
    """The next tokens of one sequence, padded on the right.

    Attributes:
      ids: (one n) token ids.
      positions: (one n 3) along time, height and width.
      places: (one n) rows of the image features that tokens stand for, -1 for text.
      count: real tokens.
      offset: (one) tokens of the sequence that are cached already.
    """

    ids: Any
    positions: Any
    places: Any
    count: Any
    offset: Any


@struct.dataclass
class Rows:
    """A batch of sequences that are being continued.

    Attributes:
      cache: keys and values.
      lengths: (b) cached tokens of each row.
      position: (b) M-RoPE position of each row's next token.
      scores: (b v) raw scores of it.
      seen: tokens of each row's conversation before this turn.
      counts: (b v) how often this turn has generated each token.
      step: (b) tokens that this turn has generated.
      limit: (b) tokens that it may generate.
      stops: (b stops) tokens that end it, padded with -1.
      active: rows that go on.
      sampling: options of each row.
    """

    cache: Any
    lengths: Any
    position: Any
    scores: Any
    seen: Any
    counts: Any
    step: Any
    limit: Any
    stops: Any
    active: Any
    sampling: Any


@struct.dataclass
class Tokens:
    """What a decode call generated.

    Attributes:
      ids: (b, CHUNK), -1 where a row had ended.
      logprobs: of those tokens under the raw scores.
      rivals: (b, CHUNK, r) likeliest tokens of each step, best first.
      rival_logprobs: theirs.
    """

    ids: Any
    logprobs: Any
    rivals: Any
    rival_logprobs: Any


@functools.partial(jax.jit, static_argnums=0)
def look(
    nets: Networks, params: Params, levels: Array, pixels: Array, places: Places
) -> Float[Array, "f parts d"]:
    """Return features of the tokens of all images, image after image, padding included.

    Args:
      nets: the networks.
      params: the vision tower's.
      levels: (channel, 256) what each grey level is to the network. A table, because a device's own
        division differs from the reference's in the last bit.
      pixels: uint8 (b, p, channel y x) patches of stills; a quarter of the bytes of numbers.
      places: of these images.
    """
    b, p, width = pixels.shape
    x = pixels.reshape(b, p, len(levels), -1)
    x = jnp.take_along_axis(levels[None, None], x.astype(jnp.int32), axis=-1)
    x = x.reshape(b, p, width).astype(jax.tree.leaves(params)[0].dtype)
    features = nets.vision.apply({"params": params}, x, places)
    return features.reshape(-1, *features.shape[2:])


@functools.partial(jax.jit, static_argnums=0, static_argnames="fresh", donate_argnames="cache")
def prefill(
    nets: Networks,
    params: Params,
    new: New,
    features: Float[Array, "f parts d"] | None,
    cache: tuple[KV, ...],
    *,
    fresh: bool,
) -> tuple[Float[Array, "one v"], tuple[KV, ...]]:
    """Read the next tokens of one sequence; return the scores after the last and the cache.

    Padding is read as well: it lies behind the real tokens, where later ones overwrite it.
    """
    hidden, cache = _read(nets, params, new, features, cache, fresh)
    last = jax.lax.dynamic_index_in_dim(hidden[0], new.count - 1, axis=0)
    return language.logits(params, nets.language.cfg, last), cache


@functools.partial(jax.jit, static_argnums=0, static_argnames="fresh", donate_argnames="cache")
def score(
    nets: Networks,
    params: Params,
    new: New,
    targets: Int[Array, "n"],
    cache: tuple[KV, ...],
    *,
    fresh: bool,
) -> tuple[Float[Array, "n"], tuple[KV, ...]]:
    """Read tokens and return the log-probability of a target after each of them, and the cache."""
    hidden, cache = _read(nets, params, new, None, cache, fresh)

    def one(args):
        rows, wanted = args
        scores = language.logits(params, nets.language.cfg, rows)
        picked = jnp.take_along_axis(scores, wanted[:, None], axis=-1)[:, 0]
        return picked - jax.nn.logsumexp(scores, axis=-1)

    n = len(targets)
    size = min(_SCORED, n)
    blocks = hidden[0].reshape(n // size, size, -1), targets.reshape(n // size, size)
    return jax.lax.map(one, blocks).reshape(n), cache


@functools.partial(jax.jit, static_argnums=0, static_argnames="rivals", donate_argnames="rows")
def decode(
    nets: Networks,
    params: Params,
    rows: Rows,
    steps: Int[Array, ""],
    keep: Array,
    mask: Array | None = None,
    *,
    rivals: int = 0,
) -> tuple[Rows, Tokens]:
    """Generate up to `steps` (at most CHUNK) tokens for every active row, without the host.

    Every row needs room for `steps` more tokens in the cache. A row ends at a stop token, which is
    the last that it emits, or at its limit. What is emitted is cached as well.

    Args:
      nets: the networks.
      params: the language model's.
      rows: the batch; given away.
      steps: tokens of each row.
      keep: (b,) bool, false ends a row at once.
      mask: bits of the tokens that the next step may choose (`sampling.sample`); with one step.
      rivals: likeliest tokens to report of each step.
    """
    b = len(rows.lengths)
    rows = rows.replace(active=rows.active & keep)
    out = Tokens(
        ids=jnp.full((b, CHUNK), _NOTHING, jnp.int32),
        logprobs=jnp.zeros((b, CHUNK), jnp.float32),
        rivals=jnp.zeros((b, CHUNK, rivals), jnp.int32),
        rival_logprobs=jnp.zeros((b, CHUNK, rivals), jnp.float32),
    )

    def body(carry):
        i, rows, out = carry
        ids = sampling.sample(rows.scores, rows.sampling, rows.seen, rows.counts, rows.step, mask)
        norm = jax.nn.logsumexp(rows.scores, axis=-1)
        logprobs = jnp.take_along_axis(rows.scores, ids[:, None], axis=-1)[:, 0] - norm
        out = out.replace(
            ids=out.ids.at[:, i].set(jnp.where(rows.active, ids, _NOTHING)),
            logprobs=out.logprobs.at[:, i].set(logprobs),
        )
        if rivals:
            best, which = jax.lax.top_k(rows.scores, rivals)
            out = out.replace(
                rivals=out.rivals.at[:, i].set(which),
                rival_logprobs=out.rival_logprobs.at[:, i].set(best - norm[:, None]),
            )
        went_on = rows.active.astype(jnp.int32)
        hidden, cache, _ = nets.language.apply(
            {"params": params},
            ids[:, None],
            jnp.broadcast_to(rows.position[:, None, None], (b, 1, 3)),
            cache=rows.cache,
            offset=rows.lengths,
        )
        step = rows.step + went_on
        ended = jnp.any(ids[:, None] == rows.stops, axis=-1) | (step >= rows.limit)
        rows = rows.replace(
            cache=cache,
            lengths=rows.lengths + went_on,
            position=rows.position + went_on,
            scores=language.logits(params, nets.language.cfg, hidden[:, 0]),
            counts=rows.counts.at[jnp.arange(b), ids].add(went_on),
            step=step,
            active=rows.active & ~ended,
        )
        return i + 1, _settled(rows), out

    going = lambda carry: (carry[0] < steps) & jnp.any(carry[1].active)
    _, rows, out = jax.lax.while_loop(going, body, (jnp.int32(0), rows, out))
    return rows, out


def empty_cache(nets: Networks, rows: int, places: int, like: jax.Array) -> tuple[KV, ...]:
    """Return an empty cache of `rows` sequences, spread over the mesh if there is one.

    Args:
      nets: the networks.
      rows: sequences.
      places: tokens of each.
      like: a parameter, whose type and device it takes.
    """
    made = _empty(nets.language.cfg, rows, places, like.dtype)
    # bound to its device, as later caches are: else the first programs would be compiled twice
    return jax.device_put(made, like.sharding) if len(like.devices()) == 1 else made


def regroup(rows: Rows, index: np.ndarray, places: int) -> Rows:
    """Return a batch of chosen rows, -1 for empty ones, with `places` places each.

    The given one's cache is freed layer by layer: there is no room for both.
    """
    index = jnp.asarray(index, jnp.int32)
    chosen = jnp.maximum(index, 0)
    rest = _take(rows.replace(cache=()), chosen, index >= 0)
    cache = []
    for kv in rows.cache:
        cache.append(_resize(kv, chosen, places))
        kv.keys.delete()
        kv.values.delete()
    return rest.replace(cache=tuple(cache))


def resize(cache: Sequence[KV], places: int) -> tuple[KV, ...]:
    """Return a cache with `places` places, layer by layer."""
    return tuple(_resize(kv, None, places) for kv in cache)


@functools.partial(jax.jit, donate_argnums=0)
def insert(rows: Rows, one: Rows, row: Int[Array, ""]) -> Rows:
    """Return a batch with a single sequence, whose cache has no more places, as one of its rows."""

    def put(old, new):
        # the whole row: what an earlier sequence left may be no number, and 0 * nan is nan
        new = jnp.pad(new, [(0, 0), *((0, a - b) for a, b in zip(old.shape[1:], new.shape[1:]))])
        return jax.lax.dynamic_update_slice(old, new, (row, *(0,) * (old.ndim - 1)))

    return _settled(jax.tree.map(put, rows, one))


@functools.partial(jax.jit, donate_argnums=0)
def settle(rows: Rows) -> Rows:
    """Return a batch where `decode` will leave it, so that the same program takes it again."""
    return _settled(rows)


@functools.partial(jax.jit, static_argnums=2)
def extract(cache: tuple[KV, ...], row: Int[Array, ""], places: int) -> tuple[KV, ...]:
    """Return the cache of one row of a batch, its first places."""
    take = lambda x: spread(jax.lax.dynamic_index_in_dim(x[:, :, :places], row, axis=0))
    return jax.tree.map(take, cache)


def _read(nets, params, new: New, features, cache, fresh):
    hidden, cache, _ = nets.language.apply(
        {"params": params},
        new.ids,
        new.positions,
        features=features,
        places=new.places,
        cache=cache,
        offset=new.offset,
        fresh=fresh,
    )
    return hidden, cache


@functools.partial(jax.jit, static_argnums=range(4))
def _empty(cfg, rows, places, dtype):
    made = cache.empty(cfg.layers, rows, cfg.kv_heads, places, cfg.head_width, dtype)
    return jax.tree.map(spread, made)


@functools.partial(jax.jit, static_argnums=2)
def _resize(kv: KV, rows, places: int) -> KV:
    def one(x):
        x = x if rows is None else jnp.take(x, rows, axis=0)
        more = max(places - x.shape[2], 0)
        return spread(jnp.pad(x[:, :, :places], ((0, 0), (0, 0), (0, more), (0, 0))))

    return jax.tree.map(one, kv)


@jax.jit
def _take(rows: Rows, index, real) -> Rows:
    rows = jax.tree.map(lambda x: jnp.take(x, index, axis=0), rows)
    return _settled(rows.replace(active=rows.active & real))


def _settled(rows: Rows) -> Rows:
    """The cache spread over the mesh, everything else whole on every device."""
    cache = jax.tree.map(spread, rows.cache)
    rest = jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), rows.replace(cache=()))
    return rest.replace(cache=cache)
