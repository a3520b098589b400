"""Qwen3-VL files against transformers: keys, shapes, and folders that it loads again."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from transformers import AutoImageProcessor, AutoTokenizer, Qwen3VLForConditionalGeneration

from clvr_jax.models.qwen3_vl.config import VARIANTS, from_json, to_json
from conversion.cli import main
from conversion.rules import file_specs
from tests.conversion import toy, vlm_cases

SIZES = {"tied": vlm_cases.TIED, "untied": vlm_cases.UNTIED}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)


def build(cfg) -> Qwen3VLForConditionalGeneration:
    return Qwen3VLForConditionalGeneration(transformers.Qwen3VLConfig(**to_json(cfg)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_keys_and_shapes_are_the_references(variant):
    cfg = VARIANTS[variant]
    with torch.device("meta"):
        theirs = {name: tuple(x.shape) for name, x in build(cfg).state_dict().items()}
    if cfg.text.tied:
        theirs.pop("lm_head.weight")  # one storage with the embedding: not in the files
    part = toy.component("vlm", cfg)
    assert file_specs(part.table("diffusers"), part.abstract()) == theirs


@pytest.mark.parametrize("variant", VARIANTS)
def test_configs_saved_by_transformers_are_read(tmp_path, variant):
    transformers.Qwen3VLConfig(**to_json(VARIANTS[variant])).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in values["text_config"]  # the spelling of transformers 5
    assert from_json(values) == VARIANTS[variant]
    everything = transformers.Qwen3VLConfig(**to_json(VARIANTS[variant])).to_dict()
    assert from_json(everything) == VARIANTS[variant]


def save_reference(place: Path, cfg, **how) -> Qwen3VLForConditionalGeneration:
    """A toy model with tokenizer, template and image processor, saved by transformers itself."""
    torch.manual_seed(0)
    model = build(cfg).eval()
    model.save_pretrained(place, **how)
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    marks = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = transformers.Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[],
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=marks,
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(place)
    images = transformers.Qwen2VLImageProcessorPil(
        patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    images.save_pretrained(place)
    return model


def logits(model, cfg) -> torch.Tensor:
    """Of a prompt with one image of 4 x 6 patches."""
    pads = [cfg.image_token] * 6
    ids = torch.tensor([[5, 6, cfg.vision_start, *pads, cfg.vision_end, 7, 8]])
    inputs = {
        "input_ids": ids,
        "mm_token_type_ids": (ids == cfg.image_token).int(),
        "pixel_values": torch.linspace(-1, 1, 24 * 1536).reshape(24, 1536),
        "image_grid_thw": torch.tensor([[1, 4, 6]]),
    }
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("size", SIZES)
def test_a_folder_saved_by_transformers_comes_back_to_transformers(tmp_path, size):
    cfg = SIZES[size]
    model = save_reference(tmp_path / "in", cfg, max_shard_size="300KB")
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 1
    assert main([str(tmp_path / "in"), str(tmp_path / "ours")]) == 0
    assert main([str(tmp_path / "ours"), str(tmp_path / "out"), "--to=transformers"]) == 0
    back = tmp_path / "out" / "vlm"

    again = Qwen3VLForConditionalGeneration.from_pretrained(back).eval()
    state = again.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert torch.equal(logits(model, cfg), logits(again, cfg))
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == cfg.text.tied

    sources = [AutoTokenizer.from_pretrained(place) for place in (tmp_path / "in", back)]
    talk = [{"role": "user", "content": "draw <|vision_start|><|image_pad|>"}]
    said = [tokenizer.apply_chat_template(talk, tokenize=False) for tokenizer in sources]
    assert said[0] == said[1] == f"<|im_start|>user\n{talk[0]['content']}<|im_end|>\n"
    assert sources[0](said[0]).input_ids == sources[1](said[1]).input_ids
    images = [AutoImageProcessor.from_pretrained(place) for place in (tmp_path / "in", back)]
    assert images[0].to_dict() == images[1].to_dict() and list(images[1].image_mean) == [0.5] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_files_come_back_bit_exactly(tmp_path, dtype):
    model = build(vlm_cases.TIED).to(dtype)
    model.save_pretrained(tmp_path / "in")
    assert main([str(tmp_path / "in"), str(tmp_path / "ours")]) == 0
    assert main([str(tmp_path / "ours"), str(tmp_path / "out")]) == 0
    before = load_file(tmp_path / "in" / "model.safetensors")
    after = load_file(tmp_path / "out" / "vlm" / "model.safetensors")
    assert before.keys() == after.keys() and "lm_head.weight" not in after
    for name, value in before.items():
        assert value.dtype == after[name].dtype == dtype and torch.equal(value, after[name]), name


def test_the_config_that_we_write_is_complete(tmp_path):
    """A folder whose config.json was lost is written with one that the library loads."""
    tensors = vlm_cases.folder(tmp_path / "m")
    for name in vlm_cases.PROCESSOR:
        (tmp_path / "m" / name).unlink()
    model = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path / "m")
    state = model.state_dict()
    assert state.keys() == tensors.keys()
    for name, value in tensors.items():
        assert torch.equal(state[name], torch.from_numpy(value)), name
