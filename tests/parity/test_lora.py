"""LoRA files exchanged with diffusers and PEFT: the same outputs in both directions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline
from peft import LoraConfig, get_peft_model_state_dict
from scipy.stats import ks_2samp

from clvr_jax import lora, tree
from clvr_jax.models.flux2.config import STACKED
from clvr_jax.models.flux2.layout import Layout
from clvr_jax.models.flux2.transformer import Transformer, abstract_params
from conversion.lora.files import read, write
from tests.parity import reference
from tests.parity.ours import carry
from tests.parity.reference import normal, within

TOLERANCE = 3e-6
LAYOUT = Layout(text=7, noise=(3, 5), references=((2, 3),))


@functools.cache
def model():
    """A toy model's sizes and our parameters."""
    return carry(reference.transformer())


@functools.cache
def inputs():
    """Image tokens, text features and noise levels."""
    tokens = normal(2, LAYOUT.image_tokens, model()[0].channels)
    text = normal(2, LAYOUT.text, model()[0].text_width, seed=1)
    return tokens, text, np.array([0.0, 0.6], np.float32)


def pipeline() -> Flux2KleinPipeline:
    """The reference pipeline around a new copy of the toy transformer, and nothing else."""
    parts = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer"))
    return Flux2KleinPipeline(transformer=reference.transformer(), **parts)


def theirs(pipe) -> np.ndarray:
    return reference.velocity(pipe.transformer, *inputs(), LAYOUT.noise, LAYOUT.references)


@jax.jit
def ours(adapters) -> jax.Array:
    cfg, params = model()
    arrays = map(jnp.asarray, inputs())
    return Transformer(cfg).apply({"params": params, "lora": adapters}, *arrays, LAYOUT)


def compare(adapters, pipe):
    expected, plain = theirs(pipe), theirs(pipeline())
    assert np.abs(expected - plain).max() > 0.1 * np.abs(plain).max(), "the adapters do too little"
    assert within(TOLERANCE, ours(adapters), expected)


def trained(pattern: str, rank: int, seed: int = 0):
    """Our adapters with a b that matters."""
    cfg = model()[0]
    new = lora.init(jax.random.key(seed), abstract_params(cfg), pattern, rank, STACKED)
    fill = lambda path, x: 0.15 * normal(*x.shape, seed=seed) if path.endswith("/b") else x
    return tree.unflatten({path: fill(path, leaf) for path, leaf in tree.flatten(new).items()})


@pytest.mark.parametrize(
    "pattern",
    [
        pytest.param(".", marks=pytest.mark.slow),
        pytest.param("(double|single)_blocks", marks=pytest.mark.slow),
        "single_blocks/qkv|final_layer/adaLN",
        "mlp_",
    ],
)
def test_our_file_loads_in_diffusers(tmp_path, pattern):
    adapters = trained(pattern, rank=4)
    write(tmp_path / "x.safetensors", adapters, abstract_params(model()[0]))
    pipe = pipeline()
    pipe.load_lora_weights(str(tmp_path), weight_name="x.safetensors")
    compare(adapters, pipe)


def test_our_bfl_file_loads_in_diffusers(tmp_path):
    # without the final modulation, whose rows diffusers forgets to swap
    adapters = trained("_blocks|_modulation_|_in|final_layer/linear", rank=4)
    write(tmp_path / "x.safetensors", adapters, abstract_params(model()[0]), "bfl")
    pipe = pipeline()
    pipe.load_lora_weights(str(tmp_path), weight_name="x.safetensors")
    compare(adapters, pipe)


@pytest.mark.slow
def test_ranks_that_differ_load_in_diffusers(tmp_path):
    adapters = trained("single_blocks", rank=2) | trained("double_blocks|img_in", rank=5)
    write(tmp_path / "x.safetensors", adapters, abstract_params(model()[0]))
    pipe = pipeline()
    pipe.load_lora_weights(str(tmp_path), weight_name="x.safetensors")
    compare(adapters, pipe)


@pytest.mark.parametrize(
    "options",
    [
        {"lora_alpha": 4},
        {"lora_alpha": 7},
        {"lora_alpha": 3, "use_rslora": True},
        {
            "lora_alpha": 4,
            "rank_pattern": {"to_q": 2, "^proj_out": 6},
            "alpha_pattern": {"attn.to_q": 8, "single_transformer_blocks.1.attn.to_out": 1},
        },
    ],
    ids=["plain", "alpha", "rslora", "patterns"],
)
def test_files_of_diffusers_read_here(tmp_path, options):
    pipe = pipeline()
    modules = pipe.transformer.named_modules()
    linear = [name for name, module in modules if isinstance(module, torch.nn.Linear)]
    config = LoraConfig(r=4, target_modules=linear, **options)
    torch.manual_seed(0)
    pipe.transformer.add_adapter(config)
    generator = torch.Generator().manual_seed(1)
    for name, weight in pipe.transformer.named_parameters():
        if "lora_B" in name:
            weight.data = 0.15 * torch.randn(weight.shape, generator=generator)
    Flux2KleinPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(pipe.transformer),
        transformer_lora_adapter_metadata=pipe.transformer.peft_config["default"].to_dict(),
    )
    adapters = read(tmp_path, abstract_params(model()[0]))
    compare(adapters, pipe)


def test_new_adapters_are_drawn_as_in_peft():
    pipe = pipeline()
    torch.manual_seed(0)
    pipe.transformer.add_adapter(LoraConfig(r=16, target_modules=["to_add_out"]))
    weights = dict(pipe.transformer.named_parameters())
    a = [w.detach().numpy().ravel() for name, w in weights.items() if "lora_A" in name]
    cfg = model()[0]
    new = lora.init(jax.random.key(0), abstract_params(cfg), "txt/attn_out", 16, STACKED)
    mine = np.asarray(new["double_blocks"]["txt"]["attn_out"]["a"])
    assert mine.size == sum(x.size for x in a) == cfg.double_blocks * cfg.width * 16
    assert ks_2samp(mine.ravel(), np.concatenate(a)).pvalue > 0.01
    assert not any(w.detach().numpy().any() for name, w in weights.items() if "lora_B" in name)
