"""PEFT's folders as weights: the model that they name with adapters added, everywhere."""

import json

import numpy as np
import pytest

from clvr_jax import lora, tree
from clvr_jax.models.qwen3_vl.config import STACKED
from conversion.detect import find
from conversion.load import load
from conversion.lora.__main__ import main
from conversion.lora.files import write_folder
from tests.conversion import toy, vlm_cases
from tests.conversion.command import run
from tests.conversion.lora_cases import equal_files, filled

VLM = toy.component("vlm", vlm_cases.UNTIED)


def of_vlm(pattern=r"layers/.*kernel$|blocks/"):
    return filled(VLM.abstract(), STACKED, pattern, rank=3)


@pytest.fixture
def adapted(tmp_path):
    """A Qwen3-VL folder, and one of adapters beside it."""
    vlm_cases.folder(tmp_path / "base")
    (tmp_path / "adapters").mkdir()
    write_folder(
        tmp_path / "adapters", of_vlm(), VLM.abstract(), VLM.table("diffusers"), "nobody/nothing"
    )
    name(tmp_path / "adapters", str(tmp_path / "base"))
    return tmp_path


def name(folder, base):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base}))


def expected(folder):
    params = load(find(folder).components["vlm"].open(), VLM.abstract(), STACKED)
    return tree.flatten(lora.merge(params, of_vlm()))


def equal(found, wanted):
    assert found.keys() == wanted.keys()
    for path, leaf in wanted.items():
        np.testing.assert_allclose(found[path], leaf, rtol=1e-6, atol=3e-6, err_msg=path)


def test_a_folder_is_the_adapted_model(adapted):
    found = find(adapted / "adapters")
    component = found.components["vlm"]
    assert component.config == vlm_cases.UNTIED and component.folder == adapted / "base"
    assert component.open().path == component.base.open().path, "what errors name"
    params = tree.flatten(load(component.open(), VLM.abstract(), STACKED))
    equal(params, expected(adapted / "base"))
    base = tree.flatten(load(component.base.open(), VLM.abstract(), STACKED))
    changed = {path for path, leaf in params.items() if not np.array_equal(leaf, base[path])}
    assert changed == {f"{path}/kernel" for path in lora.pairs(of_vlm())}


def test_it_converts_as_a_merged_model(adapted):
    assert run(adapted / "adapters", adapted / "merged", "--to=transformers") == 0
    merged = find(adapted / "merged" / "vlm").components["vlm"]
    assert merged.layout == "diffusers"
    params = tree.flatten(load(merged.open(), VLM.abstract(), STACKED))
    equal(params, expected(adapted / "base"))


def test_saved_adapters_become_a_folder_and_come_back(adapted):
    as_text = lambda *given: [str(each) for each in given]
    base = f"--weights={adapted / 'base'}"
    assert main(as_text(adapted / "adapters", adapted / "saved", base)) == 0
    assert main(as_text(adapted / "saved", adapted / "again", "--to=peft", base)) == 0
    beside = as_text(adapted / "saved", adapted / "beside", "--to=peft", base, "--base=../base")
    assert main(beside) == 0
    assert find(adapted / "beside").components["vlm"].folder.samefile(adapted / "base")
    config = json.loads((adapted / "again" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(adapted / "base") and config["r"] == 3
    file = "adapter_model.safetensors"
    equal_files(adapted / "again" / file, adapted / "adapters" / file)


def test_bases_are_beside_it_or_from_here(adapted, monkeypatch):
    as_text = lambda *given: [str(each) for each in given]
    monkeypatch.chdir(adapted)
    given = as_text("adapters", "saved", "--weights=base")
    assert main(given) == 0
    assert main(as_text("saved", "absolute", "--to=peft", "--weights=base")) == 0
    (adapted / "deep").mkdir()
    (adapted / "absolute").rename(adapted / "deep" / "absolute")
    name(adapted / "adapters", "./base")  # as PEFT reads it, from the working directory
    monkeypatch.chdir(adapted / "deep")
    assert find("absolute").components["vlm"].folder.samefile(adapted / "base")
    with pytest.raises(FileNotFoundError, match=r"adapts \./base"):
        find(adapted / "adapters")
    monkeypatch.chdir(adapted)
    assert find("adapters").components["vlm"].folder.samefile("base")
    name(adapted / "adapters", "../adapters")
    with pytest.raises(ValueError, match="is this folder itself"):
        find("adapters")


def test_what_no_file_can_hold_is_not_dropped(tmp_path):
    """PEFT adapts linear layers; the patch embedding is a convolution."""
    adapters = of_vlm("patch_embed")
    with pytest.raises(ValueError, match="no LoRA file has adapters of visual/patch_embed"):
        write_folder(tmp_path, adapters, VLM.abstract(), VLM.table("diffusers"), "x")
    assert not list(tmp_path.iterdir())


def test_of_what_a_folder_cannot_be_weights(adapted, capsys):
    name(adapted / "adapters", "")
    with pytest.raises(ValueError, match="base_model_name_or_path is ''; write the folder"):
        find(adapted / "adapters")
    name(adapted / "adapters", str(adapted / "none"))
    with pytest.raises(FileNotFoundError, match=r"adapts .*none: .*none does not exist"):
        find(adapted / "adapters")
    toy.pipeline(adapted / "klein")
    name(adapted / "adapters", str(adapted / "klein"))
    with pytest.raises(ValueError, match="one of this model's linear layers"):
        find(adapted / "adapters").components["transformer"].open()
    argv = [str(adapted / "adapters"), str(adapted / "x"), f"--weights={adapted / 'base'}"]
    assert main([*argv, "--to=bfl"]) == 1
    assert "written as PEFT's folder: --to=peft" in capsys.readouterr().err
    assert not (adapted / "x").exists()


def test_klein_keeps_how_its_inputs_are_made(tmp_path):
    toy.pipeline(tmp_path / "klein")
    (tmp_path / "klein" / "conditioning.json").write_text('{"text": "instruction"}')
    model = find(tmp_path / "klein").components["transformer"]
    adapters = filled(model.abstract(), model.stacked, "single_blocks", rank=3)
    (tmp_path / "adapters").mkdir()
    table, base = model.table("diffusers"), str(tmp_path / "klein")
    write_folder(tmp_path / "adapters", adapters, model.abstract(), table, base)
    found = find(tmp_path / "adapters")
    assert found.manifest == {"conditioning": {"text": "instruction"}}
    layouts = {name: part.layout for name, part in found.components.items()}
    assert layouts == {"transformer": "adapters", "vae": "diffusers", "text_encoder": "diffusers"}
    (tmp_path / "adapters" / "conditioning.json").write_text('{"text": "trajectory"}')
    assert find(tmp_path / "adapters").manifest == {"conditioning": {"text": "trajectory"}}
