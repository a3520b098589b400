"""Text features against transformers' Qwen3ForCausalLM."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from clvr_jax.models.qwen3.decoder import Decoder
from tests.parity import coders, reference
from tests.parity.ours import carry
from tests.parity.reference import error_ratio, relative_error, within

TOLERANCE = 5e-6
MODELS = {
    "grouped": {},
    "one_kv_head": dict(layers=28, width=48, heads=6, kv_heads=1, head_width=8, tied=False),
}
BUCKET = 40
LENGTHS = np.int32([3, 17, 40])


@functools.cache
def pair(name: str):
    """A reference model, our config and our parameters."""
    model = coders.text_encoder(**MODELS[name])
    return model, *carry(model)


@functools.cache
def program(cfg):
    return jax.jit(Decoder(cfg).apply, static_argnames="capture")


def ids(batch: int = 3, seed: int = 0) -> np.ndarray:
    """Right-padded tokens of `LENGTHS`, repeated to `batch`."""
    tokens = np.random.default_rng(seed).integers(1, 384, (batch, BUCKET))
    return np.where(np.arange(BUCKET) < np.resize(LENGTHS, batch)[:, None], tokens, 0).astype(
        np.int32
    )


@pytest.mark.parametrize("name", MODELS)
def test_features(name):
    model, cfg, params = pair(name)
    theirs = coders.text_features(model, ids(), LENGTHS)
    for block in np.split(theirs, 3, axis=-1):
        assert 0.3 < block.std() < 3, "the toy model is degenerate"
    ours = program(cfg)({"params": params}, ids(), LENGTHS)
    assert ours.shape == (3, BUCKET, 3 * cfg.width)
    for row in range(3):
        assert within(TOLERANCE, ours[row], theirs[row])
    pads = np.arange(BUCKET) >= LENGTHS[:, None]
    assert within(TOLERANCE, ours[pads], theirs[pads])


def test_choices_that_must_not_be_made_differ():
    """Neighbouring layers, a final norm, visible or zeroed pads: all far outside the tolerance."""
    model, _, _ = pair("grouped")
    right = coders.text_features(model, ids(), LENGTHS)
    wrong = {
        "one layer early": coders.text_features(model, ids(), LENGTHS, (8, 17, 26)),
        "one layer late": coders.text_features(model, ids(), LENGTHS, (10, 19, 28)),
        "layers of dev": coders.text_features(model, ids(), LENGTHS, (10, 20, 28)),
        "other order": coders.text_features(model, ids(), LENGTHS, (27, 18, 9)),
        "pads visible": coders.text_features(model, ids(), np.full(3, BUCKET)),
        "first pad visible": coders.text_features(model, ids(), np.minimum(LENGTHS + 1, BUCKET)),
        "pads zeroed": right * (np.arange(BUCKET) < LENGTHS[:, None])[..., None],
    }
    hidden = torch.from_numpy(right).reshape(3, BUCKET, 3, -1)
    wrong["final norm"] = model.model.norm(hidden).reshape(right.shape).numpy()
    for choice, features in wrong.items():
        assert relative_error(features, right) > 1e-2, choice


def test_other_layers():
    model, cfg, params = pair("grouped")
    theirs = coders.text_features(model, ids(), LENGTHS, (1, 5))
    ours = program(cfg)({"params": params}, ids(), LENGTHS, capture=(1, 5))
    assert within(TOLERANCE, ours, theirs)


@pytest.mark.slow
def test_bfloat16_is_as_exact_as_the_reference():
    """Mean error against float32 over 12 samples, weights rounded to bfloat16 first."""
    ratios = []
    for name in MODELS:
        model, cfg, _ = pair(name)
        rounded = reference.rounded(model)
        _, params = carry(rounded)
        lengths = np.resize(LENGTHS, 12)
        exact = coders.text_features(rounded, ids(12), lengths)
        theirs = coders.text_features(rounded.bfloat16(), ids(12), lengths)
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
        ours = program(cfg)({"params": params}, ids(12), lengths)
        assert ours.dtype == jnp.bfloat16
        ratios.append(error_ratio(ours, theirs, exact))
    assert max(ratios) < 1.25, ratios
