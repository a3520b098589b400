"""Training of the miniature's VAE."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from clvr_jax.miniature import autoencoder, samples
from clvr_jax.miniature.pictures import stacked
from clvr_jax.miniature.render import keys, render
from clvr_jax.models.flux2.config import VAE_VARIANTS
from clvr_jax.models.flux2.vae import Vae, patches

pytestmark = pytest.mark.slow  # compiling convolutions takes a minute
CFG = dataclasses.replace(VAE_VARIANTS["miniature"], widths=(4, 4, 8, 8), latent_channels=4)


@pytest.fixture(scope="module")
def given():
    vae = Vae(CFG)
    params = jax.jit(vae.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    drawn = [samples.crowded_picture(samples.generator(0, i)) for i in range(6)]
    codes, seeds = stacked(drawn)
    weights = np.array([1, 1, 1, 1, 0, 1], np.float32)
    batch = {"codes": codes, "seeds": seeds, "weights": weights}
    return vae, params, batch


def test_the_posterior_is_what_the_encoder_gives_before_its_statistics(given):
    vae, params, batch = given
    x = autoencoder.to_values(render(batch["codes"], keys(batch["seeds"])))
    mean, log_var = vae.apply({"params": params}, x, method="posterior")
    params = {**params, "bn": {"mean": jnp.full(16, 0.3), "var": jnp.full(16, 4.0)}}
    z = vae.apply({"params": params}, x, method="encode")
    np.testing.assert_allclose(z, (patches(mean) - 0.3) / 2, atol=1e-4)
    assert mean.shape == log_var.shape == (6, 8, 8, 4)
    np.testing.assert_allclose(
        vae.apply({"params": params}, z, method="decode"),
        vae.apply({"params": params}, mean, method="pixels"),
        atol=2e-4,
    )


def test_the_loss_falls_and_rows_without_weight_do_not_count(given):
    vae, params, batch = given
    loss = jax.jit(lambda p, batch, key: autoencoder.loss(p, {}, {}, batch, key, 32, vae=vae)[:2])
    total, weight = loss(params, batch, jax.random.key(0))
    assert weight == 5
    swapped = {**batch, "codes": np.array(batch["codes"])}
    swapped["codes"][4] = 0
    np.testing.assert_allclose(loss(params, swapped, jax.random.key(0))[0], total, rtol=1e-6)
    value = lambda p, key: loss(p, batch, key)[0] / weight
    tx = optax.adam(1e-2)
    step = jax.jit(jax.value_and_grad(value))
    state, losses = tx.init(params), []
    for i in range(30):
        now, grads = step(params, jax.random.key(i))
        updates, state = tx.update(grads, state)
        params = optax.apply_updates(params, updates)
        losses.append(float(now))
    assert np.mean(losses[-3:]) < 0.5 * losses[0]


def test_statistics_make_latents_standard(given):
    vae, params, batch = given
    pictures = render(batch["codes"], keys(batch["seeds"]))
    pictures = jnp.tile(pictures, (12, 1, 1, 1))  # more than one batch, the last one smaller
    ready = autoencoder.with_statistics(vae, params, pictures)
    z = vae.apply({"params": ready}, autoencoder.to_values(pictures), method="encode")
    np.testing.assert_allclose(z.mean((0, 1, 2)), 0, atol=1e-3)
    live = np.asarray(ready["bn"]["var"]) > 1e-2
    np.testing.assert_allclose(np.asarray(z.std((0, 1, 2)))[live], 1, atol=2e-2)
