"""The noise schedule and the rounding of timesteps against diffusers and the published values."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

from clvr_jax.diffusion.schedule import empirical_mu, model_times, sigmas

TOKENS = (1, 16, 256, 1024, 2304, 4080, 4096, 4299, 4300, 4301, 4302, 8100, 16384)
STEPS = (1, 2, 4, 8, 20, 28, 50, 200)


def scheduler(tokens: int, steps: int) -> FlowMatchEulerDiscreteScheduler:
    """diffusers' scheduler set as its klein pipeline sets it."""
    made = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    raw = np.linspace(1.0, 1 / steps, steps)
    made.set_timesteps(sigmas=raw, mu=compute_empirical_mu(tokens, steps))
    return made


@pytest.mark.parametrize("tokens", TOKENS)
def test_schedule(tokens):
    for steps in STEPS:
        np.testing.assert_allclose(
            empirical_mu(tokens, steps), compute_empirical_mu(tokens, steps), rtol=1e-12
        )
        theirs = scheduler(tokens, steps).sigmas.numpy()
        ours = sigmas(tokens, steps)
        assert ours.dtype == np.float32 and ours[0] == 1 and ours[-1] == 0
        # theirs shifts in float32: a few units in the last place
        np.testing.assert_allclose(ours, theirs, rtol=5e-7)


@pytest.mark.parametrize(
    ("tokens", "values"),
    [
        (256, (1.9656, 1.9357, 1.8459, 1.7861, 1.6216)),
        (4096, (2.2912, 2.2679, 2.1980, 2.1514, 2.0234)),
        (4301, (1.1847,) * 5),
        (16384, (3.2300,) * 5),
    ],
)
def test_published_shifts(tokens, values):
    ours = [empirical_mu(tokens, steps) for steps in (4, 8, 20, 28, 50)]
    np.testing.assert_allclose(ours, values, atol=6e-5)


@pytest.mark.parametrize(
    ("rounding", "times"),
    [
        ("none", (1000, 967.38, 908.14, 767.20)),
        ("bfl", (1000, 968, 908, 764)),
        ("diffusers", (1000, 968, 908, 768)),
    ],
)
def test_published_roundings(rounding, times):
    ours = 1000 * model_times(jnp.asarray(sigmas(4096, 4)[:-1]), rounding)
    np.testing.assert_allclose(ours, times, atol=6e-3 if rounding == "none" else 1e-4)


@pytest.mark.parametrize("steps", [4, 50])
def test_roundings(steps):
    """Against the references' own operations in torch, at many steps and on both sides of 4300."""
    for tokens in (1024, 4096, 8100):
        made = scheduler(tokens, steps)
        # pipeline: t to bfloat16, / 1000; model: times 1000
        theirs = (made.timesteps.bfloat16() / 1000 * 1000).float().numpy()
        levels = sigmas(tokens, steps)[:-1]
        np.testing.assert_allclose(
            1000 * model_times(jnp.asarray(levels), "diffusers"), theirs, rtol=1e-6
        )
        bfl = (torch.from_numpy(levels).bfloat16() * 1000).float().numpy()
        np.testing.assert_allclose(1000 * model_times(jnp.asarray(levels), "bfl"), bfl, rtol=1e-6)
