"""The command: whole pipelines there and back, single files, types, shards, reports."""

import json
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from conversion.detect import find
from tests.conversion import toy
from tests.conversion.command import ROOT, assert_same_tensors, corrupt, read_folder, run, tree_of


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A sharded bfloat16 pipeline, its tensors, and the converted folder."""
    folder = tmp_path_factory.mktemp("pipeline")
    tensors = toy.pipeline(folder / "in", ml_dtypes.bfloat16, shards=2)
    assert run(folder / "in", folder / "ours") == 0
    return folder / "in", tensors, folder / "ours"


def test_a_pipeline_comes_back_bit_exactly(pipeline, tmp_path, capsys):
    source, tensors, ours = pipeline
    assert run(ours, tmp_path / "back") == 0
    for name in toy.CONFIGS:
        assert_same_tensors(read_folder(tmp_path / "back" / name), tensors[name])
    copied = [
        "model_index.json",
        "tokenizer/tokenizer.json",
        "scheduler/scheduler_config.json",
        "text_encoder/generation_config.json",
        *(f"{name}/config.json" for name in toy.CONFIGS),
    ]
    for file in copied:
        for folder in (ours, tmp_path / "back"):
            assert (folder / file).read_text() == (source / file).read_text(), file
    out = capsys.readouterr()
    assert "transformer   orbax -> diffusers" in out.out
    assert "peak host memory" in out.out
    assert "MB/s" in out.out
    assert out.err.startswith("transformer: ")


def test_the_report_counts(pipeline, tmp_path, capsys):
    source, tensors, _ = pipeline
    assert run(source, tmp_path / "o", "--components=vae,text_encoder") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("component")
    vae = next(line.split() for line in lines if line.startswith("vae"))
    matched, missing, unexpected, wrong, parameters, dtype = vae[4:10]
    assert int(matched) == len(tensors["vae"]) - 1  # the counter is no parameter
    assert (missing, unexpected, wrong, dtype) == ("0", "0", "0", "bfloat16")
    assert int(parameters.replace(",", "")) == toy.parameters(tensors["vae"])
    assert lines[-1] == f"wrote {tmp_path / 'o'}"
    assert tree_of(tmp_path) == sorted(["o", *(f"o/{name}" for name in tree_of(tmp_path / "o"))])
    assert not (tmp_path / "o" / "model_index.json").exists()  # it names the transformer
    assert (tmp_path / "o" / "tokenizer").exists() and not (tmp_path / "o" / "scheduler").exists()


def test_the_manifest(pipeline, capsys):
    source, tensors, ours = pipeline
    manifest = json.loads((ours / "clvr.json").read_text())
    assert manifest["format"] == 1 and manifest["source"] == str(source)
    assert manifest["components"].keys() == toy.CONFIGS.keys()
    part = manifest["components"]["transformer"]
    assert part["parameters"] == toy.parameters(tensors["transformer"])
    assert part["dtype"] == "bfloat16"
    assert part["config"]["num_single_layers"] == toy.TRANSFORMER.single_blocks
    for folder in (source, ours):
        assert run("inspect", folder) == 0
        out = capsys.readouterr().out
        for name, entry in manifest["components"].items():
            assert f"{name}: fingerprint {entry['fingerprint']}" in out


def test_bfl_files_and_back(pipeline, tmp_path):
    source, tensors, ours = pipeline
    assert run(ours, tmp_path / "bfl", "--to=bfl") == 0
    assert tree_of(tmp_path / "bfl") == ["ae.safetensors", "flux-2-klein.safetensors"]
    assert run(tmp_path / "bfl", tmp_path / "again", f"--base={source}") == 0
    assert run(tmp_path / "again", tmp_path / "back") == 0
    for name in toy.CONFIGS:
        assert_same_tensors(read_folder(tmp_path / "back" / name), tensors[name])
    single = tmp_path / "one.safetensors"
    assert run(source, single, "--to=bfl", "--components=transformer") == 0
    assert_same_tensors(load_file(single), load_file(tmp_path / "bfl" / "flux-2-klein.safetensors"))
    assert not (tmp_path / "one.safetensors.partial").exists()


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model."])
def test_comfyui_files(tmp_path, prefix):
    tensors = toy.tensors("transformer", "bfl")
    file = toy.save(tmp_path / "x.safetensors", tensors, prefix)
    assert run(file, tmp_path / "ours") == 0
    assert find(tmp_path / "ours").components.keys() == {"transformer"}
    assert run(tmp_path / "ours", tmp_path / "y.safetensors", "--to=bfl") == 0
    assert_same_tensors(load_file(tmp_path / "y.safetensors"), tensors)


def test_the_file_takes_the_place_of_the_bases_transformer(pipeline, tmp_path):
    source, tensors, _ = pipeline
    mine = toy.tensors("transformer", "bfl", ml_dtypes.bfloat16, seed=9)
    file = toy.save(tmp_path / "mine.safetensors", mine)
    assert run(file, tmp_path / "out", f"--base={source}", "--to=diffusers") == 0
    assert run(tmp_path / "out", tmp_path / "bfl", "--to=bfl") == 0
    assert_same_tensors(load_file(tmp_path / "bfl" / "flux-2-klein.safetensors"), mine)
    assert_same_tensors(read_folder(tmp_path / "out" / "vae"), tensors["vae"])
    assert (tmp_path / "out" / "tokenizer" / "tokenizer.json").exists()


def test_types_and_shards(pipeline, tmp_path):
    source, tensors, _ = pipeline
    size = sum(value.size for value in tensors["transformer"].values()) * 4 / 1e9
    flags = ("--to=diffusers", "--dtype=float32", f"--max_shard_gb={size / 2.5:.9f}")
    assert run(source, tmp_path / "f", *flags, "--components=transformer") == 0
    folder = tmp_path / "f" / "transformer"
    assert len(list(folder.glob("*.safetensors"))) == 3
    assert (folder / "diffusion_pytorch_model.safetensors.index.json").exists()
    wide = {name: value.astype(np.float32) for name, value in tensors["transformer"].items()}
    assert_same_tensors(read_folder(folder), wide)


def test_the_type_in_the_config_follows(pipeline, tmp_path):
    source = pipeline[0]
    config = json.loads((source / "text_encoder" / "config.json").read_text())
    toy.pipeline(tmp_path / "in")
    text = json.dumps(config | {"torch_dtype": "bfloat16"})
    (tmp_path / "in" / "text_encoder" / "config.json").write_text(text)
    flags = ("--dtype=float16", "--to=diffusers", "--components=text_encoder")
    assert run(tmp_path / "in", tmp_path / "out", *flags) == 0
    written = json.loads((tmp_path / "out" / "text_encoder" / "config.json").read_text())
    assert written == config | {"torch_dtype": "float16"}


def test_the_counter_is_optional_and_written_as_zero(tmp_path):
    toy.pipeline(tmp_path / "in")
    file = tmp_path / "in" / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["bn.num_batches_tracked"] = np.asarray(7)
    for values in (tensors, {k: v for k, v in tensors.items() if "num_batches" not in k}):
        toy.save(file, values)
        out = tmp_path / f"out{len(values)}"
        assert run(tmp_path / "in", out, "--to=diffusers", "--components=vae") == 0
        counter = read_folder(out / "vae")["bn.num_batches_tracked"]
        assert counter.dtype == np.int64 and counter.shape == () and counter == 0


def test_a_tied_head_may_be_present_if_it_is_the_embedding(tmp_path, capsys):
    toy.pipeline(tmp_path / "in")
    file = tmp_path / "in" / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    embedding = tensors["model.embed_tokens.weight"]
    toy.save(file, tensors | {"lm_head.weight": embedding})
    assert run(tmp_path / "in", tmp_path / "out", "--components=text_encoder") == 0
    toy.save(file, tensors | {"lm_head.weight": embedding + 1})
    assert run(tmp_path / "in", tmp_path / "other", "--components=text_encoder") == 1
    assert "lm_head.weight differs from model.embed_tokens.weight" in capsys.readouterr().out
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("layout", ["bfl", "diffusers"])
def test_a_zero_guidance_input_is_dropped_and_another_refused(tmp_path, capsys, layout):
    names = {
        "bfl": "guidance_in.in_layer.weight",
        "diffusers": "time_guidance_embed.guidance_embedder.linear_1.weight",
    }
    tensors = toy.tensors("transformer", layout)
    extra = np.zeros((toy.TRANSFORMER.width, 32), np.float32)
    toy.pipeline(tmp_path / "in")
    if layout == "bfl":
        file = source = tmp_path / "x.safetensors"
    else:
        source = tmp_path / "in" / "transformer"
        file = source / "diffusion_pytorch_model.safetensors"
    toy.save(file, tensors | {names[layout]: extra})
    assert run(source, tmp_path / "out") == 0
    extra[1, 1] = 1
    toy.save(file, tensors | {names[layout]: extra})
    assert run(source, tmp_path / "other") == 1
    message = f"{file}: {names[layout]} is not zero, expected zeros; klein has no guidance input"
    assert message in capsys.readouterr().out
    assert not (tmp_path / "other").exists()


def python(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "conversion", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


def test_as_a_command(tmp_path):
    file = toy.save(tmp_path / "x.safetensors", toy.tensors("transformer", "bfl"))
    done = python(file, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "bfl -> orbax" in done.stdout and "transformer: " in done.stderr
    corrupt(file, lambda t: t["img_in.weight"].__setitem__((0, 0), np.nan))
    done = python(file, tmp_path / "bad")
    assert done.returncode == 1
    assert "x.safetensors: img_in.weight: found nan at [0, 0]" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "x.safetensors"]


def test_help_needs_no_model_code():
    code = (
        "import sys, conversion.__main__, conversion.cli as c\n"
        "try: c.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'jax', 'numpy', 'transformers', 'orbax', 'huggingface_hub', 'torch'}\n"
        "print('loaded', heavy & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert "loaded set()" in done.stdout and "SOURCE" in done.stdout
