"""Gradients of the image loss against autograd of the same loss on diffusers' transformer."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from clvr_jax.diffusion.path import TimeSampling
from clvr_jax.generate.image import Networks
from clvr_jax.models.flux2.config import VAE_VARIANTS
from clvr_jax.models.flux2.layout import Layout
from clvr_jax.models.flux2.transformer import Transformer
from clvr_jax.models.flux2.vae import Vae
from clvr_jax.models.qwen3.config import VARIANTS
from clvr_jax.models.qwen3.decoder import Decoder
from clvr_jax.sft.image.loss import Settings, draw, loss
from clvr_jax.tree import flatten
from tests.parity import reference
from tests.parity.ours import carry
from tests.parity.reference import normal, relative_error, within

ROWS = 3
NOISE = (5, 7)
REFERENCES = ((2, 3), (4, 1))
KEY = jax.random.key(4)
SETTINGS = Settings(TimeSampling("uniform", shift=1.0))
WEIGHTS = np.float32([1, 0, 1])  # the second row is filling


@functools.cache
def pair():
    """A reference model, our networks (of which only the transformer runs) and our parameters."""
    model = reference.transformer()
    cfg, params = carry(model)
    nets = Networks(
        Transformer(cfg, remat="full"), Decoder(VARIANTS["tiny"]), Vae(VAE_VARIANTS["tiny"])
    )
    return model, nets, params


def batch(layout):
    cfg = pair()[1].transformer.cfg
    grid = lambda size, seed: normal(ROWS, *size, cfg.channels, seed=seed)
    return {
        "weights": WEIGHTS,
        "text": normal(ROWS, layout.text, cfg.text_width, seed=1),
        "latents": grid(layout.noise, 2),
        "reference_latents": [grid(size, 3 + i) for i, size in enumerate(layout.references)],
    }


def ours(layout):
    """Loss and gradients of the mean over the rows that count."""
    _, nets, params = pair()

    def mean(params):
        total, weight, aux = loss(
            params, {}, {}, batch(layout), KEY, layout, networks=nets, settings=SETTINGS
        )
        return total / weight, aux

    (value, aux), grads = jax.jit(jax.value_and_grad(mean, has_aux=True))(params)
    return float(value), flatten(grads), aux


def theirs(layout, mistake=None):
    """The same of the reference, as diffusers' training script for klein computes them."""
    model, nets, _ = pair()
    model = copy.deepcopy(model).requires_grad_(True)
    rows = batch(layout)
    t, eps = (torch.from_numpy(np.array(x)) for x in draw(KEY, ROWS, layout, nets, SETTINGS))
    tokens = lambda grid: torch.from_numpy(grid).flatten(1, 2)
    x0 = tokens(rows["latents"])
    sigma = t[:, None, None]
    noisy = (1 - sigma) * x0 + sigma * eps
    target = x0 - eps if mistake == "sign" else eps - x0
    refs = [tokens(grid) for grid in rows["reference_latents"]]
    if mistake == "noised references":
        refs = [(1 - sigma) * r + sigma * torch.ones_like(r) for r in refs]
    txt, img, ref = reference.position_ids(ROWS, layout.text, layout.noise, layout.references)
    out = model(
        hidden_states=torch.cat([noisy, *refs], dim=1),
        encoder_hidden_states=torch.from_numpy(rows["text"]),
        timestep=t / 1000 if mistake == "time" else t,
        img_ids=img if ref is None else torch.cat([img, ref], dim=1),
        txt_ids=txt,
        guidance=None,
        return_dict=False,
    )[0]
    if mistake == "references in the loss":
        target = torch.cat([target, *refs], dim=1)
    else:
        out = out[:, : layout.noise_tokens]
    error = ((out - target) ** 2).mean(dim=(1, 2))
    weights = torch.from_numpy(WEIGHTS)
    value = (weights * error).sum() / weights.sum()
    value.backward()
    gradient = copy.deepcopy(model).requires_grad_(False)
    for to, weight in zip(gradient.parameters(), model.parameters(), strict=True):
        to.copy_(weight.grad)
    return float(value.detach()), flatten(carry(gradient)[1])


@pytest.mark.parametrize(
    "references", [pytest.param(n, marks=pytest.mark.slow) for n in (0, 1)] + [2]
)
def test_loss_and_gradients(references):
    layout = Layout(13, NOISE, REFERENCES[:references])
    value, grads, aux = ours(layout)
    expected, their_grads = theirs(layout)
    assert expected > 0.5, "the toy model is degenerate"
    assert within(1e-6, abs(value / expected - 1))
    assert grads.keys() == their_grads.keys()
    for path, grad in their_grads.items():
        assert within(1e-4, grads[path], grad), path
    # the four intervals of t add up to the whole
    total, weight = np.sum([[float(x) for x in pair] for pair in aux.values()], axis=0)
    assert weight == WEIGHTS.sum() and total / weight == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("mistake", ["sign", "time", "noised references", "references in the loss"])
def test_mistakes_are_seen(mistake):
    layout = Layout(13, NOISE, REFERENCES[:1])
    value, grads, _ = ours(layout)
    wrong, their_grads = theirs(layout, mistake)
    assert abs(value / wrong - 1) > 1e-3
    off = [relative_error(grads[path], grad) > 1e-2 for path, grad in their_grads.items()]
    assert np.mean(off) > 0.9


def test_rows_of_weight_zero_change_nothing():
    layout = Layout(13, NOISE, REFERENCES[:1])
    _, nets, params = pair()
    run = jax.jit(
        functools.partial(loss, networks=nets, settings=SETTINGS), static_argnames="static"
    )
    rows = batch(layout)
    total, weight, _ = run(params, {}, {}, rows, KEY, static=layout)
    other = jax.tree.map(lambda x: np.where(np.arange(ROWS) == 1, 0, x.T).T, rows)
    assert not np.array_equal(other["text"], rows["text"])
    assert jnp.array_equal(run(params, {}, {}, other, KEY, static=layout)[0], total)
    assert weight == 2
