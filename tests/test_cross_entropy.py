"""Chunked cross-entropy against the whole one, on one device and on meshes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clvr_jax import parallel
from clvr_jax.models.qwen3 import language
from clvr_jax.models.qwen3.config import VARIANTS

CFG = {
    "tied": dataclasses.replace(VARIANTS["tiny"], vocab=176),
    "untied": dataclasses.replace(VARIANTS["tiny"], vocab=176, tied=False),
}
B, L = 4, 44


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def head_of(cfg, dtype=jnp.float32):
    if cfg.tied:
        return {"embed_tokens": {"embedding": normal(cfg.vocab, cfg.width).astype(dtype)}}
    return {"lm_head": {"kernel": normal(cfg.width, cfg.vocab).astype(dtype)}}


def inputs(b=B, length=L):
    """Hidden states, targets of which some are -100, and weights, 0 there."""
    rng = np.random.default_rng(1)
    weights = rng.uniform(0.5, 2.0, (b, length)) * (rng.uniform(size=(b, length)) < 0.6)
    weights[0] = 0  # a row of padding
    targets = np.where(weights == 0, -100, rng.integers(0, 176, (b, length)))
    hidden = normal(b, length, VARIANTS["tiny"].width, seed=2)
    return hidden, jnp.asarray(targets, jnp.int32), jnp.asarray(weights, jnp.float32)


def whole(params, cfg, hidden, targets, weights):
    """The definition, every logit at once."""
    scores = jax.nn.log_softmax(language.logits(params, cfg, hidden))
    chosen = jnp.take_along_axis(scores, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    return -jnp.sum(weights * chosen)


def differentiated(function, cfg, *given, **options):
    run = lambda params, hidden, targets, weights: function(
        params, cfg, hidden, targets, weights, **options
    )
    return jax.jit(jax.value_and_grad(run, (0, 1, 3)))(*given)


def compare(ours, theirs, tolerance):
    for found, wanted in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
        assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()


@pytest.mark.parametrize("kind", CFG)
@pytest.mark.parametrize("chunk", [1, 7, 44, 512])
def test_equals_the_whole_cross_entropy(kind, chunk):
    """Sum, and gradients of the head, hidden states and weights; chunks that do not divide 44."""
    cfg, given = CFG[kind], inputs()
    ours = differentiated(language.cross_entropy, cfg, head_of(cfg), *given, chunk=chunk)
    theirs = differentiated(whole, cfg, head_of(cfg), *given)
    masked = jnp.where(given[1] < 0, 0, 1)  # -100 has no log p whose weight could be moved
    compare((ours[0], ours[1][:2]), (theirs[0], theirs[1][:2]), 1e-6)
    compare(ours[1][2] * masked, theirs[1][2] * masked, 1e-6)


def test_weight_zero_adds_exactly_nothing():
    """Neither to the sum nor to a gradient, whatever the hidden states there."""
    cfg, (hidden, targets, weights) = CFG["tied"], inputs()
    out = differentiated(language.cross_entropy, cfg, head_of(cfg), hidden, targets, weights)
    away = (weights == 0)[..., None]
    assert not np.any(np.asarray(jnp.where(away, out[1][1], 0)))
    other = jnp.where(away, 50 * normal(*hidden.shape, seed=7), hidden)
    again = differentiated(language.cross_entropy, cfg, head_of(cfg), other, targets, weights)
    np.testing.assert_array_equal(again[0], out[0])
    for ours, theirs in zip(jax.tree.leaves(again[1][:2]), jax.tree.leaves(out[1][:2])):
        np.testing.assert_array_equal(ours, theirs)


def test_the_gradient_of_a_half_precision_head_adds_up_in_float32():
    """Over 44 chunks; the logits' own gradients are rounded once, as where logits are kept."""
    cfg, (hidden, targets, weights) = CFG["untied"], inputs()
    exact = head_of(cfg, jnp.bfloat16), hidden.astype(jnp.bfloat16), targets, weights
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), exact[:2])
    theirs = differentiated(whole, cfg, *wide, targets, weights)
    for chunk in (1, 44):
        ours = differentiated(language.cross_entropy, cfg, *exact, chunk=chunk)
        assert ours[0].dtype == jnp.float32
        compare(ours[0], theirs[0], 1e-5)
        compare(ours[1][:2], theirs[1][:2], 4e-3)


@pytest.mark.parametrize("kind", CFG)
@pytest.mark.parametrize(
    ("sizes", "b"),
    [
        ({"data": 2, "fsdp": 2, "tensor": 2}, B),
        ({"fsdp": 2, "tensor": 2, "context": 2}, B),
        ({"fsdp": 2, "context": 4}, 1),  # rows that fsdp does not divide
        ({"tensor": 4, "fsdp": 2}, B),
    ],
    ids=str,
)
def test_a_mesh_computes_what_one_device_does(kind, sizes, b):
    cfg, given = CFG[kind], inputs(b) if b > 1 else tuple(x[1:2] for x in inputs(2))
    mesh, params = parallel.make_mesh(sizes, jax.devices()[:8]), head_of(cfg)
    expected = differentiated(language.cross_entropy, cfg, params, *given, chunk=8)
    placed = jax.device_put(params, parallel.shardings(params, mesh))
    with jax.set_mesh(mesh):
        found = differentiated(language.cross_entropy, cfg, placed, *given, chunk=8)
    compare(found, expected, 2e-6)


def test_logits_of_all_positions_never_exist():
    """Neither here nor there does a program hold or exchange more than a chunk's logits."""
    cfg = CFG["tied"]
    mesh = parallel.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, jax.devices()[:8])
    shape = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    params = jax.tree.map(shape, head_of(cfg), parallel.shardings(head_of(cfg), mesh))
    rows = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
    hidden, targets, weights = (shape(x, rows) for x in inputs())
    loss = lambda *given: language.cross_entropy(given[0], cfg, *given[1:], chunk=11)
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(params, hidden, targets, weights).compile()
    text = compiled.as_text()
    assert "[1,11,88]" in text  # a row of a device, a chunk, its half of the vocabulary
    for other in ("1,11,176", "4,11", "1,44,88", "4,44,", "1,44,176"):
        assert f"f32[{other}" not in text, other


def test_a_chunk_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least 1 position at a time, got chunk=0"):
        language.cross_entropy(head_of(CFG["tied"]), CFG["tied"], *inputs(), chunk=0)
