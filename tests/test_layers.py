"""Layers: rematerialisation, unrolled layers, adapters, norms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clvr_jax import tree
from clvr_jax.models.flux2.config import STACKED, TransformerConfig
from clvr_jax.models.flux2.layout import Layout
from clvr_jax.models.flux2.transformer import Transformer
from clvr_jax.models.layers import (
    REMAT,
    GroupNorm,
    Linear,
    RMSNorm,
    layer_norm,
    product,
    sinusoid,
    unstack,
)

CFG = TransformerConfig(2, 8, 1, 2, text_width=12, channels=6, rope_axes=(2, 2, 2, 2))
LAYOUT = Layout(3, (2, 2), ((1, 2),))


@pytest.fixture(scope="module")
def inputs():
    key = jax.random.key(0)
    arrays = (
        jax.random.normal(key, (1, LAYOUT.image_tokens, 6)),
        jax.random.normal(key, (1, 3, 12)),
        jnp.full(1, 0.4),
    )
    params = jax.jit(Transformer(CFG).init, static_argnums=4)(key, *arrays, LAYOUT)["params"]
    return params, arrays


def gradient(remat, inputs):
    params, arrays = inputs
    net = Transformer(CFG, remat=remat)
    loss = lambda p: jnp.mean(net.apply({"params": p}, *arrays, LAYOUT) ** 2)
    return jax.jit(jax.grad(loss))(params)


@pytest.mark.slow
@pytest.mark.parametrize("remat", [name for name in REMAT if name != "none"])
def test_what_is_kept_changes_no_gradient(remat, inputs):
    expected, found = gradient("none", inputs), gradient(remat, inputs)
    for path, leaf in tree.flatten(found).items():
        np.testing.assert_allclose(leaf, tree.flatten(expected)[path], rtol=1e-4, atol=1e-7)


def test_less_is_kept_where_less_is_asked_for(inputs):
    params, arrays = inputs

    def kept(remat):
        net = Transformer(CFG, remat=remat)
        forward = lambda p: net.apply({"params": p}, *arrays, LAYOUT)
        residuals = jax.eval_shape(lambda p: jax.vjp(forward, p)[1], params)
        return sum(leaf.size for leaf in jax.tree.leaves(residuals))

    assert kept("full") < kept("attention") < kept("dots") < kept("none")


def test_an_unknown_policy_is_refused(inputs):
    with pytest.raises(ValueError, match="choose from none, full, attention, dots"):
        gradient("some", inputs)


@pytest.mark.slow
def test_unrolled_layers_equal_scanned_ones(inputs):
    params, arrays = inputs
    apart = unstack(jax.tree.map(jnp.copy, params), STACKED)
    assert "single_blocks_1" in apart and "single_blocks" not in apart
    assert tree.count(apart) == tree.count(params)
    one = Transformer(CFG).apply({"params": params}, *arrays, LAYOUT)
    other = Transformer(CFG, scan=False).apply({"params": apart}, *arrays, LAYOUT)
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_several_layers_traced_at_once_equal_one(inputs):
    params, arrays = inputs

    def gradient(scan):
        net = Transformer(CFG, scan=scan)
        loss = lambda p: jnp.mean(net.apply({"params": p}, *arrays, LAYOUT) ** 2)
        return tree.flatten(jax.jit(jax.grad(loss))(params))

    one, all_at_once = gradient(1), gradient(8)
    for path, leaf in one.items():
        np.testing.assert_allclose(leaf, all_at_once[path], rtol=1e-4, atol=1e-7)


def test_a_product_is_the_same_on_flat_rows_and_on_a_mesh():
    keys = jax.random.split(jax.random.key(0), 2)
    x, kernel = jax.random.normal(keys[0], (4, 3, 6)), jax.random.normal(keys[1], (6, 2, 5))
    value = lambda x, kernel: jnp.sum(jnp.tanh(product(x, kernel)))
    flat = jax.value_and_grad(value, (0, 1))(x, kernel)
    assert "reshape" in str(jax.make_jaxpr(value)(x, kernel))
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        assert "reshape" not in str(jax.make_jaxpr(value)(x, kernel)), "would mix spread axes"
        spread = jax.jit(jax.value_and_grad(value, (0, 1)))(x, kernel)
    for a, b in zip(jax.tree.leaves(flat), jax.tree.leaves(spread), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(product(x, kernel), jnp.tensordot(x, kernel, 1), rtol=1e-6)


def test_an_adapter_adds_its_product():
    key = jax.random.key(1)
    x, a = jax.random.normal(key, (2, 5)), jax.random.normal(key, (5, 2))
    b = jax.random.normal(key, (2, 3, 4))
    params = Linear((3, 4)).init(key, x)["params"]
    out = Linear((3, 4)).apply({"params": params, "lora": {"a": a, "b": b}}, x)
    kernel = params["kernel"] + jnp.einsum("ir,rjk->ijk", a, b)
    np.testing.assert_allclose(out, jnp.einsum("bi,ijk->bjk", x, kernel), rtol=1e-5, atol=1e-5)


def test_norms_equal_their_definitions():
    x = np.random.default_rng(0).normal(3.0, 2.0, (2, 4, 4, 6))
    scale, bias = np.arange(1.0, 7.0), np.arange(6.0)
    h = x.reshape(2, 16, 3, 2)
    h = (h - h.mean((1, 3), keepdims=True)) / np.sqrt(h.var((1, 3), keepdims=True) + 1e-6)
    out = GroupNorm(3).apply({"params": {"scale": scale, "bias": bias}}, jnp.asarray(x, "float32"))
    np.testing.assert_allclose(out, h.reshape(x.shape) * scale + bias, rtol=2e-5, atol=2e-5)
    rms = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-2) * scale
    out = RMSNorm(1e-2).apply({"params": {"scale": scale}}, jnp.asarray(x, "float32"))
    np.testing.assert_allclose(out, rms, rtol=2e-5)
    centred = x - x.mean(-1, keepdims=True)
    norm = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-3)
    np.testing.assert_allclose(layer_norm(jnp.asarray(x, "float32"), 1e-3), norm, atol=2e-5)


def test_the_sinusoid_has_cosines_first_and_starts_at_frequency_one():
    zero = sinusoid(jnp.zeros(1), 8)[0]
    np.testing.assert_array_equal(zero, [1, 1, 1, 1, 0, 0, 0, 0])
    np.testing.assert_allclose(sinusoid(jnp.full(1, 2.0), 8)[0, [0, 4]], [np.cos(2), np.sin(2)])
