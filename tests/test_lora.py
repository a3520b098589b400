"""Adapter trees: shapes and distribution of new ones, merging, scaling, errors."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from clvr_jax import lora, tree

STACKED = ("blocks",)


def shapes(**leaves):
    flat = {path.replace("__", "/"): shape for path, shape in leaves.items()}
    return tree.unflatten({k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in flat.items()})


PARAMS = shapes(
    img_in__kernel=(64, 24),
    modulation__kernel=(64, 6, 24),
    blocks__qkv__kernel=(3, 64, 3, 4, 16),
    blocks__attn_out__kernel=(3, 64, 24),
    blocks__norm__scale=(3, 16),
)


def normal(abstract, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    flat = tree.flatten(abstract)
    return tree.unflatten({k: rng.standard_normal(v.shape).astype(dtype) for k, v in flat.items()})


def adapters(pattern=".", rank=5, seed=1):
    """Adapters whose b is not zero."""
    return normal(lora.init(jax.random.key(0), PARAMS, pattern, rank, STACKED), seed)


def test_shapes_follow_the_kernels():
    made = lora.init(jax.random.key(0), PARAMS, "blocks|modulation", 5, STACKED, jnp.bfloat16)
    expected = shapes(
        modulation__a=(64, 5),
        modulation__b=(5, 6, 24),
        blocks__qkv__a=(3, 64, 5),
        blocks__qkv__b=(3, 5, 3, 4, 16),
        blocks__attn_out__a=(3, 64, 5),
        blocks__attn_out__b=(3, 5, 24),
    )
    assert tree.differences(made, expected) == []
    assert {leaf.dtype for leaf in tree.flatten(made).values()} == {jnp.dtype("bfloat16")}
    assert lora.ranks(made) == {"modulation": 5, "blocks/qkv": 5, "blocks/attn_out": 5}


def test_new_adapters_are_uniform_and_change_nothing():
    made = tree.flatten(lora.init(jax.random.key(0), PARAMS, "qkv", 50, STACKED))
    a = np.asarray(made["blocks/qkv/a"]) * 8  # sqrt(64): uniform in +-1
    quantiles = np.quantile(a, [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(quantiles, [-1, -0.5, 0, 0.5, 1], atol=0.03)
    assert np.ptp(a, axis=0).min() > 0  # layers differ
    assert not np.any(made["blocks/qkv/b"])


def test_a_draw_depends_on_its_path_only():
    alone = tree.flatten(lora.init(jax.random.key(3), PARAMS, "attn_out", 4, STACKED))
    among = tree.flatten(lora.init(jax.random.key(3), PARAMS, ".", 4, STACKED))
    other = tree.flatten(lora.init(jax.random.key(4), PARAMS, "attn_out", 4, STACKED))
    np.testing.assert_array_equal(alone["blocks/attn_out/a"], among["blocks/attn_out/a"])
    assert np.any(alone["blocks/attn_out/a"] != other["blocks/attn_out/a"])
    assert np.any(among["blocks/attn_out/a"] != among["blocks/qkv/a"])


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_merge_adds_the_product_and_rounds_once(dtype):
    params, given = normal(PARAMS, dtype=dtype), adapters("qkv|img_in")
    merged = tree.flatten(lora.merge(params, given))
    flat, pairs = tree.flatten(params), lora.pairs(given)
    a, b = (leaf.astype(np.float64) for leaf in pairs["blocks/qkv"])
    stacked = flat["blocks/qkv/kernel"].astype(np.float64)
    stacked += np.einsum("lir,lrphk->liphk", a, b)
    a, b = (leaf.astype(np.float64) for leaf in pairs["img_in"])
    plain = flat["img_in/kernel"].astype(np.float64) + a @ b
    for path, exact in (("blocks/qkv/kernel", stacked), ("img_in/kernel", plain)):
        assert merged[path].dtype == dtype
        half_ulp = float(jnp.finfo(dtype).eps) / 2
        error = np.abs(np.asarray(merged[path]).astype(np.float64) - exact)
        assert (error <= (half_ulp * 1.01) * np.abs(exact) + 5e-6).all()
    for path in set(flat) - {"blocks/qkv/kernel", "img_in/kernel"}:
        assert merged[path] is flat[path]


def test_merge_is_the_same_on_a_mesh(mesh_2x2x2):
    params, given = normal(PARAMS), adapters()
    specs = {
        "blocks/qkv/kernel": P(None, "fsdp", None, "tensor"),
        "blocks/attn_out/kernel": P(None, "tensor", "fsdp"),
        "blocks/qkv/a": P(None, "fsdp", None),
    }
    put = lambda tree_: tree.unflatten(
        {
            path: jax.device_put(leaf, NamedSharding(mesh_2x2x2, specs.get(path, P())))
            for path, leaf in tree.flatten(tree_).items()
        }
    )
    sharded = tree.flatten(jax.jit(lora.merge)(put(params), put(given)))
    for path, leaf in tree.flatten(lora.merge(params, given)).items():
        np.testing.assert_allclose(sharded[path], leaf, rtol=1e-6, atol=1e-6)
    spec = sharded["blocks/qkv/kernel"].sharding.spec
    assert tuple(spec)[:4] == (None, "fsdp", None, "tensor")


def test_scaled_multiplies_the_effect():
    params, given = normal(PARAMS), adapters()
    zero = tree.flatten(lora.merge(params, lora.scaled(given, 0.0)))
    half = tree.flatten(lora.merge(params, lora.scaled(given, 0.5)))
    full = tree.flatten(lora.merge(params, given))
    for path, leaf in tree.flatten(params).items():
        np.testing.assert_array_equal(zero[path], leaf)
        np.testing.assert_allclose(half[path], (leaf + full[path]) / 2, rtol=1e-5, atol=1e-5)


def test_scaled_keeps_the_dtype():
    for make in (np.asarray, jnp.asarray):
        given = {"x": {"a": make(np.ones((2, 1))), "b": make(np.ones((1, 2), ml_dtypes.bfloat16))}}
        b = lora.scaled(given, 0.5)["x"]["b"]
        assert b.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(b, np.float32), 0.5)


def test_a_pattern_without_a_match_names_the_kernels():
    with pytest.raises(ValueError, match=r"'qvk' matches no kernel.*blocks/qkv/kernel"):
        lora.init(jax.random.key(0), PARAMS, "qvk", 4, STACKED)
    with pytest.raises(ValueError, match=r"'norm' matches no kernel"):  # a scale is no kernel
        lora.init(jax.random.key(0), PARAMS, "norm", 4, STACKED)
    with pytest.raises(ValueError, match="rank must be 1 or more, given 0"):
        lora.init(jax.random.key(0), PARAMS, ".", 0, STACKED)


def test_adapters_that_do_not_fit_are_refused():
    params = normal(PARAMS)
    a, b = np.zeros((64, 2), np.float32), np.zeros((2, 24), np.float32)
    with pytest.raises(ValueError, match="adapter elsewhere has no kernel elsewhere/kernel"):
        lora.merge(params, {"elsewhere": {"a": a, "b": b}})
    with pytest.raises(
        ValueError, match=r"img_in: a \(64, 2\) and b \(3, 24\) do not fit.*\(64, 24\)"
    ):
        lora.merge(params, {"img_in": {"a": a, "b": np.zeros((3, 24), np.float32)}})
    with pytest.raises(ValueError, match=r"do not fit the kernel \(3, 64, 24\)"):  # no layer axis
        lora.merge(params, {"blocks": {"attn_out": {"a": a, "b": b}}})
    with pytest.raises(ValueError, match="one is missing at img_in"):
        lora.merge(params, {"img_in": {"a": a}})
    with pytest.raises(ValueError, match="named a and b; found img_in/c"):
        lora.ranks({"img_in": {"c": a}})
