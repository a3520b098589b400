"""LoRA files that cannot be read: the text names the file, the tensor, and what was expected."""

import numpy as np
import pytest

from conversion.lora import read
from tests.conversion.lora_cases import ABSTRACT, D, config_metadata, factors, named, save

A, B = factors((D, 16), 2, 0)
IMG_IN = {"diffusion_model.img_in.lora_A.weight": A, "diffusion_model.img_in.lora_B.weight": B}


def changed(**change):
    """img_in's factors with one tensor changed, or removed where the value is None."""
    tensors = dict(IMG_IN)
    for side, value in change.items():
        key = f"diffusion_model.img_in.lora_{side}.weight"
        tensors.pop(key) if value is None else tensors.update({key: value})
    return tensors


def one(key):
    return {key: np.ones((2, 2), np.float32)}


REFUSED = {
    "lokr": (IMG_IN | one("lycoris_img_in.lokr_w1"), "lycoris_img_in.lokr_w1: found LoKr"),
    "loha": (IMG_IN | one("lora_unet_img_in.hada_w1_a"), "hada_w1_a: found LoHa"),
    "dora": (IMG_IN | one("diffusion_model.img_in.dora_scale"), "found DoRA magnitudes"),
    "bias": (IMG_IN | one("diffusion_model.img_in.lora_B.bias"), "found biases"),
    "stranger": (
        IMG_IN | one("diffusion_model.img_in.weight"),
        r"img_in\.weight: found no LoRA tensor",
    ),
    "text encoder": (
        IMG_IN | one("lora_te1_layers_0_q_proj.lora_down.weight"),
        "lora_te1_layers_0_q_proj.lora_down.weight: found another model",
    ),
    "text encoder, dotted": (
        IMG_IN | one("text_encoder.layers.0.q_proj.lora_A.weight"),
        "found another model",
    ),
    "unknown": (
        IMG_IN | one("diffusion_model.double_blocks.0.img_attn.qvk.lora_A.weight"),
        r"found an adapter of double_blocks\.0\.img_attn\.qvk, .*double_blocks\.0\.img_attn\.qkv",
    ),
    "no such layer": (
        IMG_IN | one("diffusion_model.single_blocks.3.linear1.lora_A.weight"),
        r"found an adapter of single_blocks\.3\.linear1",
    ),
    "a norm": (
        IMG_IN | one("transformer.transformer_blocks.0.attn.norm_q.lora_A.weight"),
        r"found an adapter of transformer_blocks\.0\.attn\.norm_q",
    ),
    "orphan A": (changed(B=None), r"lora_A.weight: found it alone, expected lora_B"),
    "orphan B": (changed(A=None), r"lora_B.weight: found it alone, expected lora_A"),
    "wrong input": (
        changed(A=np.ones((2, 17), np.float32)),
        r"lora_A.weight: found shape \(2, 17\), expected \(2, 16\).*img_in.*\(64, 16\)",
    ),
    "wrong output": (changed(B=np.ones((63, 2), np.float32)), r"\(63, 2\), expected \(64, 2\)"),
    "wrong rank": (changed(B=np.ones((64, 3), np.float32)), r"\(64, 3\), expected \(64, 2\)"),
    "convolution": (changed(A=A[..., None, None]), r"\(2, 16, 1, 1\), expected \(2, 16\)"),
    "rank 0": (changed(A=A[:0], B=B[:, :0]), r"shape \(0, 16\)"),
    "not finite": (
        changed(B=np.where(B > 1, np.nan, B)),
        r"lora_B.weight: found \d+ of 128 values not finite",
    ),
    "integers": (changed(A=A.astype(np.int32)), "lora_A.weight: found int32, expected floating"),
    "alpha": (
        IMG_IN | {"diffusion_model.img_in.alpha": np.float32(np.inf)},
        "img_in.alpha: found 1 of 1 values not finite",
    ),
    "alpha vector": (
        IMG_IN | {"diffusion_model.img_in.alpha": np.ones(2, np.float32)},
        r"img_in.alpha: found shape \(2,\), expected one number",
    ),
    "alpha alone": (
        IMG_IN | {"diffusion_model.txt_in.alpha": np.float32(1)},
        "txt_in.alpha: found it alone",
    ),
    "twice": (
        IMG_IN | named({"img_in": (A, B)}, "lora_unet_", "lora_down", "lora_up"),
        "the same factor of img_in, expected each factor once",
    ),
    "twice, two layouts": (
        IMG_IN | named({"x_embedder": (A, B)}, "transformer."),
        "img_in: found two adapters",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_files(tmp_path, case):
    tensors, message = REFUSED[case]
    path = save(tmp_path / "x.safetensors", tensors)
    with pytest.raises(ValueError, match=message) as error:
        read(path, ABSTRACT)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (config_metadata(r=2, lora_alpha=2, use_dora=True), "use_dora=True"),
        (config_metadata(r=8, lora_alpha=8), "found rank 2, expected 8"),
        ({"lora_adapter_metadata": "{"}, "LoRA config: found no JSON"),
        ({"lora_adapter_metadata": "[1]"}, "LoRA config: found JSON list"),
        (config_metadata(r=2, lora_alpha=float("nan")), "img_in: found alpha nan"),
    ],
)
def test_refused_metadata(tmp_path, metadata, message):
    with pytest.raises(ValueError, match=message):
        read(save(tmp_path / "x.safetensors", IMG_IN, metadata), ABSTRACT)


def test_contradicting_alphas_are_refused(tmp_path):
    tensors = IMG_IN | {"diffusion_model.img_in.alpha": np.float32(1)}
    path = save(tmp_path / "x.safetensors", tensors, config_metadata(r=2, lora_alpha=4))
    with pytest.raises(ValueError, match=r"an alpha tensor of 1\.0, expected its config's 4"):
        read(path, ABSTRACT)


def test_refused_folders_and_empty_files(tmp_path):
    with pytest.raises(ValueError, match=r"found safetensors files: none, expected one"):
        read(tmp_path, ABSTRACT)
    save(tmp_path / "x.safetensors", {})
    with pytest.raises(ValueError, match="found no tensors"):
        read(tmp_path, ABSTRACT)
    save(tmp_path / "y.safetensors", {})
    with pytest.raises(
        ValueError, match=r"found safetensors files: x\.safetensors, y\.safetensors"
    ):
        read(tmp_path, ABSTRACT)
