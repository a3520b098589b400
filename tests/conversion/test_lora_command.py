"""`python -m conversion.lora`: every direction, merging into models as they are found, refusals."""

import json
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from clvr_jax import lora, tree
from clvr_jax.models.flux2.config import STACKED, transformer_to_json
from conversion.detect import find
from conversion.flux2 import BFL, DIFFUSERS
from conversion.lora import read, write
from conversion.lora.__main__ import main
from conversion.sinks import write_mapped, write_orbax
from conversion.sources import TreeSource, fingerprint, leaves
from tests.conversion.lora_cases import ABSTRACT, CFG, equal_files, equal_trees, ours


def params(dtype):
    rng = np.random.default_rng(0)
    draw = lambda leaf: rng.standard_normal(leaf.shape, np.float32).astype(dtype)
    return tree.unflatten({path: draw(leaf) for path, leaf in tree.flatten(ABSTRACT).items()})


def model(path, layout, weights):
    """A pipeline folder with a transformer and a scheduler, or a single file."""
    source = TreeSource(weights)
    if layout == "bfl":
        write_mapped(path / "model.safetensors", source, BFL, ABSTRACT)
        (path / "config.json").write_text(json.dumps(transformer_to_json(CFG)))
        return path / "model.safetensors"
    folder = path / "transformer"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(transformer_to_json(CFG)))
    index = {"_class_name": "Flux2KleinPipeline", "transformer": ["diffusers", "x"]}
    (path / "model_index.json").write_text(json.dumps(index))
    (path / "scheduler").mkdir()
    (path / "scheduler/scheduler_config.json").write_text("{}")
    if layout == "diffusers":
        write_mapped(folder, source, DIFFUSERS, ABSTRACT, stem="diffusion_pytorch_model")
        return path
    write_orbax(folder / "params", source, ABSTRACT, STACKED)
    manifest = {"fingerprint": "old", "dtype": "float32", "config": {}, "parameters": 0}
    text = json.dumps({"format": 1, "source": "hub", "components": {"transformer": manifest}})
    (path / "clvr.json").write_text(text)
    return path


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("layout", ["orbax", "diffusers", "bfl"])
def test_merging_keeps_the_layout(tmp_path, layout, dtype):
    weights, adapters = params(dtype), ours("single_blocks|double_blocks/img/qkv|final_layer")
    (tmp_path / "model").mkdir()
    source = model(tmp_path / "model", layout, weights)
    file = tmp_path / "x.safetensors"
    write(file, adapters, ABSTRACT)
    target = tmp_path / ("merged.safetensors" if layout == "bfl" else "merged")
    assert main([str(file), str(target), "--to=merged", f"--weights={source}", "--scale=0.5"]) == 0
    if layout == "bfl":  # sizes that shapes do not tell, e.g. the rotary axes
        (tmp_path / "config.json").write_text(json.dumps(transformer_to_json(CFG)))
    found = find(target)
    component = found.components["transformer"]
    assert (component.layout, component.config) == (layout, CFG)
    expected = TreeSource(lora.merge(weights, lora.scaled(adapters, 0.5)))
    merged = component.open()
    eps = float(ml_dtypes.finfo(dtype).eps)
    for path, layer, _ in leaves(ABSTRACT, STACKED):
        mine, reference = (np.asarray(s.read(path, layer)) for s in (merged, expected))
        assert mine.dtype == dtype
        mine, reference = mine.astype(np.float32), reference.astype(np.float32)
        np.testing.assert_allclose(mine, reference, rtol=eps, atol=4e-6, err_msg=path)
    if layout != "bfl":
        assert (target / "scheduler/scheduler_config.json").exists()
    if layout == "orbax":
        entry = found.manifest["components"]["transformer"]
        assert entry["fingerprint"] == fingerprint(merged, ABSTRACT, STACKED)
        assert found.manifest["source"] == f"hub + {file} x 0.5"
    assert not list(tmp_path.glob("*.partial"))


