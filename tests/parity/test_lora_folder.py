"""PEFT's own folders exchanged with PEFT itself: klein's transformer and Qwen3-VL."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from clvr_jax import lora, tree
from clvr_jax.models.flux2 import config as flux2
from clvr_jax.models.flux2.layout import Layout
from clvr_jax.models.flux2.transformer import Transformer
from clvr_jax.models.flux2.transformer import abstract_params as transformer_params
from clvr_jax.models.qwen3 import language
from clvr_jax.models.qwen3_vl import config as qwen3_vl
from clvr_jax.models.qwen3_vl import model as qwen3_vl_model
from conversion.flux2 import DIFFUSERS
from conversion.lora.files import read, write_folder
from conversion.qwen3_vl import table
from tests.parity import reference, vlm
from tests.parity.ours import carry, language_inputs, language_program
from tests.parity.reference import normal, within

TOLERANCE = 5e-6
# what fine-tuners adapt of Qwen3-VL: decoder, vision tower, mergers
MODULES = r".*(_proj|attn\.qkv|attn\.proj|linear_fc[12])"


@functools.cache
def pair():
    """The reference's Qwen3-VL, our config and parameters, and conversations."""
    model = vlm.model(**vlm.MODELS["grouped"])
    return model, *carry(model), vlm.batch(vlm.EVERY, 4)


def ours(adapters) -> np.ndarray:
    _, cfg, params, batch = pair()
    merged = lora.merge(params, adapters)
    inputs = language_inputs(cfg, merged, batch) | {"lengths": batch.lengths}
    hidden, *_ = language_program(cfg.text, True)(
        {"params": merged["language"]}, **inputs, capture=()
    )
    return np.asarray(language.logits(merged["language"], cfg.text, hidden))[batch.mask]


def theirs(adapted) -> np.ndarray:
    return vlm.logits(adapted, pair()[-1])


def trained(abstract, pattern, stacked):
    """Adapters with a b that matters."""
    new = lora.init(jax.random.key(0), abstract, pattern, 3, stacked)
    fill = lambda path, x: 0.1 * normal(*x.shape, seed=1) if path.endswith("/b") else x
    return tree.unflatten({path: fill(path, leaf) for path, leaf in tree.flatten(new).items()})


def disturb(adapted):
    """Give PEFT's adapters an effect."""
    for i, (name, weight) in enumerate(adapted.named_parameters()):
        if "lora_B" in name:
            weight.data = torch.from_numpy(0.05 * normal(*weight.shape, seed=i))


def compare(found, expected, plain):
    assert np.abs(expected - plain).max() > 0.1 * np.abs(plain).max(), "the adapters do too little"
    assert within(TOLERANCE, found, expected)


@pytest.mark.parametrize("pattern", ["^language/", "^visual/.*(blocks|merger)"])
def test_peft_loads_our_folder_of_qwen3_vl(tmp_path, pattern):
    model, cfg, _, _ = pair()
    abstract = qwen3_vl_model.abstract_params(cfg)
    adapters = trained(abstract, pattern + ".*kernel$", qwen3_vl.STACKED)
    write_folder(tmp_path, adapters, abstract, table(cfg), "Qwen/Qwen3-VL-8B-Instruct")
    adapted = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    assert adapted.peft_config["default"].base_model_name_or_path == "Qwen/Qwen3-VL-8B-Instruct"
    compare(ours(adapters), theirs(adapted.base_model.model), theirs(model))


@pytest.mark.parametrize("rslora", [False, True])
def test_we_load_what_peft_saves_of_qwen3_vl(tmp_path, rslora):
    model, cfg, _, _ = pair()
    config = LoraConfig(r=4, lora_alpha=6, target_modules=MODULES, use_rslora=rslora)
    adapted = get_peft_model(copy.deepcopy(model), config)
    disturb(adapted)
    adapted.save_pretrained(tmp_path)
    adapters = read(tmp_path, qwen3_vl_model.abstract_params(cfg), [table(cfg)])
    assert len(lora.pairs(adapters)) == 15  # kernels, layers of one kind stacked
    compare(ours(adapters), theirs(adapted.base_model.model), theirs(model))


def compare_klein(adapters, adapted):
    model, layout = reference.transformer(), Layout(text=7, noise=(3, 5))
    cfg, params = carry(model)
    tokens, text = normal(2, layout.image_tokens, cfg.channels), normal(2, 7, cfg.text_width)
    inputs = tokens, text, np.array([0.0, 0.6], np.float32)
    theirs = lambda model: reference.velocity(model, *inputs, layout.noise, ())
    variables = {"params": params, "lora": adapters}
    found = Transformer(cfg).apply(variables, *map(jnp.asarray, inputs), layout)
    compare(found, theirs(adapted.base_model.model), theirs(model))


def test_peft_loads_our_folder_of_klein(tmp_path):
    abstract = transformer_params(carry(reference.transformer())[0])
    adapters = trained(abstract, "(double|single)_blocks", flux2.STACKED)
    write_folder(tmp_path, adapters, abstract, DIFFUSERS, "black-forest-labs/FLUX.2-klein-4B")
    compare_klein(adapters, PeftModel.from_pretrained(reference.transformer(), tmp_path))


@pytest.mark.slow
def test_we_load_what_peft_saves_of_klein(tmp_path):
    config = LoraConfig(r=4, target_modules=["to_q", "to_v", "to_qkv_mlp_proj", "linear_out"])
    adapted = get_peft_model(reference.transformer(), config)
    disturb(adapted)
    adapted.save_pretrained(tmp_path)
    abstract = transformer_params(carry(reference.transformer())[0])
    compare_klein(read(tmp_path, abstract), adapted)
