"""The kv attention pattern against diffusers' KV attention processors."""

import functools

import jax
import numpy as np
import pytest

from clvr_jax.models.flux2.layout import Layout
from clvr_jax.models.flux2.transformer import Transformer
from tests.parity import reference
from tests.parity.ours import carry
from tests.parity.reference import normal, relative_error, within

TOLERANCE = 3e-6
TEXT, NOISE = 11, (4, 6)
REFERENCES = ((2, 3), (5, 2))
TIMES = [np.float32([0.7, 1.0]), np.float32([0.3, 0.6]), np.float32([0.0, 0.1])]


@functools.cache
def models():
    model = reference.kv_processors(reference.transformer(seed=3))
    cfg, params = carry(model)
    return model, Transformer(cfg), params


def inputs(layout: Layout):
    model, _, _ = models()
    tokens = normal(2, layout.image_tokens, model.config.in_channels, seed=5)
    return tokens, normal(2, TEXT, model.config.joint_attention_dim, seed=6)


def whole_sequence(network, params, tokens, text, layout):
    """Velocities at `TIMES` with the references in the sequence at every step."""
    run = jax.jit(network.apply, static_argnames="layout")
    return [run({"params": params}, tokens, text, t, layout=layout) for t in TIMES]


@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_velocity(count):
    model, network, params = models()
    layout = Layout(TEXT, NOISE, REFERENCES[:count], pattern="kv")
    tokens, text = inputs(layout)
    theirs = reference.kv_velocities(model, tokens, text, TIMES, NOISE, layout.references)

    for ours, expected in zip(whole_sequence(network, params, tokens, text, layout), theirs):
        assert within(TOLERANCE, ours, expected)

    noise, references = np.split(tokens, [layout.noise_tokens], axis=1)
    encode = jax.jit(
        functools.partial(network.apply, method="encode_references"), static_argnames="layout"
    )
    cache = encode({"params": params}, references, layout=layout)
    run = jax.jit(network.apply, static_argnames="layout")
    for t, expected in zip(TIMES, theirs):
        ours = run({"params": params}, noise, text, t, layout=layout.with_cache(), cache=cache)
        assert within(TOLERANCE, ours, expected)


def test_pattern_is_another_function_than_full():
    """Mask and t = 0 modulation both show on these models, so parity rules out losing one."""
    model, _, _ = models()
    layout = Layout(TEXT, NOISE, REFERENCES, pattern="kv")
    tokens, text = inputs(layout)
    kv = reference.kv_velocities(model, tokens, text, TIMES, NOISE, REFERENCES)
    for t, right in zip(TIMES, kv):
        full = reference.velocity(model, tokens, text, t, NOISE, REFERENCES)
        assert relative_error(full, right) > 1e-2
    # at t = 0 only the mask differs; at other times a cache taken there would be another one
    assert (
        relative_error(
            reference.velocity(model, tokens, text, TIMES[2] * 0, NOISE, REFERENCES),
            reference.kv_velocities(model, tokens, text, [TIMES[2] * 0], NOISE, REFERENCES)[0],
        )
        > 1e-2
    )


def test_without_references_the_pattern_is_plain():
    model, network, params = models()
    layout = Layout(TEXT, NOISE, pattern="kv")
    tokens, text = inputs(layout)
    for t, ours in zip(TIMES, whole_sequence(network, params, tokens, text, layout)):
        theirs = reference.velocity(model, tokens, text, t, NOISE)
        assert within(TOLERANCE, ours, theirs)
