"""The VAE against diffusers' AutoencoderKLFlux2 and the latent handling of its pipeline."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline

from clvr_jax.models.flux2.vae import Vae
from clvr_jax.tree import flatten, unflatten
from tests.parity import coders, reference
from tests.parity.ours import carry
from tests.parity.reference import error_ratio, normal, relative_error, round_bfloat16, within

TOLERANCE = 1e-5
VARIANTS = {
    "four_levels": {},
    "two_levels": dict(widths=(8, 12), layers=2, latent=2, groups=2),
    "small_decoder": dict(decoder_widths=(4, 8, 12, 12)),
}
TOKENS = (3, 5)  # rows and columns


@functools.cache
def pair(name: str):
    """A reference model, our config and our parameters."""
    model = coders.vae(**VARIANTS[name])
    return model, *carry(model)


@functools.cache
def program(cfg, method: str):
    return jax.jit(functools.partial(Vae(cfg).apply, method=method))


def images(cfg, batch: int = 2) -> np.ndarray:
    """Smooth non-square pictures with some noise, values in [-1, 1]."""
    rows, cols = (side * cfg.factor for side in TOKENS)
    y, x = np.mgrid[:rows, :cols] / cfg.factor
    waves = [np.sin(x * (1 + c) + y * (2 - c) + i) for i in range(batch) for c in range(3)]
    smooth = np.stack(waves).reshape(batch, 3, rows, cols).transpose(0, 2, 3, 1)
    return np.clip(0.7 * smooth + 0.2 * normal(*smooth.shape), -1, 1).astype(np.float32)


def latents(cfg, batch: int = 2) -> np.ndarray:
    return normal(batch, *TOKENS, 4 * cfg.latent_channels, seed=1)


@pytest.mark.parametrize("name", VARIANTS)
def test_encode(name):
    model, cfg, params = pair(name)
    theirs = coders.encode(model, images(cfg))
    assert 0.3 < theirs.std() < 3, "the toy model is degenerate"
    ours = program(cfg, "encode")({"params": params}, images(cfg))
    assert within(TOLERANCE, ours, theirs)


@pytest.mark.parametrize("name", VARIANTS)
def test_decode(name):
    model, cfg, params = pair(name)
    theirs = coders.decode(model, latents(cfg))
    assert 0.3 < theirs.std() < 1 and np.mean(np.abs(theirs) > 1) < 0.05, "no contrast"
    ours = program(cfg, "decode")({"params": params}, latents(cfg))
    assert within(TOLERANCE, ours, theirs)


@pytest.mark.slow
def test_every_weight_matters_but_the_log_variance():
    _, cfg, params = pair("four_levels")
    params = jax.device_get(params)  # numpy throughout: one compiled program
    arrays = {"encode": images(cfg, 1), "decode": latents(cfg, 1)}
    right = {m: program(cfg, m)({"params": params}, x) for m, x in arrays.items()}

    def change(path, leaf) -> float:
        tree = unflatten({**flatten(params), path: leaf})
        errors = [
            relative_error(program(cfg, m)({"params": tree}, x), right[m])
            for m, x in arrays.items()
        ]
        return max(errors)

    for path, leaf in flatten(params).items():
        if path.endswith("to_k/bias"):
            continue  # adds the same to every score of a query
        assert change(path, np.zeros_like(leaf)) > 1e-3, path
    moments = np.array(params["quant_conv"]["kernel"])
    moments[:, cfg.latent_channels :] = 0
    assert change("quant_conv/kernel", moments) == 0, "the latents must be the mean, not a sample"


def test_channel_order_and_statistics_show():
    """Other channel orders and other places of the epsilon are told apart by the tolerance."""
    model, cfg, _ = pair("four_levels")
    x = images(cfg)
    right = coders.encode(model, x)
    b, rows, cols, _ = right.shape
    nchw = torch.from_numpy(x).permute(0, 3, 1, 2)
    mean = model.encode(nchw).latent_dist.mean.permute(0, 2, 3, 1).numpy()
    cells = mean.reshape(b, rows, 2, cols, 2, -1)  # b row r col s c
    center, var = model.bn.running_mean.numpy(), model.bn.running_var.numpy()
    normalise = lambda z: (z - center) / np.sqrt(var + 1e-4)
    flat = lambda order: cells.transpose(order).reshape(right.shape)
    c_r_s, c_s_r, r_s_c = (0, 1, 3, 5, 2, 4), (0, 1, 3, 5, 4, 2), (0, 1, 3, 2, 4, 5)
    assert relative_error(normalise(flat(c_r_s)), right) < 1e-6
    assert relative_error(normalise(flat(c_s_r)), right) > 1e-2
    assert relative_error(normalise(flat(r_s_c)), right) > 1e-2
    z = flat(c_r_s)
    for deviation in (np.sqrt(var), np.sqrt(var) + 1e-4, np.sqrt(var + 1e-5), var + 1e-4):
        assert relative_error((z - center) / deviation, right) > 1e-3


def test_decode_inverts_the_latent_handling_of_encode():
    """What the reference pipeline does between its encoder and its decoder cancels in ours too."""
    model, cfg, params = pair("four_levels")
    x = images(cfg)
    nchw = torch.from_numpy(x).permute(0, 3, 1, 2)
    theirs = model.decode(model.encode(nchw).latent_dist.mean).sample.permute(0, 2, 3, 1).numpy()
    z = program(cfg, "encode")({"params": params}, x)
    ours = program(cfg, "decode")({"params": params}, z)
    assert within(2 * TOLERANCE, ours, theirs)


@pytest.mark.parametrize("method", ["encode", "decode"])
@pytest.mark.slow
def test_bfloat16_is_as_exact_as_the_reference(method):
    """Mean error against float32 over 8 sets of weights, these and the inputs rounded first."""
    run = getattr(coders, method)
    found = []
    for seed in range(8):
        model = reference.rounded(coders.vae(seed=seed))
        cfg, params = carry(model)
        x = round_bfloat16({"encode": images, "decode": latents}[method](cfg, 2))
        exact = run(model, x)
        theirs = run(model.bfloat16(), x)
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
        ours = program(cfg, method)({"params": params}, jnp.asarray(x, jnp.bfloat16))
        assert ours.dtype == jnp.bfloat16
        found.append((np.asarray(ours, np.float32), theirs, exact))
    assert within(1.25, error_ratio(*map(np.concatenate, zip(*found))))


def test_reference_patchify_is_what_the_sheet_says():
    """Channel 4c + 2r + s, to tie the letters of this file to diffusers' own function."""
    z = torch.arange(2 * 4 * 6).reshape(1, 2, 4, 6)
    packed = Flux2KleinPipeline._patchify_latents(z)
    for c, r, s in np.ndindex(2, 2, 2):
        assert torch.equal(packed[0, 4 * c + 2 * r + s], z[0, c, r::2, s::2])
