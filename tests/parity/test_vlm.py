"""Qwen3 and Qwen3-VL as language models against transformers, whole sequences at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from clvr_jax.models.layers import unstack
from clvr_jax.models.qwen3 import language
from clvr_jax.tree import flatten, unflatten
from tests.parity import coders, vlm
from tests.parity.ours import carry, language_inputs, language_program
from tests.parity.reference import error_ratio, relative_error, within

TOLERANCE = 5e-6


@functools.cache
def pair(name: str, stream: float = 1.0):
    """A reference model, our config and our parameters."""
    model = vlm.model(**vlm.MODELS[name], stream=stream)
    return model, *carry(model)


@functools.cache
def conversations(name: str, rows=vlm.EVERY, room: int = 0) -> vlm.Batch:
    """A batch with patches of a model's size."""
    return vlm.batch(rows, vlm.MODELS[name].get("patch", 4), room=room)


def forward(cfg, params, batch, *, scan: bool = True, capture=(), padded: bool = True):
    """Our logits, final hidden states and captured states."""
    inputs = language_inputs(cfg, params, batch)
    if padded:
        inputs["lengths"] = batch.lengths
    params = params["language"]
    if not scan:
        params = unstack(jax.tree.map(jnp.copy, params), ["layers"])
    hidden, _, kept = language_program(cfg.text, scan)(
        {"params": params}, **inputs, capture=capture
    )
    return language.logits(params, cfg.text, hidden), hidden, kept


@pytest.mark.parametrize(
    ("name", "scan"),
    [
        ("grouped", True),
        ("one_kv_head", True),
        pytest.param("deep", True, marks=pytest.mark.slow),
        ("grouped", False),
    ],
)
def test_every_hidden_state_and_logits(name, scan):
    """States among DeepStack's layers are those before its addition, as the reference's are."""
    model, cfg, params = pair(name)
    batch = conversations(name, room=2)
    scores, states = vlm.answer(model, batch)
    layers = cfg.text.layers
    ours, hidden, kept = forward(cfg, params, batch, scan=scan, capture=tuple(range(layers + 1)))
    assert len(states) == layers + 1
    for row, length in enumerate(batch.lengths):
        assert within(TOLERANCE, ours[row, :length], scores[row, :length])
    real = batch.mask
    for k in range(layers):
        assert 0.3 < states[k][real].std() < 3, "the toy model is degenerate"
        assert within(TOLERANCE, kept[k][real], states[k][real])
    assert within(TOLERANCE, hidden[real], states[layers][real])
    # the reference's last one is normed, and the residual stream is not
    assert relative_error(kept[layers][real], states[layers][real]) > 0.1


@pytest.mark.parametrize("rows", [("text",), ("turns",), ("text", "text")])
def test_without_padding(rows):
    """No lengths; without images no features either."""
    model, cfg, params = pair("grouped")
    batch = conversations("grouped", tuple(vlm.CONVERSATIONS[row] for row in rows))
    assert batch.mask.all()
    ours, _, _ = forward(cfg, params, batch, padded=False)
    assert within(TOLERANCE, ours, vlm.answer(model, batch)[0])


def test_far_positions():
    """A long conversation: what follows the first image comes 30000 positions later."""
    model, cfg, params = pair("one_kv_head")
    batch = conversations("one_kv_head", (vlm.CONVERSATIONS["turns"],))
    inputs = language_inputs(cfg, params, batch)
    inputs["positions"][:, 12:] += 30_000
    given = torch.from_numpy(inputs["positions"]).long().permute(2, 0, 1)
    theirs = vlm.logits(model, batch, position_ids=given)
    params = params["language"]
    hidden, _, _ = language_program(cfg.text)({"params": params}, **inputs)
    assert within(5e-6, language.logits(params, cfg.text, hidden)[0], theirs)


