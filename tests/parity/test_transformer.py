"""The transformer against diffusers' Flux2Transformer2DModel."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.transformers import transformer_flux2

from clvr_jax.models.flux2.layout import Layout
from clvr_jax.models.flux2.transformer import Transformer
from clvr_jax.tree import flatten, unflatten
from tests.parity import reference
from tests.parity.ours import carry
from tests.parity.reference import error_ratio, normal, relative_error, round_bfloat16, within

TOLERANCE = 3e-6
TEXT = 13
MODELS = {
    "tiny": {},
    "shallow": dict(heads=2, axes=(4, 6, 6, 8), double=1, single=1, channels=128, text_width=48),
    "deep": dict(heads=6, axes=(2, 4, 6, 2), double=4, single=6, channels=32, mlp_ratio=2.0),
}
REFERENCES = ((2, 3), (4, 1), (3, 3))
NOISE = (5, 7)


@functools.cache
def pair(name: str, stream: float = 1.0):
    """A reference model, our config and our parameters."""
    model = reference.transformer(**MODELS[name], stream=stream)
    return model, *carry(model)


@functools.cache
def program(cfg, method=None):
    return jax.jit(
        functools.partial(Transformer(cfg).apply, method=method), static_argnames="layout"
    )


def inputs(cfg, layout: Layout, batch: int = 3, seed: int = 0):
    """Image tokens, text features, and t = 0, between, and 1."""
    tokens = normal(batch, layout.image_tokens, cfg.channels, seed=seed)
    text = normal(batch, layout.text, cfg.text_width, seed=seed + 1)
    return tokens, text, np.linspace(0, 1, batch, dtype=np.float32) ** 1.5


def both(name: str, layout: Layout, stream: float = 1.0):
    """Our velocity and the reference's for the same inputs."""
    model, cfg, params = pair(name, stream)
    arrays = inputs(cfg, layout)
    theirs = reference.velocity(model, *arrays, layout.noise, layout.references)
    assert 0.3 < theirs.std() < 3, "the toy model is degenerate"
    return program(cfg)({"params": params}, *arrays, layout=layout), theirs


@pytest.mark.parametrize(
    ("name", "references"),
    [("tiny", 0), ("tiny", 1), ("tiny", 2), ("tiny", 3), ("shallow", 2), ("deep", 2)],
)
def test_velocity(name, references):
    ours, theirs = both(name, Layout(TEXT, NOISE, REFERENCES[:references]))
    assert within(TOLERANCE, ours, theirs)


def test_small_activations_show_every_epsilon():
    layout = Layout(TEXT, NOISE, REFERENCES[:2])
    ours, theirs = both("tiny", layout, stream=1e-3)
    assert within(TOLERANCE, ours, theirs)
    _, cfg, params = pair("tiny", 1e-3)
    wrong = dataclasses.replace(cfg, eps=1e-5)
    ours = program(wrong)({"params": params}, *inputs(cfg, layout), layout=layout)
    assert relative_error(ours, theirs) > 1e-2


def test_every_layer_of_every_weight_matters():
    """So that an agreement to 3e-6 leaves no weight misplaced."""
    _, cfg, params = pair("tiny")
    params = jax.device_get(params)  # numpy throughout: one compiled program
    layout = Layout(TEXT, NOISE, REFERENCES[:2])
    arrays = inputs(cfg, layout)
    run = program(cfg)
    right = run({"params": params}, *arrays, layout=layout)
    for path, leaf in flatten(params).items():
        stacked = path.startswith(("double_blocks", "single_blocks"))
        for layer in range(len(leaf)) if stacked else [...]:
            changed = np.array(leaf)
            changed[layer] = 0
            tree = unflatten({**flatten(params), path: changed})
            error = relative_error(run({"params": tree}, *arrays, layout=layout), right)
            assert error > 1e-3, (path, layer, error)


@pytest.mark.parametrize("axis", range(4))
def test_positions_matter(axis):
    """The reference itself answers differently when one id axis is lost."""
    model, cfg, _ = pair("tiny")
    layout = Layout(TEXT, NOISE, REFERENCES[:2])
    tokens, text, t = inputs(cfg, layout)
    right = reference.velocity(model, tokens, text, t, NOISE, layout.references)
    hook = model.pos_embed.register_forward_pre_hook(
        lambda _, args: (args[0] * (torch.arange(4) != axis),)
    )
    try:
        wrong = reference.velocity(model, tokens, text, t, NOISE, layout.references)
    finally:
        hook.remove()
    assert relative_error(wrong, right) > 1e-2


def test_rotary_pairs_matter(monkeypatch):
    """Half-split rotary is another function on these models, so parity rules it out."""
    model, cfg, _ = pair("tiny")
    arrays = inputs(cfg, Layout(TEXT, NOISE))
    right = reference.velocity(model, *arrays, NOISE)
    half_split = functools.partial(transformer_flux2.apply_rotary_emb, use_real_unbind_dim=-2)

    def wrong(x, freqs, sequence_dim):
        cos, sin = (table[:, 0::2].repeat(1, 2) for table in freqs)
        return half_split(x, (cos, sin), sequence_dim=sequence_dim)

    monkeypatch.setattr(transformer_flux2, "apply_rotary_emb", wrong)
    assert relative_error(reference.velocity(model, *arrays, NOISE), right) > 1e-2


@pytest.mark.slow
def test_bfloat16_is_as_exact_as_the_reference():
    """Mean error against float32 over 8 sets of weights, these and the inputs rounded first."""
    layout = Layout(TEXT, NOISE, REFERENCES[:1])
    half = lambda x: jnp.asarray(x, jnp.bfloat16)
    # 1000 t is exact in bfloat16, so that the reference's rounding of t plays no part
    t = np.float32([0, 0.125, 0.25, 0.5, 1])
    found = []
    for seed in range(8):
        model = reference.rounded(reference.transformer(seed=seed))
        cfg, params = carry(model)
        tokens, text, _ = inputs(cfg, layout, batch=len(t), seed=seed)
        tokens, text = round_bfloat16(tokens), round_bfloat16(text)
        sizes = (layout.noise, layout.references)
        exact = reference.velocity(model, tokens, text, t, *sizes)
        theirs = reference.velocity(model.bfloat16(), tokens, text, t, *sizes)
        variables = {"params": jax.tree.map(half, params)}
        ours = program(cfg)(variables, half(tokens), half(text), t, layout=layout)
        assert ours.dtype == jnp.bfloat16
        found.append((np.asarray(ours, np.float32), theirs, exact))
    assert within(1.25, error_ratio(*map(np.concatenate, zip(*found))))
