"""A training step: accumulation, precisions, average, adapters, guard."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from clvr_jax import lora
from clvr_jax.train import optim, rounding
from clvr_jax.train.state import abstract, create
from clvr_jax.train.step import Settings, compiled, make_step, not_finite

from . import toy

OTHERS = {"noise": jnp.float32(0.1)}
KEY = jax.random.key(7)


def prepared(params, settings=None, **options):
    settings = settings or Settings("float32")
    chosen = optim.Optim(**{"name": "sgd", "momentum": (0.0, 0.0), "learning_rate": 0.1, **options})
    tx = optim.make(chosen, params, 10)
    params = jax.tree.map(lambda x: jnp.array(x, settings.param_dtype), params)
    run = compiled(make_step(toy.loss, tx, settings, optim.schedule(chosen, 10)))
    return create(params, tx, settings.ema > 0), run


def run_steps(params, batches, settings=None, frozen=None, **options):
    state, run = prepared(params, settings, **options)
    frozen = frozen or {"model": {}, "others": OTHERS}
    outs = []
    for batch in batches:
        state, out = run(state, frozen, batch, KEY, "static")
        outs.append(jax.device_get(out))
    return state, outs


def test_sgd_is_the_gradient_of_the_mean():
    params, batch = {"model": toy.params()}, toy.batch(0)
    flat = {k: v[0] for k, v in batch.items()}
    key = jax.random.fold_in(jax.random.fold_in(KEY, 0), 0)

    def mean(model):
        total, weight, _ = toy.loss(model, {}, OTHERS, flat, key, None)
        return total / weight

    value, grads = jax.value_and_grad(mean)(params["model"])
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, params["model"], grads)
    state, outs = run_steps(params, [batch], clip_norm=0.0)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state.params["model"], expected
    )
    total, weight = outs[0]["metrics"]["loss"]
    np.testing.assert_allclose(total / weight, value, rtol=1e-6)
    np.testing.assert_allclose(
        outs[0]["metrics"]["grad_norm"][0], optax.tree.norm(grads), rtol=1e-6
    )


def test_micro_batches_add_up_to_one_large_batch():
    """Also with unequal weights: the mean is over all real rows."""
    batch = toy.batch(0, accumulation=4, rows=2)
    batch["weight"][1] = 0.0
    batch["weight"][2, 1] = 3.0
    whole = {k: v.reshape(1, 8, *v.shape[2:]) for k, v in batch.items()}
    frozen = {"model": {}, "others": {"noise": jnp.float32(0)}}
    params = {"model": toy.params()}
    apart, a = run_steps(params, [batch], frozen=frozen)
    together, b = run_steps(params, [whole], frozen=frozen)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-6), apart.params, together.params
    )
    np.testing.assert_allclose(a[0]["metrics"]["loss"], b[0]["metrics"]["loss"], rtol=1e-6)


def test_micro_batches_draw_their_own_noise():
    batch = toy.batch(0, accumulation=2, rows=4)
    batch = {k: np.stack([v[0], v[0]]) for k, v in batch.items()}
    frozen = {"model": {}, "others": {"noise": jnp.float32(5)}}
    _, (out,) = run_steps({"model": toy.params()}, [batch], frozen=frozen)
    _, (alone,) = run_steps(
        {"model": toy.params()}, [{k: v[:1] for k, v in batch.items()}], frozen=frozen
    )
    assert abs(out["metrics"]["loss"][0] - 2 * alone["metrics"]["loss"][0]) > 1.0


def test_aux_is_divided_by_its_own_weight():
    _, (out,) = run_steps({"model": toy.params()}, [toy.batch(0, 2, 4)])
    assert out["metrics"]["half"][1] == 2 and out["metrics"]["absolute"][1] == 8


def test_mixed_precision_keeps_float32_masters():
    state, _ = run_steps({"model": toy.params()}, [toy.batch(0)], Settings("mixed"))
    assert state.params["model"]["first"]["kernel"].dtype == jnp.float32
    exact, _ = run_steps({"model": toy.params()}, [toy.batch(0)], Settings("float32"))
    difference = jax.tree.map(lambda a, b: float(jnp.max(abs(a - b))), state.params, exact.params)
    assert 0 < max(jax.tree.leaves(difference)) < 2e-3


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_pure_bfloat16_learns_what_rounding_to_nearest_cannot(moments):
    """At this rate an update is far below half a unit: rounded to nearest nothing would move."""
    params = {"model": {"first": {"kernel": jnp.ones((64, 64))}}}

    def loss(params, adapters, others, batch, key, static):
        # Adam's update is the learning rate itself for every weight
        return jnp.sum(params["first"]["kernel"].astype(jnp.float32)), jnp.float32(1), {}

    chosen = optim.Optim(learning_rate=1e-4, moments=moments, clip_norm=0.0)
    tx = optim.make(chosen, params, 40)
    settings = Settings("bfloat16")
    state = create(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), tx)
    run = compiled(make_step(loss, tx, settings, optim.schedule(chosen, 40)))
    for _ in range(40):
        state, _ = run(state, {"model": {}, "others": {}}, {"x": jnp.zeros((1, 1))}, KEY, None)
    kernel = state.params["model"]["first"]["kernel"]
    assert kernel.dtype == jnp.bfloat16
    assert abs(float(jnp.mean(kernel.astype(jnp.float32))) - (1 - 40e-4)) < 4e-4
    assert (jnp.ones(()).astype(jnp.bfloat16) - jnp.bfloat16(1e-4)) == 1  # to nearest: stuck


def test_stochastic_rounding_is_right_on_average_and_keeps_exact_values():
    x = jnp.full((200_000,), 1 + 0.3 * 2**-7, jnp.float32)
    for sign in (1, -1):
        rounded = rounding.stochastic(sign * x, jax.random.key(0)).astype(jnp.float32)
        assert set(np.unique(rounded)) == {sign * 1.0, sign * (1 + 2**-7)}
        share = float(jnp.mean(jnp.abs(rounded) > 1))
        assert abs(share - 0.3) < 5 * (0.3 * 0.7 / len(x)) ** 0.5
    exact = jnp.array([0.0, -0.0, 1.5, -(2.0**-130), jnp.inf, -jnp.inf])
    assert (rounding.stochastic(exact, jax.random.key(1)) == exact.astype(jnp.bfloat16)).all()
    assert jnp.isnan(rounding.stochastic(jnp.array([jnp.nan]), jax.random.key(1))).all()


def test_moving_average_follows_its_formula():
    settings = Settings("float32", ema=0.9)
    state, _ = run_steps({"model": toy.params()}, [toy.batch(i) for i in range(3)], settings)
    plain, average = None, None
    for n in range(4):
        done, _ = run_steps({"model": toy.params()}, [toy.batch(i) for i in range(n)])
        plain = np.asarray(done.params["model"]["last"]["kernel"])
        decay = min(0.9, n / (9 + n)) if n else None  # n - 1 steps before this one
        average = plain if average is None else average + (1 - decay) * (plain - average)
    np.testing.assert_allclose(state.ema["model"]["last"]["kernel"], average, rtol=1e-6)


def test_only_what_is_selected_is_trained():
    model = toy.params()
    frozen = {"model": {"first": model["first"]}, "others": OTHERS}
    state, _ = run_steps({"model": {"last": model["last"]}}, [toy.batch(0)], frozen=frozen)
    assert list(state.params["model"]) == ["last"]
    full, _ = run_steps({"model": model}, [toy.batch(0)], clip_norm=0.0)
    part, _ = run_steps(
        {"model": {"last": model["last"]}}, [toy.batch(0)], frozen=frozen, clip_norm=0.0
    )
    np.testing.assert_allclose(
        part.params["model"]["last"]["kernel"], full.params["model"]["last"]["kernel"], rtol=1e-6
    )


def test_adapters_train_alone():
    model = toy.params()
    adapters = lora.init(jax.random.key(1), model, "first", rank=2)
    frozen = {"model": model, "others": OTHERS}
    state, outs = run_steps({"lora": adapters}, [toy.batch(0), toy.batch(1)], frozen=frozen)
    assert list(state.params) == ["lora"]
    assert float(jnp.max(jnp.abs(state.params["lora"]["first"]["b"]))) > 0
    assert set(outs[0]["norms"]) == {"lora/first/a", "lora/first/b"}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_that_is_not_finite_changes_nothing_and_is_named(accumulation):
    good, bad = toy.batch(0, accumulation, 4), toy.batch(1, accumulation, 4)
    bad["x"][0, 0, 0] = np.nan
    settings = Settings("float32", ema=0.9)
    params = {"model": toy.params()}
    before, _ = run_steps(params, [good], settings, name="adamw", momentum=(0.9, 0.99))
    state, outs = run_steps(params, [good, bad], settings, name="adamw", momentum=(0.9, 0.99))
    assert outs[0]["finite"] and not outs[1]["finite"]
    assert int(state.step) == 2
    jax.tree.map(np.testing.assert_array_equal, before.params, state.params)
    jax.tree.map(np.testing.assert_array_equal, before.opt_state, state.opt_state)
    jax.tree.map(np.testing.assert_array_equal, before.ema, state.ema)
    assert "model/first/kernel" in not_finite(outs[1]["norms"])


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="precision is 'fp8'; choose from float32, mixed"):
        Settings("fp8")
    with pytest.raises(ValueError, match=r"ema is 1\.0"):
        Settings("mixed", ema=1.0)


def test_the_state_as_shapes_is_the_state():
    params = {"model": toy.params()}
    tx = optim.make(optim.Optim(), params, 10)
    state = create(params, tx, ema=True)
    shapes = abstract(params, tx, ema=True)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes
    )
