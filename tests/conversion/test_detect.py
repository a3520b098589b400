"""What is recognised at a path, sizes read from shapes, and other models refused by name."""

import dataclasses
import json

import numpy as np
import pytest

from clvr_jax.models.flux2.config import TRANSFORMER_VARIANTS, VAE_VARIANTS
from conversion import flux2, infer, vae
from conversion.detect import SHIPPED, find
from conversion.rules import file_specs
from tests.conversion import toy

PREFIXES = ["", "model.diffusion_model.", "diffusion_model."]


def bfl_shapes(cfg):
    return file_specs(flux2.BFL, toy.component("transformer", cfg).abstract())


@pytest.mark.parametrize("variant", ["klein_4b", "klein_9b", "tiny"])
def test_sizes_of_a_transformer_are_read_from_shapes(variant):
    cfg = TRANSFORMER_VARIANTS[variant]
    assert infer.transformer(bfl_shapes(cfg), "file") == cfg


@pytest.mark.parametrize(
    "changes",
    [
        dict(heads=3),
        dict(double_blocks=12, single_blocks=11),
        dict(mlp_ratio=2.5, time_width=64),
        dict(head_width=32, rope_axes=(8, 8, 8, 8)),
    ],
)
def test_other_sizes_of_a_transformer_are_read_from_shapes(changes):
    cfg = dataclasses.replace(toy.TRANSFORMER, **changes)
    assert infer.transformer(bfl_shapes(cfg), "file") == cfg


@pytest.mark.parametrize("variant", ["klein", "small_decoder"])
def test_sizes_of_a_vae_are_read_from_shapes(variant):
    cfg = VAE_VARIANTS[variant]
    shapes = file_specs(vae.table(cfg, "bfl"), toy.component("vae", cfg).abstract())
    assert infer.vae(shapes, "file") == cfg


def test_groups_cannot_be_read_from_shapes(tmp_path):
    file = toy.save(tmp_path / "ae.safetensors", toy.tensors("vae", "bfl"))
    with pytest.raises(ValueError, match=r"not multiples of 32 groups.*--base=FOLDER"):
        find(file)
    toy.pipeline(tmp_path / "base")
    found = find(file, base=find(tmp_path / "base"))
    assert found.components["vae"].config == toy.VAE


@pytest.mark.parametrize(
    "extra, message",
    [
        ({"double_blocks.0.img_mod.lin.weight": (1, 1)}, "is FLUX.1"),
        ({"vector_in.in_layer.weight": (1, 1)}, "is FLUX.1"),
        ({"img_in.bias": (1,)}, r"found img_in\.bias; FLUX\.2 klein has no biases"),
        ({"img_in.weight": (6144, 128)}, "is FLUX.2 dev"),
        ({"img_in.weight": (40, 16)}, "width 40 and head width 16 do not fit"),
        ({"double_blocks.0.img_attn.norm.query_norm.scale": (4,)}, "head width 4 do not fit"),
    ],
)
def test_relatives_are_refused_by_name(extra, message):
    with pytest.raises(ValueError, match=message):
        infer.transformer(bfl_shapes(toy.TRANSFORMER) | extra, "file")


def test_a_tensor_that_sizes_need_is_named():
    shapes = bfl_shapes(toy.TRANSFORMER)
    del shapes["txt_in.weight"]
    with pytest.raises(ValueError, match=r"file has no tensor txt_in\.weight"):
        infer.transformer(shapes, "file")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_single_files_with_and_without_prefix(tmp_path, prefix):
    file = toy.save(tmp_path / "x.safetensors", toy.tensors("transformer", "bfl"), prefix)
    found = find(file)
    assert found.kind == "single file, bfl layout"
    part = found.components["transformer"]
    assert (part.layout, part.config) == ("bfl", toy.TRANSFORMER)


def test_a_diffusers_folder(tmp_path):
    toy.pipeline(tmp_path / "p", shards=2)
    found = find(tmp_path / "p")
    assert found.kind == "diffusers folder"
    assert {name: part.config for name, part in found.components.items()} == toy.CONFIGS
    assert {part.layout for part in found.components.values()} == {"diffusers"}
    assert found.shared.keys() == {"tokenizer", "scheduler", "model_index.json"}
    assert find(tmp_path / "p", ["vae"]).components.keys() == {"vae"}


def test_a_missing_part_is_an_error_unless_it_is_not_wanted(tmp_path):
    toy.pipeline(tmp_path / "p")
    (tmp_path / "p" / "vae" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"names vae, but .*--components=transformer,text_"):
        find(tmp_path / "p")
    assert find(tmp_path / "p", ["transformer"]).components.keys() == {"transformer"}


