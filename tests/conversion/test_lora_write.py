"""LoRA files written: round trips bit for bit, types, metadata, and what cannot be written."""

import json
import re

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from clvr_jax import lora
from clvr_jax.models.flux2.config import STACKED
from conversion.lora import read, write
from conversion.lora.factors import cut, join
from tests.conversion.lora_cases import (
    ABSTRACT,
    bfl_factors,
    equal_files,
    equal_trees,
    named,
    ours,
    peft_factors,
    save,
)


@pytest.mark.parametrize("dead", [False, True])
def test_peft_files_come_back_bit_for_bit(tmp_path, dead):
    pairs = peft_factors(ranks=(4,))
    if dead:  # ranks without effect, at the border between the parts of a fused kernel
        pairs["transformer_blocks.1.attn.to_q"][1][:, 3] = 0
        pairs["transformer_blocks.1.attn.to_v"][1][:, 0] = 0
    path = save(tmp_path / "x.safetensors", named(pairs, "transformer."))
    adapters = read(path, ABSTRACT)
    write(tmp_path / "peft.safetensors", adapters, ABSTRACT)
    equal_files(tmp_path / "peft.safetensors", path)
    write(tmp_path / "bfl.safetensors", adapters, ABSTRACT, "bfl")
    equal_trees(read(tmp_path / "bfl.safetensors", ABSTRACT), adapters)


def test_uneven_ranks_and_missing_parts_come_back_bit_for_bit(tmp_path):
    pairs = peft_factors(ranks=(3, 4, 2))
    del pairs["transformer_blocks.1.attn.to_k"]
    path = save(tmp_path / "x.safetensors", named(pairs, "transformer."))
    write(tmp_path / "peft.safetensors", read(path, ABSTRACT), ABSTRACT)
    equal_files(tmp_path / "peft.safetensors", path)


def test_bfl_files_come_back_bit_for_bit(tmp_path):
    path = save(tmp_path / "x.safetensors", named(bfl_factors()))
    adapters = read(path, ABSTRACT)
    write(tmp_path / "bfl.safetensors", adapters, ABSTRACT, "bfl")
    equal_files(tmp_path / "bfl.safetensors", path)
    write(tmp_path / "peft.safetensors", adapters, ABSTRACT)
    equal_trees(read(tmp_path / "peft.safetensors", ABSTRACT), adapters)


@pytest.mark.parametrize("pattern", [".", "single_blocks/(qkv|attn_out)", "mlp_out|txt/qkv"])
@pytest.mark.parametrize("dialect", ["peft", "bfl"])
def test_our_adapters_come_back(tmp_path, dialect, pattern):
    adapters = ours(pattern)
    write(tmp_path / "x.safetensors", adapters, ABSTRACT, dialect)
    equal_trees(read(tmp_path / "x.safetensors", ABSTRACT), adapters)


@pytest.mark.parametrize("dialect", ["peft", "bfl"])
def test_untrained_adapters_come_back_without_effect(tmp_path, dialect):
    adapters = lora.init(jax.random.key(0), ABSTRACT, "double_blocks", 3, STACKED)
    write(tmp_path / "x.safetensors", adapters, ABSTRACT, dialect)
    equal_trees(read(tmp_path / "x.safetensors", ABSTRACT), adapters)
    written = load_file(tmp_path / "x.safetensors")
    assert {tensor.shape[0] for key, tensor in written.items() if "lora_A" in key} == {3}


def test_written_types_and_metadata(tmp_path):
    adapters = ours("single_blocks/qkv", rank=4) | ours("img_in", rank=2)
    write(tmp_path / "x.safetensors", adapters, ABSTRACT, dtype=ml_dtypes.bfloat16)
    with safe_open(tmp_path / "x.safetensors", "numpy") as file:
        config = json.loads(file.metadata()["lora_adapter_metadata"])
        assert file.metadata()["format"] == "pt"
        names = sorted({key.split(".lora_")[0] for key in list(file.keys())})
        assert file.get_slice("transformer.x_embedder.lora_A.weight").get_dtype() == "BF16"
    single = [f"single_transformer_blocks.{i}.attn.to_qkv_mlp_proj" for i in range(3)]
    assert names == [f"transformer.{name}" for name in [*single, "x_embedder"]]
    assert (config["transformer.r"], config["transformer.lora_alpha"]) == (4, 4)
    assert config["transformer.rank_pattern"] == {"^x_embedder": 2}
    assert config["transformer.alpha_pattern"] == {"^x_embedder": 2}
    assert sorted(config["transformer.target_modules"]) == [*single, "x_embedder"]


def test_refused_adapters(tmp_path):
    path, good = tmp_path / "x.safetensors", ours("img_in")
    zero = jax.tree.map(np.zeros_like, good)
    broken = {"img_in": {"a": good["img_in"]["a"], "b": np.full_like(good["img_in"]["b"], np.inf)}}
    for adapters, dialect, message in (
        (good, "kohya", "unknown LoRA dialect 'kohya'; expected one of peft, bfl"),
        ({"elsewhere": good["img_in"]}, "peft", "elsewhere has no kernel"),
        ({"txt_in": good["img_in"]}, "peft", "do not fit the kernel (96, 64)"),
        (zero, "peft", "zero everywhere"),
        (broken, "bfl", "diffusion_model.img_in.lora_B.weight: found 256 of 256"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            write(path, adapters, ABSTRACT, dialect)
    assert not list(tmp_path.iterdir())


def test_cutting_is_the_inverse_of_joining():
    rng = np.random.default_rng(0)
    part = lambda n, r: (rng.standard_normal((5, r)), rng.standard_normal((n, r)))
    shared = rng.standard_normal((5, 2))
    for parts in (
        [part(4, 2), part(3, 2), part(2, 2)],
        [part(4, 1), part(3, 3), part(2, 2)],
        [part(4, 3), part(3, 0), part(2, 2)],
        [part(4, 0), part(3, 0), part(2, 5)],
        [(shared, rng.standard_normal((n, 2))) for n in (4, 3, 2)],
    ):
        whole = join(parts)
        dense_parts = np.concatenate([y @ x.T for x, y in parts])
        np.testing.assert_allclose(whole[1] @ whole[0].T, dense_parts, rtol=1e-5, atol=1e-5)
        for found, expected in zip(cut(*whole, (4, 3, 2)), parts):
            np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
            np.testing.assert_allclose(found[1], expected[1], rtol=1e-6)
