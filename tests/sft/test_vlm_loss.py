"""The loss of packed conversations: packing changes nothing, and only what trains has gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clvr_jax import lora, parallel, tree
from clvr_jax.models.qwen3 import language
from clvr_jax.models.qwen3_vl.config import STACKED
from clvr_jax.sft.vlm import batches
from clvr_jax.sft.vlm import loss as losses
from tests.sft import vlm_cases as cases
from tests.sft.vlm_cases import CFG, FROZEN, NETWORKS

KEY = jax.random.key(0)
PACKINGS = {
    "one row": ([*range(6)],),
    "another order": ([], [4, 0], [2, 5, 1], [3]),
    "two by two": ([5, 4], [3, 2], [1, 0]),
}


def batch(*rows):
    """Rows and their shape, always the same one, for every shape is a program to compile."""
    step = cases.step(*rows, *[[]] * (4 - len(rows)), tokens=128, images=8)
    made = cases.first(batches.make(step, cases.examples().__getitem__, CFG.vision))
    return jax.tree.map(jnp.asarray, made), step.static


@functools.partial(jax.jit, static_argnums=(3, 4))
def run(params, adapters, rows, static, networks=NETWORKS):
    """(mean loss, (sum, weight)) and gradients of parameters and adapters."""

    def mean(params, adapters):
        total, weight, aux = losses.loss(
            params, adapters, FROZEN, rows, KEY, static, networks=networks
        )
        assert aux == {}
        return total / weight, (total, weight)

    return jax.value_and_grad(mean, argnums=(0, 1), has_aux=True)(params, adapters)


@functools.cache
def alone():
    """Sums of losses, of weights and of gradients of every conversation by itself."""
    total, weight, grads = 0, 0, jax.tree.map(np.zeros_like, cases.params())
    for i, example in enumerate(cases.examples()):
        rows, static = batch([i])
        (_, (own, count)), (g, _) = run(cases.params(), {}, rows, static)
        assert count == example.trained[1:].sum()
        total, weight = total + own, weight + count
        grads = jax.tree.map(lambda a, b, count=count: a + np.asarray(b) * count, grads, g)
    return total, weight, grads


def apart(ours, theirs):
    """The largest difference of any leaf, relative to the leaf."""
    errors = {}
    for path, leaf in tree.flatten(theirs).items():
        scale = np.abs(leaf).max()
        assert scale > 0, f"{path} does not matter"
        errors[path] = float(np.abs(tree.flatten(ours)[path] - leaf).max() / scale)
    return max(errors.values())


@pytest.mark.parametrize("packing", PACKINGS)
def test_packing_changes_no_loss_and_no_gradient(packing):
    total, weight, grads = alone()
    rows, static = batch(*PACKINGS[packing])
    (_, (packed, count)), (g, _) = run(cases.params(), {}, rows, static)
    assert count == weight
    assert abs(packed / total - 1) < 1e-6
    assert apart(jax.tree.map(lambda x: np.asarray(x) * count, g), grads) < 2e-6


def test_the_loss_is_the_mean_of_log_probabilities():
    """Of one conversation of text, from the logits of every token."""
    example = cases.examples()[3]
    rows, static = batch([3])
    (mean, _), _ = run(cases.params(), {}, rows, static)
    params = cases.params()["language"]
    ids, positions = jnp.asarray(example.ids)[None], jnp.asarray(example.positions)[None]
    hidden, _, _ = NETWORKS.language.apply({"params": params}, ids, positions)
    scores = jax.nn.log_softmax(language.logits(params, CFG.text, hidden))[0]
    learnt = np.flatnonzero(example.trained)
    assert len(learnt) == 4
    wanted = -np.mean([scores[i - 1, example.ids[i]] for i in learnt])
    np.testing.assert_allclose(mean, wanted, rtol=1e-6)


def test_a_frozen_tower_is_not_gone_back_through():
    rows, static = batch(*PACKINGS["another order"])

    def gradient(networks):
        f = lambda p: losses.loss(p, {}, FROZEN, rows, KEY, static, networks=networks)[0]
        return jax.grad(f)

    loops = lambda networks: str(jax.make_jaxpr(gradient(networks))(cases.params())).count(" scan[")
    frozen = dataclasses.replace(NETWORKS, train_vision=False)
    # the blocks and DeepStack's mergers; the layers of the language model are still gone through
    assert loops(NETWORKS) - loops(frozen) == 2
    visual = jax.jit(lambda params: gradient(frozen)(params)["visual"])
    program = visual.lower(cases.params()).compile()
    assert "dot(" not in program.as_text() and "while(" not in program.as_text()
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(program(cases.params())))


def adapters_of(pattern: str):
    """Adapters whose both factors matter."""
    init = lambda: lora.init(jax.random.key(0), cases.params(), pattern, 2, STACKED)
    rng = np.random.default_rng(1)
    draw = lambda x: 0.4 * rng.standard_normal(x.shape).astype(np.float32)
    return jax.tree.map(draw, jax.eval_shape(init))


def merged(params, adapters):
    """Parameters with `a @ b` in the kernels, in numpy: merging here compiles for every shape."""
    flat = tree.flatten(params)
    for path, (a, b) in lora.pairs(adapters).items():
        delta = [np.tensordot(*ab, axes=1) for ab in zip(a, b)] if a.ndim == 3 else a @ b
        flat[f"{path}/kernel"] = flat[f"{path}/kernel"] + delta
    return tree.unflatten(flat)


@pytest.mark.slow
def test_adapters_of_both_halves():
    rows, static = batch(*PACKINGS["another order"])
    adapters = adapters_of(r"(layers|blocks|merger\w*)/.*kernel")
    assert adapters.keys() == {"language", "visual"}
    (value, _), (_, g) = run(cases.params(), adapters, rows, static)
    (same, _), _ = run(merged(cases.params(), adapters), {}, rows, static)
    (plain, _), _ = run(cases.params(), {}, rows, static)
    np.testing.assert_allclose(value, same, rtol=1e-5)
    assert abs(value - plain) > 1e-2
    for path, leaf in tree.flatten(g).items():
        assert np.any(leaf), f"{path} has no gradient"


def test_what_cannot_train_is_refused():
    rows, static = batch([2])
    for pattern in ("lm_head", "patch_embed"):
        adapters = adapters_of(pattern)
        with pytest.raises(ValueError, match=f"{pattern}/a.* have no effect"):
            run(cases.params(), adapters, rows, static)
    blind = dataclasses.replace(NETWORKS, vision=None)
    with pytest.raises(ValueError, match="no vision tower"):
        run(cases.params(), {}, rows, static, blind)


def test_bfloat16():
    """Computed in the parameters' type, summed in float32."""
    rows, static = batch(*PACKINGS["one row"])
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), cases.params())
    (_, (total, weight)), (g, _) = jax.eval_shape(lambda p: run(p, {}, rows, static), half)
    assert total.dtype == weight.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(g)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.slow
def test_sharded_equals_single_device(mesh_2x2x2):
    rows, static = batch(*PACKINGS["two by two"])
    (mean, sums), (g, _) = run(cases.params(), {}, rows, static)
    with jax.set_mesh(mesh_2x2x2):
        where = parallel.shardings(cases.params(), mesh_2x2x2)
        params = jax.device_put(cases.params(), where)
        spread = jax.sharding.NamedSharding(
            mesh_2x2x2, jax.sharding.PartitionSpec(("data", "fsdp"))
        )
        there = jax.device_put(rows, spread)
        (same, again), (h, _) = run(params, {}, there, static)
    np.testing.assert_allclose(same, mean, rtol=1e-6)
    np.testing.assert_allclose(again, sums, rtol=1e-6)
    assert apart(h, jax.tree.map(np.asarray, g)) < 5e-6