def test_a_base_may_lack_what_is_not_taken_from_it(tmp_path):
    toy.pipeline(tmp_path / "p")
    (tmp_path / "p" / "text_encoder" / "config.json").unlink()
    found = find(tmp_path / "p", ["vae"], complete=False)
    assert found.components.keys() == {"transformer", "vae"}
    assert found.only(["vae"]).keys() == {"vae"}


@pytest.mark.parametrize("name", toy.CONFIGS)
def test_a_component_folder(tmp_path, name):
    toy.pipeline(tmp_path / "p")
    found = find(tmp_path / "p" / name)
    assert found.kind == "component folder"
    assert found.components[name].config == toy.CONFIGS[name]


def test_a_file_of_a_component_folder_uses_its_config(tmp_path):
    toy.pipeline(tmp_path / "p")
    file = tmp_path / "p" / "transformer" / "diffusion_pytorch_model.safetensors"
    part = find(file).components["transformer"]
    assert (part.layout, part.path, part.config) == ("diffusers", file, toy.TRANSFORMER)
    moved = tmp_path / "alone.safetensors"
    moved.write_bytes(file.read_bytes())
    with pytest.raises(FileNotFoundError, match="give the folder that it came in"):
        find(moved)


def test_a_folder_of_single_files(tmp_path):
    toy.pipeline(tmp_path / "base")
    toy.save(tmp_path / "f" / "flux-2-klein-4b.safetensors", toy.tensors("transformer", "bfl"))
    toy.save(tmp_path / "f" / "ae.safetensors", toy.tensors("vae", "bfl"))
    found = find(tmp_path / "f", base=find(tmp_path / "base"))
    assert found.components.keys() == {"transformer", "vae"} and found.manifest == {}
    write(tmp_path / "f" / "conditioning.json", {"text": "instruction"})
    found = find(tmp_path / "f", base=find(tmp_path / "base"))
    assert found.manifest == {"conditioning": {"text": "instruction"}}
    toy.save(tmp_path / "f" / "flux-2-klein-9b.safetensors", toy.tensors("transformer", "bfl"))
    with pytest.raises(ValueError, match=r"two files of one kind \(transformer\)"):
        find(tmp_path / "f", base=find(tmp_path / "base"))


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist; expected a folder"):
        find(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    (tmp_path / "parts" / "vlm").mkdir(parents=True)
    (tmp_path / "parts" / "vlm" / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"did you mean .*parts/vlm\?"):
        find(tmp_path / "parts")
    with pytest.raises(FileNotFoundError, match=r"empty holds no clvr\.json, model_index\.json"):
        find(tmp_path / "empty")


def write(path, values):
    path.write_text(json.dumps(values))


def test_other_pipelines_and_models_are_refused_by_name(tmp_path):
    toy.pipeline(tmp_path / "p")
    write(tmp_path / "p" / "model_index.json", toy.INDEX | {"_class_name": "FluxPipeline"})
    with pytest.raises(ValueError, match=r"model_index\.json: _class_name is 'FluxPipeline'"):
        find(tmp_path / "p")
    write(tmp_path / "p" / "vae" / "config.json", {"_class_name": "AutoencoderKL"})
    with pytest.raises(ValueError, match="the model is 'AutoencoderKL'; expected"):
        find(tmp_path / "p" / "vae")
    config = tmp_path / "p" / "transformer" / "config.json"
    write(config, json.loads(config.read_text()) | {"guidance_embeds": True})
    with pytest.raises(ValueError, match=r"transformer/config\.json: .*guidance_embeds is True"):
        find(tmp_path / "p" / "transformer")
    config.write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        find(tmp_path / "p" / "transformer")


def test_a_file_of_something_else_is_refused(tmp_path):
    file = toy.save(tmp_path / "x.safetensors", {"unet.conv_in.weight": np.zeros((2, 2))})
    with pytest.raises(ValueError, match=r"no FLUX\.2 transformer.*it holds unet\.conv_in\.weight"):
        find(file)
    with pytest.raises(ValueError, match="it holds no tensors"):
        find(toy.save(tmp_path / "y.safetensors", {}))


def test_a_manifest_of_another_version_is_refused(tmp_path):
    write(tmp_path / "clvr.json", {"format": 2})
    with pytest.raises(ValueError, match="format is 2, this version reads 1"):
        find(tmp_path)


def test_what_ships_is_found_by_its_name():
    found = {name: find(name) for name in SHIPPED}
    for name, part in {"miniature": "transformer", "miniature-vlm": "vlm"}.items():
        tuned = found[f"{name}-sft"].components[part]
        base = found[name].components[part]
        assert tuned.layout == "adapters" and tuned.folder.samefile(base.folder)
    size = sum(file.stat().st_size for file in found["miniature"].path.parent.rglob("*"))
    assert size < 15e6, "the package stays small"
