"""Generation from a cache against the whole sequence at once, ours and the reference's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import DynamicCache

from clvr_jax.models.layers import unstack
from clvr_jax.models.qwen3 import cache as caches
from clvr_jax.models.qwen3 import language
from tests.parity import vlm
from tests.parity.ours import language_inputs, language_program
from tests.parity.reference import relative_error, within
from tests.parity.test_vlm import TOLERANCE, conversations, pair

CHUNK = 10
THREE = tuple(vlm.CONVERSATIONS[name] for name in ("turns", "two images", "one image"))


@functools.cache
def apart(name: str):
    """Our language parameters, unstacked."""
    params = pair(name)[2]
    return unstack(jax.tree.map(jnp.copy, params["language"]), ["layers"])


def empty(cfg, rows: int, places: int):
    c = cfg.text
    return caches.empty(c.layers, rows, c.kv_heads, places, c.head_width, jnp.dtype("float32"))


def generate(name: str, batch: vlm.Batch, steps, places: int, *, fresh: bool = False):
    """Logits of every token, read by `steps`: (tokens given, tokens that count of each row).

    What is given beyond what counts is the row's next tokens, or its last one again: it is written
    to the cache and must be overwritten or never seen.
    """
    _, cfg, params = pair(name)
    inputs = language_inputs(cfg, params, batch)
    features = inputs.pop("features")
    run = language_program(cfg.text, scan=False)
    rows, length = batch.ids.shape
    cache, offset = empty(cfg, rows, places), np.zeros(rows, np.int32)
    hidden = np.zeros((rows, length, cfg.text.width), np.float32)
    for size, counts in steps:
        index = np.minimum(offset[:, None] + np.arange(size), batch.lengths[:, None] - 1)
        given = {key: np.stack([x[i] for x, i in zip(xs, index)]) for key, xs in inputs.items()}
        out, cache, _ = run(
            {"params": apart(name)},
            **given,
            features=features,
            cache=cache,
            offset=offset,
            fresh=fresh and not offset.any(),
        )
        for row, count in enumerate(counts):
            hidden[row, offset[row] : offset[row] + count] = out[row, :count]
        offset = offset + np.int32(counts)
    assert (offset == batch.lengths).all(), "the steps do not cover the batch"
    return np.asarray(language.logits(apart(name), cfg.text, jnp.asarray(hidden)))


@pytest.mark.parametrize(("name", "places"), [("grouped", 40), ("one_kv_head", 64)])
def test_chunks_then_tokens(name, places):
    """Chunks end within the first image and within the last one; from 30 on token by token."""
    batch = conversations(name, (vlm.CONVERSATIONS["turns"],))
    ids = batch.ids[0]
    assert (ids[[9, 10, 29, 30]] == [vlm.IMAGE, vlm.IMAGE, vlm.IMAGE, vlm.IMAGE]).all()
    steps = [(CHUNK, [CHUNK])] * 3 + [(1, [1])] * 10
    ours = generate(name, batch, steps, places)
    assert within(TOLERANCE, ours, vlm.answer(pair(name)[0], batch)[0])


def test_fresh_is_offset_zero():
    batch = conversations("grouped", (vlm.CONVERSATIONS["turns"],))
    steps = [(CHUNK, [CHUNK])] * 4
    fresh = generate("grouped", batch, steps, 40, fresh=True)
    assert within(TOLERANCE, fresh, generate("grouped", batch, steps, 40))


def test_rows_of_different_offsets():
    """Three conversations advance unevenly, by chunks and then by tokens."""
    batch = conversations("grouped", THREE)
    assert batch.lengths.tolist() == [40, 23, 17]
    chunks = [[10, 4, 7], [3, 10, 1], [10, 6, 5], [8, 1, 0]]
    left = batch.lengths - np.sum(chunks, axis=0)
    tokens = [(left > step).astype(int) for step in range(left.max())]
    steps = [(CHUNK, counts) for counts in chunks] + [(1, counts) for counts in tokens]
    ours = generate("grouped", batch, steps, 64)
    theirs = vlm.answer(pair("grouped")[0], batch)[0]
    for row, length in enumerate(batch.lengths):
        assert within(TOLERANCE, ours[row, :length], theirs[row, :length])


@torch.no_grad()
def reference_decode(model, batch: vlm.Batch, more: np.ndarray, shift=0) -> np.ndarray:
    """Logits of `more` tokens (b, steps) after a batch padded on the left, from its cache.

    `shift` is added to the deltas of the positions.
    """
    rows, length = batch.ids.shape
    ids = np.stack([np.roll(row, length - n) for row, n in zip(batch.ids, batch.lengths)])
    mask = np.arange(length) >= length - batch.lengths[:, None]
    given = vlm.arguments(model, batch)
    given["input_ids"] = torch.from_numpy(ids).long()
    given["attention_mask"] = torch.from_numpy(mask).long()
    given["mm_token_type_ids"] = (given["input_ids"] == vlm.IMAGE).int()
    past = DynamicCache(config=model.config.text_config)
    model(**given, past_key_values=past, use_cache=True)
    model.model.rope_deltas = model.model.rope_deltas + torch.as_tensor(shift)
    out, mask = [], given["attention_mask"]
    for step in torch.from_numpy(more).long().T:
        mask = torch.cat([mask, torch.ones(rows, 1, dtype=torch.long)], dim=1)
        positions = model.model.rope_deltas + mask.sum(1, keepdim=True) - 1
        scores = model(
            input_ids=step[:, None],
            attention_mask=mask,
            position_ids=positions[None].expand(3, -1, -1),
            past_key_values=past,
            use_cache=True,
        ).logits
        out.append(scores[:, -1].numpy())
    model.model.rope_deltas = None
    return np.stack(out, axis=1)


def test_decoding_goes_on_at_the_next_position():
    """Against the reference's cached decoding of rows padded on the left, where its deltas count.

    Another convention of the delta, or a delta of another conversation, is another answer.
    """
    model, cfg, params = pair("grouped")
    batch = conversations("grouped", THREE, room=4)
    more = np.random.default_rng(5).integers(1, vlm.IMAGE, (3, 4)).astype(np.int32)
    length = batch.ids.shape[1] - 4
    cut = vlm.Batch(batch.ids[:, :length], batch.lengths, batch.grids, batch.pixels)
    theirs = reference_decode(model, cut, more)
    inputs = language_inputs(cfg, params, batch)
    run = language_program(cfg.text, scan=False)
    _, cache, _ = run(
        {"params": apart("grouped")},
        **inputs,
        cache=empty(cfg, 3, 64),
        offset=np.zeros(3, np.int32),
        fresh=True,
    )
    following = inputs["positions"].max(axis=(1, 2)) + 1
    ours = []
    for step in range(4):
        positions = np.repeat((following + step)[:, None, None], 3, axis=2)
        hidden, cache, _ = run(
            {"params": apart("grouped")},
            more[:, step : step + 1],
            positions,
            cache=cache,
            offset=batch.lengths + step,
        )
        ours.append(language.logits(apart("grouped"), cfg.text, hidden[:, 0]))
    ours = np.stack(ours, axis=1)
    assert within(TOLERANCE, ours, theirs)
    pads = (length - batch.lengths)[:, None]
    deltas = (following - batch.lengths)[:, None]
    wrong = {
        "the padded length, with the count of real tokens": -pads,
        "the count of real tokens, with the padded length": pads,
        "of another conversation": np.roll(deltas, 1, axis=0) - deltas,
        "none": -deltas,
    }
    for delta, shift in wrong.items():
        rows = shift[:, 0] != 0
        for row in np.flatnonzero(rows):
            decoded = reference_decode(model, cut, more, shift)
            assert relative_error(decoded[row], theirs[row]) > 1e-2, (delta, row)


def test_scanned_layers_refuse_a_cache():
    _, cfg, params = pair("grouped")
    batch = conversations("grouped", (vlm.CONVERSATIONS["text"],))
    inputs = language_inputs(cfg, params, batch)
    cache, offset = empty(cfg, 1, 16), np.zeros(1, np.int32)
    with pytest.raises(ValueError, match="unrolled layers"):
        language_program(cfg.text)(
            {"params": params["language"]}, **inputs, cache=cache, offset=offset
        )
