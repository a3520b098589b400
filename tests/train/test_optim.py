"""The optimiser: schedules by hand, AdamW against its definition, groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clvr_jax.train import optim


def rates(steps=10, **options):
    rate = optim.schedule(optim.Optim(learning_rate=1.0, **options), steps)
    return [float(rate(step)) for step in range(steps)]


def test_constant_and_warm_up():
    assert rates() == [1.0] * 10
    assert np.allclose(rates(warmup=4.0), [0.25, 0.5, 0.75] + [1.0] * 7)
    assert rates(warmup=0.4) == rates(warmup=4.0)  # a share of all steps


def test_cosine_and_linear_fall_behind_the_warm_up():
    cosine = [0.5 * (1 + np.cos(np.pi * step / 8)) for step in range(8)]
    assert np.allclose(rates(schedule="cosine", warmup=2.0), [0.5, 1.0, *cosine])
    linear = [1 - 0.9 * step / 8 for step in range(8)]
    assert np.allclose(rates(schedule="linear", warmup=2.0, end=0.1), [0.5, 1.0, *linear])


def test_adamw_equals_its_definition():
    """Loshchilov and Hutter's algorithm 2, written out; norms do not decay."""
    draw = np.random.default_rng(0)
    params = {"x": {"kernel": draw.normal(size=(3,)), "scale": draw.normal(size=(3,))}}
    chosen = optim.Optim(
        learning_rate=0.01, weight_decay=0.1, clip_norm=0.5, momentum=(0.9, 0.95), warmup=2.0
    )
    tx = optim.make(chosen, params, 5)
    ours = jax.tree.map(jnp.float32, params)
    state = tx.init(ours)
    m = {name: np.zeros(3) for name in params["x"]}
    v = {name: np.zeros(3) for name in params["x"]}
    theirs = {name: value.copy() for name, value in params["x"].items()}
    for step in range(5):
        grads = {name: draw.normal(size=(3,)) for name in theirs}
        updates, state = tx.update({"x": jax.tree.map(jnp.float32, grads)}, state, ours)
        ours = jax.tree.map(lambda p, u: p + u, ours, updates)
        norm = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
        rate = 0.01 * min((step + 1) / 2, 1)
        for name, value in theirs.items():
            g = grads[name] * min(0.5 / norm, 1)
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.95 * v[name] + 0.05 * g**2
            mean, square = m[name] / (1 - 0.9 ** (step + 1)), v[name] / (1 - 0.95 ** (step + 1))
            decay = 0.1 * value if name == "kernel" else 0
            theirs[name] = value - rate * (mean / (np.sqrt(square) + 1e-8) + decay)
    for name, value in theirs.items():
        np.testing.assert_allclose(ours["x"][name], value, rtol=2e-5)


def test_groups_have_their_own_rate():
    params = {"a": {"kernel": jnp.ones(2)}, "b": {"kernel": jnp.ones(2)}}
    chosen = optim.Optim("sgd", 0.1, momentum=(0.0, 0.0), clip_norm=0.0, groups=(("^a/", 0.5),))
    tx = optim.make(chosen, params, 1)
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(updates["a"]["kernel"], -0.05, rtol=1e-6)
    np.testing.assert_allclose(updates["b"]["kernel"], -0.1, rtol=1e-6)


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(name="adam"), "optim.name is 'adam'; choose from adamw, sgd"),
        (dict(schedule="step"), "choose from constant, cosine, linear"),
        (dict(learning_rate=-1.0), "learning_rate is -1.0"),
        (dict(groups=(("x", 0.0),)), "factors are positive"),
        (dict(moments="int8"), "choose from float32, bfloat16"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        optim.Optim(**options)


def test_what_fits_no_training_is_refused():
    with pytest.raises(ValueError, match="warmup is 20 steps, the whole training has 10"):
        optim.schedule(optim.Optim(warmup=20.0), 10)
    params = {"model": {"visual": {"kernel": jnp.ones(2)}, "language": {"kernel": jnp.ones(2)}}}
    chosen = optim.Optim("sgd", 0.1, momentum=(0.0, 0.0), groups=(("^visual/", 0.5),))
    optim.make(chosen, params, 1)  # as `train` names them
    with pytest.raises(ValueError, match="'visual' matches none of a/kernel"):
        chosen = optim.Optim(groups=(("visual", 0.1),))
        optim.make(chosen, {"a": {"kernel": jnp.ones(1)}}, 1)
