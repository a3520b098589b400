"""Packed rows: every sequence of a row is computed as if it were alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clvr_jax.kernels import attention, blocked
from clvr_jax.kernels.attention import attend
from clvr_jax.models.qwen3 import language
from clvr_jax.models.qwen3_vl import config as qwen3_vl
from clvr_jax.tree import flatten
from launch.bench.weights import random_params

CFG = qwen3_vl.VARIANTS["tiny"].text
# two packed rows of 37 tokens: (segment, first, one past the last); 0 is padding
ROWS = (((1, 0, 11), (2, 11, 12), (3, 12, 30), (0, 30, 37)), ((1, 0, 36), (2, 36, 37)))


@pytest.fixture
def many_blocks(monkeypatch):
    """Blocks of 16 queries, the smallest, at toy sizes."""
    monkeypatch.setattr(blocked, "BLOCK_BYTES", 1)
    monkeypatch.setattr(blocked, "CPU_ROWS", 16)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def segment_ids():
    ids = np.zeros((2, 37), np.int32)
    for row, spans in enumerate(ROWS):
        for segment, start, stop in spans:
            ids[row, start:stop] = segment
    return jnp.asarray(ids)


def error(ours, theirs):
    return np.abs(np.asarray(ours) - np.asarray(theirs)).max() / np.abs(theirs).max()


@pytest.mark.parametrize("name", ["reference", "blocked"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_each_segment_is_attended_alone(many_blocks, name, causal, kv_heads):
    """Output and gradients, grouped heads, segments of one token, padding among itself."""
    operands = [normal(2, 37, heads, 8, seed=i) for i, heads in enumerate((4, kv_heads, kv_heads))]
    cotangent = normal(2, 37, 4, 8, seed=3)

    def packed(q, k, v):
        out = attend(q, k, v, causal=causal, segments=segment_ids(), implementation=name)
        return jnp.sum(out * cotangent), out

    def alone(q, k, v):
        rows = []
        for row, spans in enumerate(ROWS):
            one = lambda x, a, b, row=row: x[row : row + 1, a:b]
            parts = [
                attend(
                    *(one(x, a, b) for x in (q, k, v)), causal=causal, implementation="reference"
                )
                for _, a, b in spans
            ]
            rows.append(jnp.concatenate(parts, axis=1))
        out = jnp.concatenate(rows)
        return jnp.sum(out * cotangent), out

    run = lambda f: jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True))(*operands)
    (_, out), gradients = run(packed)
    (_, expected), wanted = run(alone)
    assert error(out, expected) < 1e-6
    for ours, theirs in zip(gradients, wanted):
        assert error(ours, theirs) < 1e-6


def test_a_block_meets_only_keys_near_what_it_sees(many_blocks):
    """On CPUs: what is not a number and far away would spoil a sum that it is masked out of."""
    assert blocked.spans(16, 6) == [16, 32, 64, 96]
    q, k, v = (normal(1, 90, heads, 8, seed=i) for i, heads in enumerate((4, 2, 2)))
    ids = jnp.asarray(np.repeat([1, 2], (40, 50))[None])
    masks = {"causal": True, "segments": ids}
    out = attend(q, k, v.at[:, :16].set(jnp.nan), **masks, implementation="blocked")
    expected = attend(q, k, v, **masks, implementation="reference")
    assert error(out[:, 48:], expected[:, 48:]) < 1e-6


def test_segments_may_come_again(many_blocks):
    """A block's keys begin where the first of its segments does."""
    q, k, v = (normal(1, 90, heads, 8, seed=i) for i, heads in enumerate((4, 2, 2)))
    ids = jnp.asarray(np.repeat([1, 2, 3, 1], (20, 20, 20, 30))[None])
    masks = {"causal": True, "segments": ids}
    out = attend(q, k, v, **masks, implementation="blocked")
    assert error(out, attend(q, k, v, **masks, implementation="reference")) < 1e-6


