"""Paths and noise levels against closed forms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clvr_jax.diffusion import path, schedule
from clvr_jax.diffusion.path import TimeSampling

KEY = jax.random.key(0)
N = 200_000
U = np.linspace(0.02, 0.98, 25)
UNIFORM = TimeSampling("uniform", shift=1)


def normal_quantile(u):
    from statistics import NormalDist

    return np.array([NormalDist().inv_cdf(x) for x in u])


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_the_path_runs_from_data_to_noise_at_the_velocity_of_the_loss():
    x0, eps = normal(3, 4, 2), normal(3, 4, 2, seed=1)
    at = lambda t: path.interpolate(x0, eps, jnp.full(3, t))
    np.testing.assert_array_equal(at(0.0), x0)
    np.testing.assert_array_equal(at(1.0), eps)
    _, slope = jax.jvp(at, (0.3,), (1.0,))
    np.testing.assert_allclose(slope, eps - x0, rtol=1e-6)
    # a network that knows the answer has no loss, and one that is off by d has d^2
    t = jnp.asarray([0.1, 0.5, 0.9])
    off = jnp.asarray([0.0, 1.0, 2.0])[:, None, None]
    losses = path.flow_matching(lambda x, t: eps - x0 + off, x0, eps, t)
    np.testing.assert_allclose(losses, [0, 1, 4], atol=1e-6)
    # the sampler's step along this velocity recovers the data from any x_t
    v = lambda x, t: (x - x0) / t[:, None, None]
    np.testing.assert_allclose(path.flow_matching(v, x0, eps, t), np.zeros(3), atol=1e-9)


def test_each_row_has_its_own_t():
    x0, eps = normal(2, 3, 1), normal(2, 3, 1, seed=1)
    both = path.interpolate(x0, eps, jnp.asarray([0.2, 0.7]))
    np.testing.assert_allclose(both[1], 0.3 * x0[1] + 0.7 * eps[1], rtol=1e-6)


def test_uniform_moments():
    t = np.asarray(UNIFORM.draw(KEY, N, 1024))
    assert t.dtype == np.float32 and t.min() >= 0 and t.max() < 1
    for power in (1, 2, 3):
        assert abs((t**power).mean() - 1 / (power + 1)) < 4 / math.sqrt(N)


@pytest.mark.parametrize("mean,std", [(0, 1), (0.5, 0.7), (-1, 1.5)])
@pytest.mark.parametrize("shift", [1, 3.0, "dynamic"])
def test_logit_normal_quantiles(mean, std, shift):
    times = TimeSampling("logit_normal", mean, std, shift)
    factor = path.dynamic_shift(1024) if shift == "dynamic" else shift
    # a shift multiplies the odds: it adds log a to the mean of the logit
    exact = 1 / (1 + np.exp(-(math.log(factor) + mean + std * normal_quantile(U))))
    np.testing.assert_allclose(times.quantile(U, 1024), exact, rtol=1e-5)
    drawn = np.quantile(np.asarray(times.draw(KEY, N, 1024)), U)
    # standard error of a quantile: sqrt(u (1 - u) / n) / density
    logit = np.log(exact / (1 - exact))
    z = (logit - mean - math.log(factor)) / std
    density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) / (std * exact * (1 - exact))
    assert (np.abs(drawn - exact) < 5 * np.sqrt(U * (1 - U) / N) / density).all()


@pytest.mark.parametrize("factor", [math.exp(0.8), 3.0, 0.5])
def test_shifted_uniform_has_the_closed_form_mean(factor):
    # integral of a u / (1 + (a - 1) u) over [0, 1] = a (a - 1 - ln a) / (a - 1)^2
    t = np.asarray(TimeSampling("uniform", shift=factor).draw(KEY, N, 1))
    exact = factor * (factor - 1 - math.log(factor)) / (factor - 1) ** 2
    assert abs(t.mean() - exact) < 2 / math.sqrt(N)
    assert path.shifted(jnp.asarray(0.5), factor) == pytest.approx(factor / (1 + factor))
    np.testing.assert_allclose(
        path.shifted(path.shifted(jnp.asarray(U), factor), 1 / factor), U, rtol=1e-5
    )


def test_dynamic_shift_is_that_of_flux_1():
    assert path.dynamic_shift(256) == pytest.approx(math.exp(0.5))
    assert path.dynamic_shift(4096) == pytest.approx(math.exp(1.15))
    assert path.dynamic_shift(1024) == pytest.approx(math.exp(0.63))


def test_the_default_is_not_the_shift_of_the_sampler():
    default = TimeSampling()
    for tokens in (256, 1024, 4096):
        assert default.factor(tokens) < math.exp(schedule.empirical_mu(tokens, 28)) / 1.8
        assert np.asarray(default.draw(KEY, 20_000, tokens) < 0.5).mean() > 0.1


@pytest.mark.parametrize("shift", [1, math.exp(0.8)])
def test_the_bell_has_mean_one_and_vanishes_at_the_ends(shift):
    times = TimeSampling("uniform", shift=shift, weighting="bell")
    weights = np.asarray(times.weight(times.draw(KEY, N, 1024), 1024))
    assert abs(weights.mean() - 1) < 5e-3
    ends = jnp.asarray([0.0, 0.5, 1.0])
    np.testing.assert_allclose(times.weight(ends, 1024)[jnp.asarray([0, 2])], [0, 0], atol=1e-6)
    # DiffSynth's table: 1000 levels, minimum subtracted, mean 1
    levels = np.linspace(1, 0, 1001)[:-1]
    sigma = shift * levels / (1 + (shift - 1) * levels)
    y = np.exp(-2 * (sigma - 0.5) ** 2)
    table = (y - y.min()) * 1000 / (y - y.min()).sum()
    np.testing.assert_allclose(times.weight(jnp.asarray(sigma), 1024), table, atol=5e-3)
    compiled = jax.jit(lambda t: times.weight(t, 1024))
    np.testing.assert_allclose(compiled(jnp.asarray(sigma)), table, atol=5e-3)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="distribution 'normal' is unknown; choose from uniform"):
        TimeSampling("normal")
    with pytest.raises(ValueError, match="weighting 'snr' is unknown"):
        TimeSampling(weighting="snr")
    for shift in (0, -1.0, "mu"):
        with pytest.raises(ValueError, match="give a positive factor or 'dynamic'"):
            TimeSampling(shift=shift)
    with pytest.raises(ValueError, match="std is 0"):
        TimeSampling(std=0)