def test_text_does_not_notice_images_of_other_rows():
    """Each row alone gives what it gives in the batch."""
    model, _, _ = pair("grouped")
    batch = conversations("grouped")
    whole, _ = vlm.answer(model, batch)
    first = 0
    for row, (length, grids) in enumerate(zip(batch.lengths, batch.grids, strict=True)):
        pixels = batch.pixels[first : first + len(grids)]
        first += len(grids)
        alone = vlm.Batch(
            batch.ids[row : row + 1, :length], batch.lengths[row : row + 1], (grids,), pixels
        )
        assert within(TOLERANCE, whole[row, :length], vlm.answer(model, alone)[0][0])


def test_small_activations_show_every_epsilon():
    model, cfg, params = pair("grouped", stream=1e-3)
    batch = conversations("grouped", room=2)
    theirs = vlm.logits(model, batch)
    ours, _, _ = forward(cfg, params, batch, capture=tuple(range(cfg.text.layers + 1)))
    assert within(TOLERANCE, ours[batch.mask], theirs)
    normal, _, _ = pair("grouped")
    assert relative_error(vlm.logits(normal, batch), theirs) > 1e-2


def test_every_layer_of_every_weight_matters():
    """So that agreement leaves no weight misplaced."""
    _, cfg, params = pair("grouped")
    params = jax.device_get(params)  # numpy throughout: the compiled programs are used again
    batch = conversations("grouped", room=2)
    capture = tuple(range(cfg.text.layers + 1))
    run = lambda tree: np.asarray(forward(cfg, tree, batch, capture=capture)[0])[batch.mask]
    right = run(params)
    for path, leaf in flatten(params).items():
        stacked = path.startswith(("language/layers", "visual/blocks", "visual/deepstack"))
        for layer in range(len(leaf)) if stacked else [...]:
            changed = np.array(leaf)
            changed[layer] = 0
            tree = unflatten({**flatten(params), path: changed})
            error = relative_error(run(tree), right)
            assert error > 100 * TOLERANCE, (path, layer, error)


@pytest.mark.parametrize(
    "sizes", [{}, dict(width=48, heads=6, kv_heads=1, head_width=8, tied=False)]
)
def test_qwen3(sizes):
    """The plain causal language model of model_type qwen3: right-padded rows, one position axis."""
    model = coders.text_encoder(layers=3, **sizes)
    cfg, params = carry(model, whole=True)
    lengths = np.int32([3, 17, 24])
    ids = np.random.default_rng(0).integers(1, 384, (3, 24)).astype(np.int32)
    real = np.arange(24) < lengths[:, None]
    theirs = coders.text_features(model, ids, lengths, (3,))  # normed, being the last
    theirs = theirs @ model.lm_head.weight.numpy().T
    run = language_program(cfg)
    hidden, _, _ = run({"params": params}, ids, np.arange(24)[None], lengths=lengths)
    ours = language.logits(params, cfg, hidden)
    assert ours.shape == (3, 24, cfg.vocab)
    assert within(TOLERANCE, ours[real], theirs[real])


@pytest.mark.slow
def test_bfloat16_is_as_exact_as_the_reference():
    """Mean error of logits against float32 over 25 rows, weights rounded to bfloat16 first."""
    ratios = []
    for name in ("grouped", "one_kv_head"):
        model, _, _ = pair(name)
        batch = conversations(name, vlm.EVERY[1:] * 5)
        rounded = vlm.rounded(model)
        zeroed = lambda scores, real=batch.mask[..., None]: np.where(real, scores, 0)
        exact = zeroed(vlm.answer(rounded, batch)[0])
        theirs = zeroed(vlm.answer(vlm.rounded(model, "bfloat16"), batch)[0])
        cfg, params = carry(rounded)
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
        ours, hidden, _ = forward(cfg, params, batch)
        assert hidden.dtype == jnp.bfloat16
        ratios.append(error_ratio(zeroed(ours), theirs, exact))
    assert within(1.25, max(ratios)), ratios
