"""LoRA files read: every dialect against dense updates in float64, and against the model."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from clvr_jax import lora, tree
from clvr_jax.models.flux2.layout import Layout
from clvr_jax.models.flux2.transformer import Transformer
from conversion.lora import read
from tests.conversion.lora_cases import (
    ABSTRACT,
    BFL,
    CFG,
    LINEAR1,
    LINEAR2,
    D,
    bfl_factors,
    check,
    config_metadata,
    factors,
    named,
    peft_dense,
    peft_factors,
    product,
    save,
)


@pytest.mark.parametrize(
    ("prefix", "down", "up"),
    [
        ("diffusion_model.", "lora_A", "lora_B"),
        ("base_model.model.", "lora_A.default", "lora_B.default"),
        ("model.diffusion_model.", "lora_down", "lora_up"),  # diffusers drops the whole file
        ("", "lora_A", "lora_B"),
    ],
)
def test_bfl_names(tmp_path, prefix, down, up):
    pairs = bfl_factors()
    adapters = read(save(tmp_path / "x.safetensors", named(pairs, prefix, down, up)), ABSTRACT)
    check(adapters, {name: product(*pair) for name, pair in pairs.items()})


def test_bfl_names_with_alpha(tmp_path):
    pairs = bfl_factors()
    tensors = named(pairs) | {f"diffusion_model.{LINEAR1}.alpha": np.float32(5)}
    adapters = read(save(tmp_path / "x.safetensors", tensors), ABSTRACT)
    rank = len(pairs[LINEAR1][0])
    scales = {LINEAR1: 5 / rank}
    check(adapters, {k: product(*pair, scales.get(k, 1.0)) for k, pair in pairs.items()})


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_kohya_names(tmp_path, dtype):
    pairs = {k: tuple(x.astype(dtype) for x in pair) for k, pair in bfl_factors().items()}
    flat = {name.replace(".", "_"): pair for name, pair in pairs.items()}
    tensors = named(flat, "lora_unet_", "lora_down", "lora_up")
    alphas = {name: np.array(i + 1).astype(dtype) for i, name in enumerate(flat)}
    tensors |= {f"lora_unet_{name}.alpha": alpha for name, alpha in alphas.items()}
    adapters = read(save_any(tmp_path / "x.safetensors", tensors), ABSTRACT)
    scale = {k: float(alphas[k.replace(".", "_")]) / len(pairs[k][0]) for k in pairs}
    check(adapters, {k: product(*pair, scale[k]) for k, pair in pairs.items()})


def save_any(path, tensors):
    """save_file for types that safetensors' numpy side does not know."""
    from clvr_jax.weights import write_safetensors

    specs = {k: (v.shape, v.dtype) for k, v in tensors.items()}
    write_safetensors(path, specs, iter(tensors.items()))
    return path


def test_peft_names(tmp_path):
    pairs = peft_factors()
    path = save(tmp_path / "x.safetensors", named(pairs, "transformer."))
    check(read(path, ABSTRACT), peft_dense(pairs))
    check(read(tmp_path, ABSTRACT), peft_dense(pairs))  # the folder that holds it


@pytest.mark.parametrize("rslora", [False, True])
def test_alpha_from_the_metadata(tmp_path, rslora):
    pairs = peft_factors()
    ranks = {name: len(a) for name, (a, _) in pairs.items()}
    config = {
        "r": 3,
        "lora_alpha": 6,
        "rank_pattern": {f"^{name}": rank for name, rank in ranks.items() if rank != 3},
        "alpha_pattern": {r"attn\.to_k": 10, "proj_out": 1},
        "use_rslora": rslora,
    }
    metadata = config_metadata(**config)
    path = save(tmp_path / "x.safetensors", named(pairs, "transformer."), metadata)
    alpha = lambda name: 10 if name.endswith("attn.to_k") else 1 if name == "proj_out" else 6
    power = 0.5 if rslora else 1
    expected = peft_dense(pairs, lambda name: alpha(name) / ranks[name] ** power)
    check(read(path, ABSTRACT), expected)
    (tmp_path / "peft").mkdir()
    save(tmp_path / "peft/adapter_model.safetensors", named(pairs, "base_model.model."))
    (tmp_path / "peft/adapter_config.json").write_text(json.dumps(config))
    check(read(tmp_path / "peft", ABSTRACT), expected)


def test_ranks_are_shared_or_joined_exactly(tmp_path):
    (a, b), shape = factors((3 * D, D), 4, 0), (D, D)
    apart = {f"transformer_blocks.0.attn.to_{p}": factors(shape, 4, i) for i, p in enumerate("qkv")}
    rows = dict(zip("qkv", np.split(b, 3)))
    same = {f"transformer_blocks.1.attn.to_{p}": (a, rows[p]) for p in "qkv"}
    path = save(tmp_path / "x.safetensors", named(apart | same, "transformer."))
    found_a, found_b = lora.pairs(read(path, ABSTRACT))["double_blocks/img/qkv"]
    assert found_a.shape == (2, D, 12) and found_b.shape == (2, 12, 3, 4, 16)
    np.testing.assert_array_equal(found_a[1, :, :4], a.T)
    np.testing.assert_array_equal(found_b[1, :4].reshape(4, -1), b.T)
    assert not found_a[1, :, 4:].any() and not found_b[1, 4:].any()
    for part, (one_a, one_b) in enumerate(apart.values()):
        ranks = slice(4 * part, 4 * part + 4)
        np.testing.assert_array_equal(found_a[0, :, ranks], one_a.T)
        np.testing.assert_array_equal(found_b[0, ranks, part].reshape(4, -1), one_b.T)
        assert not np.delete(found_b[0, ranks], part, axis=1).any()

    fused = factors(BFL[LINEAR1], 4, 5), factors(BFL[LINEAR2], 4, 6)
    path = save(tmp_path / "y.safetensors", named(dict(zip((LINEAR1, LINEAR2), fused))))
    pairs = lora.pairs(read(path, ABSTRACT))
    assert set(pairs) == {
        f"single_blocks/{name}" for name in ("qkv", "mlp_in", "attn_out", "mlp_out")
    }
    np.testing.assert_array_equal(pairs["single_blocks/qkv"][0], pairs["single_blocks/mlp_in"][0])
    np.testing.assert_array_equal(
        pairs["single_blocks/attn_out"][1], pairs["single_blocks/mlp_out"][1]
    )


@pytest.mark.slow
def test_adapters_equal_merged_kernels(tmp_path):
    path = save(tmp_path / "x.safetensors", named(bfl_factors()))
    adapters = lora.scaled(read(path, ABSTRACT), 0.05)
    layout = Layout(text=5, noise=(3, 4), references=((2, 3),))
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    inputs = normal(2, layout.image_tokens, CFG.channels), normal(2, 5, CFG.text_width)
    inputs = (*inputs, jnp.array([0.0, 0.7]), layout)
    model = jax.jit(lambda variables: Transformer(CFG).apply(variables, *inputs))
    kernels = {path: leaf.shape for path, leaf in tree.flatten(ABSTRACT).items()}
    params = tree.unflatten({path: normal(*shape) / 8 for path, shape in kernels.items()})
    plain = model({"params": params})
    adapted = model({"params": params, "lora": adapters})
    merged = model({"params": lora.merge(params, adapters)})
    scale = np.abs(plain).max()
    assert np.abs(adapted - plain).max() > 0.1 * scale
    assert np.abs(adapted - merged).max() < 3e-6 * np.abs(merged).max()