def test_heads_together_keep_segments_apart(monkeypatch, many_blocks):
    """The path of accelerators gives what that of CPUs gives."""
    q, k, v = (normal(2, 37, heads, 8, seed=i) for i, heads in enumerate((4, 2, 2)))
    masks = {"causal": True, "segments": segment_ids(), "implementation": "blocked"}
    in_turn = attend(q, k, v, **masks)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    np.testing.assert_allclose(attend(q, k, v, **masks), in_turn, atol=1e-6)


def test_no_mask_is_larger_than_a_block():
    """Of blocked attention, forward and backward: no array holds all queries and all keys."""
    q = jax.ShapeDtypeStruct((1, 1536, 2, 8), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, 1536), jnp.int32)
    masks = {"causal": True, "implementation": "blocked"}
    total = lambda q, k, v, ids: attend(q, k, v, segments=ids, **masks).sum()
    text = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(q, q, q, ids).compile().as_text()
    assert "[512,1536]" in text.replace("1,512", "512")
    assert "1536,1536" not in text


def test_cudnn_is_given_a_mask_of_one_head(monkeypatch):
    """Through JAX's public function, whose XLA form stands in for cuDNN here."""
    seen = []

    def stand_in(*operands, mask, implementation, **options):
        seen.append((mask.shape, mask.dtype, implementation))
        return original(*operands, mask=mask, implementation="xla", **options)

    original = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    monkeypatch.setattr(attention.cudnn, "supports", lambda q: True)
    q, k, v = (normal(2, 37, heads, 8, seed=i) for i, heads in enumerate((4, 2, 2)))
    masks = {"causal": True, "segments": segment_ids()}
    out = attend(q, k, v, **masks, implementation="cudnn")
    assert seen == [((2, 1, 37, 37), jnp.bool_, "cudnn")]
    assert error(out, attend(q, k, v, **masks, implementation="reference")) < 1e-6


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"lengths": jnp.array([3, 4])}, "no lengths, no offset"),
        ({"causal": True, "offset": jnp.array([3, 4])}, "no lengths, no offset"),
        ({"keys": 2}, "several key arrays are joined without masks"),
        ({"longer": True}, "segments are of self-attention; got 37 queries, 38 keys"),
    ],
    ids=["lengths", "offset", "several", "longer"],
)
def test_masks_that_do_not_go_together(given, text):
    q, given = normal(2, 37, 2, 8), dict(given)
    keys = [q] * given.pop("keys", 0) or q
    keys = normal(2, 38, 2, 8) if given.pop("longer", False) else keys
    with pytest.raises(ValueError, match=text):
        attend(q, keys, keys, segments=segment_ids(), **given)


# two conversations of 9 and 14 tokens, one picture of 4 cells each, packed in a row of 26
LENGTHS = (9, 14)


def conversations(cfg, parts):
    """Ids, M-RoPE positions, features and places of each conversation, positions from 0 on."""
    rng = np.random.default_rng(0)
    for i, length in enumerate(LENGTHS):
        places = np.full(length, -1)
        places[3:7] = np.arange(4)
        ids = rng.integers(0, cfg.vocab, length)
        positions = np.arange(length)[:, None] + rng.integers(0, 2, (length, 3))
        ids, positions, places = (jnp.asarray(x, jnp.int32) for x in (ids, positions, places))
        yield ids, positions, normal(4, parts, cfg.width, seed=9 + i), places


def pack(cfg, parts):
    """The row that holds both: features lie one after another, as do the tokens."""
    ids, positions, features, places = zip(*conversations(cfg, parts))

    def padded(xs, fill=0):
        x = jnp.concatenate(xs)
        return jnp.pad(x, ((0, 3), *[(0, 0)] * (x.ndim - 1)), constant_values=fill)[None]

    places = [jnp.where(x < 0, -1, x + 4 * i) for i, x in enumerate(places)]
    segments = [jnp.full(length, i + 1) for i, length in enumerate(LENGTHS)]
    given = {"segments": padded(segments), "places": padded(places, -1)}
    features = jnp.pad(jnp.concatenate(features), ((0, 2), (0, 0), (0, 0)))[None]
    return padded(ids), padded(positions), {**given, "features": features}


COTANGENTS = [normal(1, length, CFG.width, seed=5 + i) for i, length in enumerate(LENGTHS)]


