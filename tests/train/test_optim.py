"""The optimiser: schedules by hand, AdamW against its definition, groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

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


MUON = optim.Optim("muon", 0.01, momentum=(0.9, 0.95), weight_decay=0.1, clip_norm=0.0)


def steps_of(chosen, params, grads, stacked=()):
    """Updates of some steps at the same parameters."""
    tx = optim.make(chosen, params, len(grads), stacked)
    state, out = tx.init(params), []
    for each in grads:
        updates, state = jax.jit(tx.update)(each, state, params)
        out.append(updates)
    return out


def drawn(seed, **shapes):
    draw = np.random.default_rng(seed)
    return {"x": {name: jnp.float32(draw.normal(size=shape)) for name, shape in shapes.items()}}


def test_muon_makes_kernels_orthogonal_and_leaves_the_rest_to_adamw():
    """Jordan's update at the size of Liu et al. (equation 4), by singular values."""
    shapes = dict(kernel=(12, 8), scale=(8,))
    params, grads = drawn(0, **shapes), [drawn(seed, **shapes) for seed in (1, 2, 3)]
    updates = steps_of(MUON, params, grads)
    adamw = steps_of(optim.dataclasses.replace(MUON, name="adamw"), params, grads)
    momentum, values = np.zeros((12, 8)), [np.asarray(each["x"]["kernel"]) for each in grads]
    for ours, theirs, grad in zip(updates, adamw, values):
        np.testing.assert_allclose(ours["x"]["scale"], theirs["x"]["scale"], rtol=1e-6)
        momentum = 0.9 * momentum + grad
        u, _, v = np.linalg.svd(0.9 * momentum + grad, full_matrices=False)
        direction = -np.asarray(ours["x"]["kernel"]) / 0.01 - 0.1 * np.asarray(
            params["x"]["kernel"]
        )
        # five iterations leave singular values between 0.7 and 1.2 (Jordan), in the same basis
        inner = u.T @ (direction / (0.2 * np.sqrt(12))) @ v.T
        assert np.diag(inner).min() > 0.65 and np.diag(inner).max() < 1.25
        assert np.abs(inner - np.diag(np.diag(inner))).max() < 1e-3


def test_muon_takes_stacked_layers_one_by_one_and_windows_as_inputs():
    params, grads = drawn(0, kernel=(3, 6, 4)), drawn(1, kernel=(3, 6, 4))
    stacked = steps_of(MUON, params, [grads], ["x"])[0]["x"]["kernel"]
    for layer in range(3):
        take = lambda tree, layer=layer: jax.tree.map(lambda leaf: leaf[layer], tree)
        alone = steps_of(MUON, take(params), [take(grads)])[0]["x"]["kernel"]
        np.testing.assert_allclose(stacked[layer], alone, atol=1e-6)
    params, grads = drawn(0, kernel=(3, 3, 2, 4)), drawn(1, kernel=(3, 3, 2, 4))
    window = steps_of(MUON, params, [grads])[0]["x"]["kernel"]
    flat = lambda tree: jax.tree.map(lambda leaf: leaf.reshape(18, 4), tree)
    alone = steps_of(MUON, flat(params), [flat(grads)])[0]["x"]["kernel"]
    np.testing.assert_allclose(window.reshape(18, 4), alone, atol=1e-6)


@pytest.mark.parametrize("features", [(2, 5), (3, 2, 4)])
@pytest.mark.parametrize("layers", [(), (2,)])
def test_muon_takes_all_features_as_outputs(features, layers):
    """Of fused projections too: not a small matrix for every input, as axes alone would have it."""
    shape, columns = (*layers, 6, *features), int(np.prod(features))
    params, grads = drawn(0, kernel=shape), drawn(1, kernel=shape)
    stacked = ["x"] if layers else []
    ours = steps_of(MUON, params, [grads], stacked)[0]["x"]["kernel"]
    flat = lambda tree: jax.tree.map(lambda leaf: leaf.reshape(*layers, 6, columns), tree)
    alone = steps_of(MUON, flat(params), [flat(grads)], stacked)[0]["x"]["kernel"]
    np.testing.assert_allclose(ours.reshape(alone.shape), alone, atol=1e-6)


def test_muon_of_kernels_spread_over_devices_is_that_of_whole_ones(mesh_2x2x2):
    """The iteration multiplies whole matrices, whatever part of them a device holds."""
    params, *grads = (drawn(seed, kernel=(2, 8, 3, 4)) for seed in range(3))
    whole = steps_of(MUON, params, grads, ["x"])
    layout = NamedSharding(mesh_2x2x2, PartitionSpec(None, "fsdp", None, "tensor"))
    with jax.set_mesh(mesh_2x2x2):
        parts = steps_of(MUON, *jax.device_put((params, grads), layout), ["x"])
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one["x"]["kernel"], other["x"]["kernel"], atol=2e-6)


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
        (dict(name="adam"), "optim.name is 'adam'; choose from adamw, muon, sgd"),
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
