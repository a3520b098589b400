"""Attention patterns lower to the calls that their definition says."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clvr_jax.models.flux2.config import TransformerConfig
from clvr_jax.models.flux2.layout import PATTERNS, Call, Layout, lower, rotary
from clvr_jax.models.flux2.transformer import Transformer, attend_plan

LAYOUTS = [
    Layout(5, (2, 3)),
    Layout(5, (2, 3), ((1, 2),)),
    Layout(5, (2, 3), ((1, 2), (2, 2), (1, 3))),
    Layout(0, (0, 0), ((1, 2), (2, 2))),
]


def allowed(layout):
    """The boolean mask that a pattern means, token by token."""
    kinds = ["text"] * layout.text + ["noise"] * layout.noise_tokens
    index = [-1] * len(kinds)
    for i, (rows, cols) in enumerate(layout.references):
        kinds += ["reference"] * (rows * cols)
        index += [i] * (rows * cols)
    mask = np.zeros((len(kinds), len(kinds)), bool)
    for q, k in itertools.product(range(len(kinds)), repeat=2):
        seen = getattr(PATTERNS[layout.pattern], kinds[q])
        if kinds[k] != "reference":
            mask[q, k] = kinds[k] in seen
        else:
            mask[q, k] = "references" in seen or ("earlier" in seen and index[k] <= index[q])
    return mask


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_lowered_calls_equal_the_mask(layout, pattern):
    layout = Layout(layout.text, layout.noise, layout.references, pattern=pattern)
    mask = allowed(layout)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, len(mask), 3, 8)), jnp.float32) for _ in "qkv")
    scores = jnp.einsum("blhk,bmhk->bhlm", q, k) * 8**-0.5
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
    expected = jnp.einsum("bhlm,bmhk->blhk", weights, v)
    out = attend_plan(q, k, v, lower(layout), None, None)
    np.testing.assert_allclose(out, expected, atol=2e-6)


def test_full_is_one_call_and_kv_two():
    refs = ((2, 2), (1, 3))
    assert lower(Layout(4, (2, 2), refs)).calls == (Call((0, 15), ((0, 15),), False),)
    kv = lower(Layout(4, (2, 2), refs, pattern="kv"))
    assert kv.calls == (Call((0, 8), ((0, 15),), False), Call((8, 15), ((8, 15),), False))
    assert kv.zero == (8, 15)


def test_positions_of_text_noise_and_references():
    axes, theta = (2, 2, 2, 2), 100.0
    cos, sin = rotary(Layout(3, (2, 2), ((1, 2), (2, 1))), axes, theta)
    positions = [(0, 0, 0, i) for i in range(3)]
    positions += [(0, y, x, 0) for y in range(2) for x in range(2)]
    positions += [(10, 0, 0, 0), (10, 0, 1, 0), (20, 0, 0, 0), (20, 1, 0, 0)]
    np.testing.assert_allclose(cos, np.cos(positions), atol=1e-6)
    np.testing.assert_allclose(sin, np.sin(positions), atol=1e-6)


def test_cached_references_count_before_new_ones():
    cached = Layout(3, (2, 2), ((2, 1),), cached=((1, 2),), pattern="causal")
    together = Layout(3, (2, 2), ((1, 2), (2, 1)), pattern="causal")
    np.testing.assert_array_equal(
        rotary(cached, (2, 2, 2, 2), 9.0)[0][-2:], rotary(together, (2, 2, 2, 2), 9.0)[0][-2:]
    )


@pytest.mark.parametrize("pattern", [pytest.param("kv", marks=pytest.mark.slow), "causal"])
def test_cached_equals_uncached(pattern):
    model, params, image, text, t = tiny_inputs(references=((2, 3), (3, 1)))
    layout = Layout(4, (2, 3), ((2, 3), (3, 1)), pattern=pattern)
    expected = run(model, params, image, text, t, layout)
    cache = encode(model, params, image[:, 6:], layout)
    out = run(model, params, image[:, :6], text, t, layout.with_cache(), cache)
    assert float(jnp.abs(out - expected).max() / jnp.abs(expected).max()) < 1e-5


def test_a_causal_cache_grows_without_recomputing_what_it_holds():
    model, params, image, text, t = tiny_inputs(references=((2, 3), (3, 1)))
    together = Layout(4, (2, 3), ((2, 3), (3, 1)), pattern="causal")
    expected = run(model, params, image, text, t, together)
    first = Layout(4, (2, 3), ((2, 3),), pattern="causal")
    cache = encode(model, params, image[:, 6:12], first)
    second = Layout(4, (2, 3), ((3, 1),), cached=((2, 3),), pattern="causal")
    grown = encode(model, params, image[:, 12:], second, cache)
    for old, new in zip(jax.tree.leaves(cache), jax.tree.leaves(grown)):
        np.testing.assert_array_equal(old, new[:, :, :6])
    out = run(model, params, image[:, :6], text, t, second.with_cache(), grown)
    assert float(jnp.abs(out - expected).max() / jnp.abs(expected).max()) < 1e-5


def test_only_patterns_that_allow_it_take_a_cache():
    with pytest.raises(ValueError, match="depend on the noise"):
        Layout(4, (2, 2), cached=((2, 2),))
    with pytest.raises(ValueError, match="encode all of them together"):
        Layout(4, (2, 2), ((2, 2),), ((2, 2),), "kv")
    with pytest.raises(ValueError, match="use kv or causal"):
        Layout(4, (2, 2), ((2, 2),)).references_only()
    with pytest.raises(ValueError, match="choose from full, kv, causal"):
        Layout(4, (2, 2), pattern="sparse")


def test_lengths_must_be_the_layouts():
    model, params, image, text, t = tiny_inputs(references=())
    with pytest.raises(ValueError, match="but Layout"):
        model.apply({"params": params}, image, text, t, Layout(5, (2, 3)))


@functools.partial(jax.jit, static_argnums=(0, 5))
def run(model, params, image, text, t, layout, cache=None):
    return model.apply({"params": params}, image, text, t, layout, cache)


@functools.partial(jax.jit, static_argnums=(0, 3))
def encode(model, params, tokens, layout, cache=None):
    return model.apply({"params": params}, tokens, layout, cache, method="encode_references")


def tiny_inputs(references):
    cfg = TransformerConfig(3, 8, 2, 3, text_width=12, channels=6, rope_axes=(2, 2, 2, 2))
    model, key = Transformer(cfg), jax.random.key(0)
    tokens = 6 + sum(rows * cols for rows, cols in references)
    image = jax.random.normal(key, (2, tokens, 6))
    text = jax.random.normal(key, (2, 4, 12))
    t = jnp.array([0.7, 0.2])
    init = jax.jit(model.init, static_argnums=4)
    params = init(key, image, text, t, Layout(4, (2, 3), references))["params"]
    return model, params, image, text, t