def model_params():
    params = random_params(language.abstract_params(CFG), 0, ("layers",))
    return {name: leaf for name, leaf in params.items() if name != "lm_head"}  # not used here


def differentiated(hidden_states, params, features):
    """Hidden states of both conversations, and gradients of parameters and features."""

    def loss(params, features):
        hidden = hidden_states(params, features)
        return sum(jnp.sum(x * c) for x, c in zip(hidden, COTANGENTS)), hidden

    (_, hidden), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(
        params, features
    )
    return hidden, flatten(gradients[0]) | {"features": gradients[1]}


@pytest.fixture(scope="module")
def alone():
    """Each conversation in a row of its own."""
    net = language.LanguageModel(CFG)

    def hidden_states(params, features):
        for i, (ids, positions, _, places) in enumerate(conversations(CFG, 3)):
            images = {"features": features[4 * i : 4 * i + 4], "places": places[None]}
            yield net.apply({"params": params}, ids[None], positions[None], **images)[0]

    given = jnp.concatenate([features for _, _, features, _ in conversations(CFG, 3)])
    return differentiated(lambda *given: list(hidden_states(*given)), model_params(), given)


@pytest.mark.parametrize("remat", ["none", "attention"])
def test_a_packed_row_is_its_conversations_alone(alone, remat):
    """Hidden states, and gradients of parameters and features, with pictures and DeepStack."""
    net = language.LanguageModel(CFG, remat=remat)
    ids, positions, given = pack(CFG, 3)

    def hidden_states(params, features):
        padded = jnp.pad(features, ((0, 2), (0, 0), (0, 0)))[None]
        hidden = net.apply({"params": params}, ids, positions, **given | {"features": padded})[0]
        return jnp.split(hidden, [9, 23], axis=1)[:2]

    out, gradients = differentiated(hidden_states, model_params(), given["features"][0, :8])
    for ours, theirs in zip(out, alone[0]):
        assert error(ours, theirs) < 1e-6
    for path, leaf in gradients.items():
        assert error(leaf, alone[1][path]) < 3e-6, path


def test_features_of_rows_are_those_that_all_share():
    """(b, f, parts, d) with places of each row, against (f, parts, d) with places over all."""
    params = model_params()
    ids = jnp.asarray(np.random.default_rng(1).integers(0, CFG.vocab, (3, 10)), jnp.int32)
    places = (
        jnp.full((3, 10), -1).at[:, 2:6].set(jnp.asarray([[0, 1, 2, 3], [3, 1, 0, 2], [4] * 4]))
    )
    features = normal(3, 5, 3, CFG.width, seed=4)
    run = jax.jit(
        lambda features, places: language.LanguageModel(CFG).apply(
            {"params": params}, ids, jnp.arange(10)[None], features=features, places=places
        )[0]
    )
    shared = jnp.where(places < 0, -1, places + 5 * jnp.arange(3)[:, None])
    np.testing.assert_array_equal(
        run(features, places), run(features.reshape(15, 3, CFG.width), shared)
    )


@pytest.mark.parametrize("parts", [1, 2])
def test_one_cell_a_row_keeps_its_deepstack(parts):
    """The number of parts is not the number of cells."""
    params = random_params(language.abstract_params(CFG), seed=0)
    ids = jnp.asarray([[5, 6, 7]], jnp.int32)
    places = jnp.asarray([[-1, 0, -1]], jnp.int32)
    features = normal(1, parts, CFG.width, seed=1)
    model = language.LanguageModel(CFG)
    run = lambda given: model.apply(
        {"params": params}, ids, jnp.arange(3)[None], features=given, places=places
    )[0]
    np.testing.assert_allclose(run(features[None]), run(features), rtol=1e-6, atol=1e-6)


def test_segments_are_of_rows_without_a_cache():
    params = model_params()
    ids = jnp.zeros((1, 4), jnp.int32)
    with pytest.raises(ValueError, match="no lengths, no cache"):
        language.LanguageModel(CFG).apply(
            {"params": params}, ids, ids, segments=ids + 1, lengths=jnp.array([4])
        )
