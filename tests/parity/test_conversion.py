"""Our files against the reference libraries: keys, shapes, and folders that they load."""

import json

import pytest
import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.loaders.single_file_utils import (
    convert_flux2_transformer_checkpoint_to_diffusers as reference_conversion,
)
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from clvr_jax.models.flux2.config import TRANSFORMER_VARIANTS, VAE_VARIANTS, VaeConfig
from clvr_jax.models.qwen3.config import VARIANTS
from conversion.cli import main
from conversion.rules import file_specs
from tests.conversion import toy


def shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def specs(name, config):
    part = toy.component(name, config)
    return file_specs(part.table("diffusers"), part.abstract())


@pytest.mark.parametrize("variant", ["klein_4b", "klein_9b", "tiny"])
def test_transformer_keys_are_the_references(variant):
    config = TRANSFORMER_VARIANTS[variant]
    part = toy.component("transformer", config)
    values = part.kind.to_json(config)
    values.pop("_class_name")
    with torch.device("meta"):
        assert specs("transformer", config) == shapes(Flux2Transformer2DModel(**values))


@pytest.mark.parametrize("config", [*VAE_VARIANTS.values(), toy.VAE], ids=str)
def test_vae_keys_are_the_references(config: VaeConfig):
    values = toy.component("vae", config).kind.to_json(config)
    values.pop("_class_name")
    with torch.device("meta"):
        assert specs("vae", config) == shapes(AutoencoderKLFlux2(**values))


@pytest.mark.parametrize("variant", ["qwen3_4b", "qwen3_8b", "tiny"])
def test_text_encoder_keys_are_the_references(variant):
    config = VARIANTS[variant]
    part = toy.component("text_encoder", config)
    with torch.device("meta"):
        theirs = shapes(Qwen3ForCausalLM(Qwen3Config(**part.kind.to_json(config))))
    if config.tied:
        theirs.pop("lm_head.weight")  # one storage with the embedding: not in the files
    assert specs("text_encoder", config) == theirs


def test_bfl_files_are_what_the_reference_converter_reads(tmp_path):
    """diffusers' own BFL converter gives back the tensors that we wrote the file from."""
    toy.pipeline(tmp_path / "in")
    arguments = [str(tmp_path / "in"), str(tmp_path / "x.safetensors"), "--to=bfl"]
    assert main([*arguments, "--components=transformer"]) == 0
    theirs = reference_conversion(load_file(tmp_path / "x.safetensors"))
    ours = load_file(tmp_path / "in" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert theirs.keys() == ours.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def reference_pipeline(folder, tokenizer_words=64):
    """A toy pipeline saved by diffusers itself."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    torch.manual_seed(0)
    parts = {name: toy.component(name).kind.to_json(config) for name, config in toy.CONFIGS.items()}
    for values in parts.values():
        values.pop("_class_name", None)
    vocabulary = {f"w{i}": i for i in range(tokenizer_words)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="w0")), pad_token="w0"
    )
    pipe = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=AutoencoderKLFlux2(**parts["vae"]),
        text_encoder=Qwen3ForCausalLM(Qwen3Config(**parts["text_encoder"])),
        tokenizer=tokenizer,
        transformer=Flux2Transformer2DModel(**parts["transformer"]),
        is_distilled=True,
    )
    pipe.save_pretrained(folder)
    return pipe


def test_a_folder_saved_by_diffusers_comes_back_to_diffusers(tmp_path):
    pipe = reference_pipeline(tmp_path / "in")
    assert main([str(tmp_path / "in"), str(tmp_path / "ours")]) == 0
    assert main([str(tmp_path / "ours"), str(tmp_path / "back")]) == 0
    again = Flux2KleinPipeline.from_pretrained(tmp_path / "back")
    assert again.config.is_distilled is True
    for name in toy.CONFIGS:
        theirs, ours = getattr(pipe, name), getattr(again, name)
        assert type(theirs) is type(ours)
        state = ours.state_dict()
        for key, value in theirs.state_dict().items():
            assert torch.equal(value, state[key]), key
    ids = torch.arange(6)[None]
    assert torch.equal(pipe.text_encoder(ids).logits, again.text_encoder(ids).logits)


@pytest.mark.parametrize("name", toy.CONFIGS)
def test_configs_that_we_write_are_complete(tmp_path, name):
    """A component whose config.json was lost is written with one that the library loads."""
    part = toy.component(name)
    folder = tmp_path / name
    toy.save(folder / f"{part.kind.stem}.safetensors", toy.tensors(name, "diffusers"))
    (folder / "config.json").write_text(json.dumps(part.kind.to_json(part.config)))
    loaders = {
        "transformer": Flux2Transformer2DModel,
        "vae": AutoencoderKLFlux2,
        "text_encoder": Qwen3ForCausalLM,
    }
    model = loaders[name].from_pretrained(folder)
    for key, value in load_file(folder / f"{part.kind.stem}.safetensors").items():
        assert torch.equal(model.state_dict()[key], value), key