def test_merging_keeps_how_inputs_are_made(tmp_path):
    (tmp_path / "model").mkdir()
    source = model(tmp_path / "model", "diffusers", params(np.float32))
    (source / "conditioning.json").write_text('{"text": "instruction"}')
    write(tmp_path / "x.safetensors", ours("img_in"), ABSTRACT)
    given = [str(tmp_path / name) for name in ("x.safetensors", "merged")]
    assert main([*given, "--to=merged", f"--weights={source}"]) == 0
    assert find(tmp_path / "merged").manifest == {"conditioning": {"text": "instruction"}}


def test_what_a_file_does_not_need_need_not_be_there(tmp_path):
    (tmp_path / "model").mkdir()
    source = model(tmp_path / "model", "diffusers", params(np.float32))
    index = json.loads((source / "model_index.json").read_text())
    index["text_encoder"] = ["transformers", "x"]
    (source / "model_index.json").write_text(json.dumps(index))
    write(tmp_path / "x.safetensors", ours("img_in"), ABSTRACT)
    given = [str(tmp_path / name) for name in ("x.safetensors", "y.safetensors")]
    assert main([*given, "--to=bfl", f"--weights={source}"]) == 0


def test_files_and_saved_adapters(tmp_path):
    adapters, x = ours("single_blocks"), [tmp_path / f"{i}.safetensors" for i in range(4)]
    write(x[0], adapters, ABSTRACT)
    run = lambda *argv: main([*map(str, argv), "--weights=tiny"])
    assert run(x[0], tmp_path / "saved") == 0
    assert run(tmp_path / "saved", x[1], "--to=peft") == 0
    equal_files(x[1], x[0])
    assert run(x[1], x[2], "--to=bfl", "--scale=2") == 0
    equal_trees(read(x[2], ABSTRACT), lora.scaled(adapters, 2.0))
    assert run(x[1], x[3], "--to=peft", "--dtype=float16") == 0
    assert {tensor.dtype for tensor in load_file(x[3]).values()} == {np.dtype(np.float16)}


def test_refusals_are_one_line_and_leave_nothing(tmp_path, capsys):
    file, target = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    write(file, ours("img_in"), ABSTRACT)
    (tmp_path / "model").mkdir()
    folder = model(tmp_path / "model", "diffusers", params(np.float32))
    before = sorted(tmp_path.rglob("*"))
    for argv, message in (
        ([file, file, "--to=bfl", "--weights=tiny"], f"{file} exists; remove it"),
        ([tmp_path / "none", target, "--weights=tiny"], "none does not exist"),
        ([file, tmp_path / "y", "--to=peft", "--weights=tiny"], "folder, which names its base,"),
        ([file, tmp_path / "y", "--to=merged", "--weights=tiny"], "merging needs a model's folder"),
        ([file, target, "--to=merged", f"--weights={folder}"], "TARGET must be a folder"),
        ([file, target, "--to=peft", "--weights=klein_4b"], "expected (4, 128)"),
        ([file, target, "--to=peft", f"--weights={tmp_path / 'none'}"], "does not exist"),
    ):
        assert main([str(argument) for argument in argv]) == 1
        error = capsys.readouterr().err
        assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_weights_too_large_for_their_type_are_refused(tmp_path, capsys):
    file = tmp_path / "x.safetensors"
    write(file, lora.scaled(ours("single_blocks/mlp_in"), 1e30), ABSTRACT)
    (tmp_path / "model").mkdir()
    folder = model(tmp_path / "model", "diffusers", params(np.float16))
    argv = [str(file), str(tmp_path / "merged"), "--to=merged", f"--weights={folder}"]
    assert main(argv) == 1
    assert "single_blocks/mlp_in/kernel, layer 0: found values beyond" in capsys.readouterr().err
    argv = [str(file), str(tmp_path / "y.safetensors"), "--to=bfl", "--weights=tiny"]
    assert main([*argv, "--dtype=float16"]) == 1
    assert "single_blocks.0.linear1.lora_B.weight: found" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "x.safetensors"]


def test_help_is_fast():
    begun = time.monotonic()
    command = [sys.executable, "-X", "importtime", "-m", "conversion.lora", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "kohya" in done.stdout
    assert time.monotonic() - begun < 5  # of which this machine's load is the most
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {"jax", "numpy", "torch", "orbax"}
