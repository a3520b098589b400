"""Refusals of the command: file, tensor, found, expected are named, and nothing is left."""

import dataclasses
import json
import shutil

import ml_dtypes
import numpy as np
import pytest

from conversion import convert as conversion
from conversion import output
from conversion.progress import Progress
from tests.conversion import toy
from tests.conversion.command import corrupt, run, tree_of


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A sharded bfloat16 pipeline, its tensors, and the converted folder."""
    folder = tmp_path_factory.mktemp("pipeline")
    tensors = toy.pipeline(folder / "in", ml_dtypes.bfloat16, shards=2)
    assert run(folder / "in", folder / "ours") == 0
    return folder / "in", tensors, folder / "ours"


def truncate(file):
    with open(file, "r+b") as opened:
        opened.truncate(file.stat().st_size - 100)


def damage_header(file):
    content = bytearray(file.read_bytes())
    content[12:20] = b"\0" * 8
    file.write_bytes(content)


IMG_IN = "x_embedder.weight"
FAILURES = {
    "truncated": (truncate, ["diffusion_pytorch_model.safetensors", "truncated"]),
    "empty": (lambda f: f.write_bytes(b""), ["an empty file"]),
    "header": (damage_header, ["diffusion_pytorch_model.safetensors: found a header"]),
    "text": (lambda f: f.write_text("<html>"), ["web page"]),
    "no tensors": (
        lambda f: toy.save(f, {}),
        ["transformer holds no tensors", f"  missing: {IMG_IN}"],
    ),
    "missing": (
        lambda f: corrupt(f, lambda t: t.pop(IMG_IN)),
        [f"  missing: {IMG_IN}, expected shape [32, 16]", "the tensors are not as expected"],
    ),
    "unexpected": (
        lambda f: corrupt(f, lambda t: t.update(spare=np.zeros(3))),
        ["  unexpected: spare [3] in diffusion_pytorch_model.safetensors"],
    ),
    "shape": (
        lambda f: corrupt(f, lambda t: t.update({IMG_IN: np.zeros((32, 15), np.float32)})),
        [f"diffusion_pytorch_model.safetensors: {IMG_IN} has shape [32, 15], expected [32, 16]"],
    ),
    "integers": (
        lambda f: corrupt(f, lambda t: t.update({IMG_IN: np.zeros((32, 16), np.int8)})),
        [f"{IMG_IN} is int8, expected one of float32, bfloat16", "quantised"],
    ),
    "quantised": (
        lambda f: corrupt(
            f,
            lambda t: t.update(
                {
                    IMG_IN: np.zeros((32, 16), ml_dtypes.float8_e4m3fn),
                    "x_embedder.weight_scale": np.ones(1, np.float32),
                }
            ),
        ),
        [f"{IMG_IN} is float8_e4m3fn", "take the bfloat16 file", "weight_scale"],
    ),
    "not finite": (
        lambda f: corrupt(f, lambda t: t[IMG_IN].__setitem__((4, 2), np.nan)),
        [f"safetensors: {IMG_IN}: found nan at [4, 2], 1 such values, expected finite values"],
    ),
    "mislabelled": (
        lambda f: toy.save(f, toy.tensors("vae", "diffusers")),
        ["looks like a vae in diffusers layout, expected a transformer"],
    ),
    "another layout": (
        lambda f: toy.save(f, toy.tensors("transformer", "bfl")),
        ["looks like a transformer in bfl layout, expected a transformer in diffusers layout"],
    ),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failures_say_what_is_wrong_and_leave_nothing(tmp_path, capsys, name):
    spoil, messages = FAILURES[name]
    toy.pipeline(tmp_path / "in")
    spoil(tmp_path / "in" / "transformer" / "diffusion_pytorch_model.safetensors")
    for to in ("orbax", "bfl"):
        assert run(tmp_path / "in", tmp_path / "out", f"--to={to}") == 1
        out = capsys.readouterr()
        for message in messages:
            assert message in out.out + out.err
        assert tree_of(tmp_path)[0] == "in" and not list(tmp_path.glob("out*"))


def test_a_bad_last_component_undoes_the_first(tmp_path, capsys):
    toy.pipeline(tmp_path / "in")
    file = tmp_path / "in" / "text_encoder" / "model.safetensors"
    corrupt(file, lambda t: t["model.norm.weight"].__setitem__(3, np.inf))
    assert run(tmp_path / "in", tmp_path / "out") == 1
    assert "model.norm.weight: found inf at [3]" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_every_component_is_checked_before_anything_is_written(tmp_path, capsys, monkeypatch):
    toy.pipeline(tmp_path / "in")
    corrupt(
        tmp_path / "in" / "transformer" / "diffusion_pytorch_model.safetensors",
        lambda t: t.pop("proj_out.weight"),
    )
    file = tmp_path / "in" / "text_encoder" / "model.safetensors"
    corrupt(file, lambda t: t.pop("model.norm.weight"))
    monkeypatch.setattr(conversion, "_write", None)
    assert run(tmp_path / "in", tmp_path / "out") == 1
    out = capsys.readouterr().out
    assert "  missing: proj_out.weight, expected" in out
    assert "  missing: model.norm.weight, expected" in out


def test_a_damaged_converted_folder(pipeline, tmp_path, capsys):
    ours = pipeline[2]
    config = json.loads((ours / "transformer" / "config.json").read_text())
    copy = tmp_path / "copy"
    shutil.copytree(ours, copy)
    more = json.dumps(config | {"num_single_layers": 4})
    (copy / "transformer" / "config.json").write_text(more)
    assert run(copy, tmp_path / "out") == 1
    assert "  missing: single_blocks/3/qkv/kernel" in capsys.readouterr().out
    (copy / "vae" / "config.json").unlink()
    assert run(copy, tmp_path / "out") == 1
    assert "clvr.json names vae, but" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_unexpected_tensors_may_be_named(tmp_path, capsys):
    toy.pipeline(tmp_path / "in")
    file = tmp_path / "in" / "vae" / "diffusion_pytorch_model.safetensors"
    corrupt(file, lambda t: t.update({"ema.decay": np.zeros(1), "ema.steps": np.zeros(1)}))
    arguments = (tmp_path / "in", tmp_path / "out", "--components=vae")
    assert run(*arguments, r"--allow_unexpected=^ema\.decay") == 1
    assert "  unexpected: ema.steps" in capsys.readouterr().out
    assert run(*arguments, r"--allow_unexpected=^ema\.") == 0
    assert "  ignored as asked: ema.steps" in capsys.readouterr().out


def test_parts_of_different_models_are_refused(tmp_path, capsys):
    other = dataclasses.replace(toy.TEXT_ENCODER, width=32)
    toy.pipeline(tmp_path / "in", text_encoder=other)
    assert run(tmp_path / "in", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "takes text features of width 72" in error and "gives 96" in error
    toy.pipeline(tmp_path / "two", vae=dataclasses.replace(toy.VAE, latent_channels=8))
    assert run(tmp_path / "two", tmp_path / "out") == 1
    assert "takes 16 latent channels" in capsys.readouterr().err


def test_what_exists_is_not_touched(pipeline, tmp_path, capsys):
    source = pipeline[0]
    for name in ("out", "out.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "keep").write_text("mine")
        assert run(source, tmp_path / "out") == 1
        assert f"{tmp_path / name}: " in capsys.readouterr().err
        assert (tmp_path / name / "keep").read_text() == "mine"
        (tmp_path / name / "keep").unlink()
        (tmp_path / name).rmdir()


def test_a_full_disk_is_noticed_before(pipeline, tmp_path, capsys, monkeypatch):
    usage = output.shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(output.shutil, "disk_usage", lambda _: usage)
    assert run(pipeline[0], tmp_path / "out") == 1
    assert "needs 0.02 GB" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_nothing(pipeline, tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "tick", interrupt)
    assert run(pipeline[0], tmp_path / "out") == 1
    assert "interrupted" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["x.safetensors"], "is a file name, orbax writes a folder"),
        (["x.safetensors", "--to=bfl"], "one file for transformer and vae; name a folder"),
        (["o", "--to=bfl", "--components=text_encoder"], "text_encoder has no bfl layout"),
    ],
)
def test_targets_that_make_no_sense(pipeline, tmp_path, capsys, arguments, message):
    assert run(pipeline[0], tmp_path / arguments[0], *arguments[1:]) == 1
    assert message in capsys.readouterr().err


def test_a_component_that_is_not_there(tmp_path, capsys):
    file = toy.save(tmp_path / "x.safetensors", toy.tensors("transformer", "bfl"))
    assert run(file, tmp_path / "out", "--components=transformer,vae") == 1
    assert "vae not found in" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flag",
    ["--components=unet", "--dtype=int8", "--to=gguf", "--max_shard_gb=0", "--allow_unexpected=("],
)
def test_unknown_choices_are_refused_by_argparse(flag, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("a", "b", flag)
    assert stopped.value.code == 2


def test_inspect_fails_on_a_bad_checkpoint(tmp_path, capsys):
    toy.pipeline(tmp_path / "in")
    file = tmp_path / "in" / "vae" / "diffusion_pytorch_model.safetensors"
    corrupt(file, lambda t: t.pop("bn.running_var"))
    assert run("inspect", tmp_path / "in") == 1
    out = capsys.readouterr().out
    assert "  missing: bn.running_var, expected shape [16]" in out and "vae: fingerprint -" in out
