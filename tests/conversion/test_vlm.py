"""Qwen3-VL and Qwen3 folders through the command, both ways, and what is recognised and refused."""

import json

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from clvr_jax.models.qwen3 import config as qwen3
from clvr_jax.models.qwen3_vl.config import to_json
from conversion.detect import find
from tests.conversion import toy, vlm_cases
from tests.conversion.command import assert_same_tensors, corrupt, read_folder, run, tree_of

SIZES = {"tied": vlm_cases.TIED, "untied": vlm_cases.UNTIED}


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("size", SIZES)
def test_a_sharded_folder_comes_back_whole_and_bit_exactly(tmp_path, capsys, size, dtype):
    tensors = vlm_cases.folder(tmp_path / "in", SIZES[size], dtype, shards=3)
    assert run(tmp_path / "in", tmp_path / "ours") == 0
    assert "vlm        transformers -> orbax" in capsys.readouterr().out
    ours = {path for path in tree_of(tmp_path / "ours") if not path.startswith("vlm/params/")}
    small = {"config.json", *vlm_cases.PROCESSOR}
    assert ours == {"clvr.json", "vlm", "vlm/params", *(f"vlm/{name}" for name in small)}
    assert run(tmp_path / "ours", tmp_path / "back") == 0
    assert "orbax -> transformers" in capsys.readouterr().out
    back = tmp_path / "back" / "vlm"
    assert_same_tensors(read_folder(back), tensors)
    assert {file.name for file in back.iterdir()} == {*small, "model.safetensors"}
    for name in small:
        assert (back / name).read_text() == (tmp_path / "in" / name).read_text(), name


def test_the_manifest_and_inspect(tmp_path, capsys):
    tensors = vlm_cases.folder(tmp_path / "in")
    assert run(tmp_path / "in", tmp_path / "ours") == 0
    entry = json.loads((tmp_path / "ours" / "clvr.json").read_text())["components"]["vlm"]
    assert entry["parameters"] == toy.parameters(tensors)
    assert entry["config"] == to_json(vlm_cases.UNTIED)
    for folder in ("in", "ours"):
        assert run("inspect", tmp_path / folder) == 0
        out = capsys.readouterr().out
        assert f"vlm: fingerprint {entry['fingerprint']}" in out and "vlm: tiny" in out


@pytest.mark.parametrize("to", ["transformers", "diffusers"])
def test_one_layout_of_folders_under_two_names(tmp_path, to):
    tensors = vlm_cases.folder(tmp_path / "in", dtype=ml_dtypes.bfloat16)
    size = sum(value.size for value in tensors.values()) * 4 / 1e9
    flags = (f"--to={to}", "--dtype=float32", f"--max_shard_gb={size / 2.5:.9f}")
    assert run(tmp_path / "in", tmp_path / "out", *flags) == 0
    wide = {name: value.astype(np.float32) for name, value in tensors.items()}
    assert_same_tensors(read_folder(tmp_path / "out" / "vlm"), wide)
    index = json.loads((tmp_path / "out" / "vlm" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert len(set(index["weight_map"].values())) == 3


def test_transformers_writes_only_what_transformers_loads(tmp_path, capsys):
    tensors = toy.pipeline(tmp_path / "in")
    assert run(tmp_path / "in", tmp_path / "out", "--to=transformers") == 0
    assert "text_encoder  transformers -> transformers" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"text_encoder", "tokenizer"}
    assert_same_tensors(read_folder(tmp_path / "out" / "text_encoder"), tensors["text_encoder"])
    flags = ("--to=transformers", "--components=transformer")
    assert run(tmp_path / "in", tmp_path / "other", *flags) == 1
    assert "transformer has no transformers layout" in capsys.readouterr().err
    vlm_cases.folder(tmp_path / "vlm")
    assert run(tmp_path / "vlm", tmp_path / "other", "--to=bfl") == 1
    assert "transformer and vae not found" in capsys.readouterr().err


def test_a_fine_tune_under_another_name_is_the_same_model(tmp_path):
    """UnifiedReward 2.0 and the like: names of class, path and folder say nothing."""
    names = {
        "architectures": ["UnifiedRewardModel"],
        "_name_or_path": "someone/UnifiedReward-2.0-qwen3vl-8b",
        "use_cache": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.57.1",
        "eos_token_id": 151645,
        "hidden_size": 32,
    }
    tensors = vlm_cases.folder(tmp_path / "UnifiedReward", **names)
    assert find(tmp_path / "UnifiedReward").components["vlm"].config == vlm_cases.UNTIED
    assert run(tmp_path / "UnifiedReward", tmp_path / "ours", "--components=vlm") == 0
    assert run(tmp_path / "ours", tmp_path / "back") == 0
    assert_same_tensors(read_folder(tmp_path / "back" / "vlm"), tensors)
    written = json.loads((tmp_path / "back" / "vlm" / "config.json").read_text())
    assert written == to_json(vlm_cases.UNTIED) | names


def test_older_names_are_read_and_the_released_ones_written(tmp_path):
    tensors = vlm_cases.folder(tmp_path / "in")
    toy.save(tmp_path / "in" / "model.safetensors", vlm_cases.renamed(tensors))
    assert run(tmp_path / "in", tmp_path / "ours") == 0
    assert run(tmp_path / "ours", tmp_path / "back") == 0
    assert_same_tensors(read_folder(tmp_path / "back" / "vlm"), tensors)


def test_a_tied_head_may_be_present_if_it_is_the_embedding(tmp_path, capsys):
    tensors = vlm_cases.folder(tmp_path / "in", vlm_cases.TIED)
    file = tmp_path / "in" / "model.safetensors"
    embedding = tensors["model.language_model.embed_tokens.weight"]
    toy.save(file, tensors | {"lm_head.weight": embedding})
    assert run(tmp_path / "in", tmp_path / "out") == 0
    assert run(tmp_path / "out", tmp_path / "back") == 0
    assert_same_tensors(read_folder(tmp_path / "back" / "vlm"), tensors)
    toy.save(file, tensors | {"lm_head.weight": embedding + 1})
    assert run(tmp_path / "in", tmp_path / "other") == 1
    message = "lm_head.weight differs from model.language_model.embed_tokens.weight"
    assert message in capsys.readouterr().out


NORM = "model.visual.deepstack_merger_list.1.norm.weight"
FAILURES = {
    "missing": (lambda t: t.pop(NORM), f"  missing: {NORM}, expected shape [96]"),
    "unexpected": (lambda t: t.update(spare=np.zeros(3)), "  unexpected: spare [3]"),
    "shape": (  # the norm of a merger that norms before it joins
        lambda t: t.update({NORM: np.zeros(24, np.float32)}),
        f"model.safetensors: {NORM} has shape [24], expected [96]",
    ),
    "quantised": (
        lambda t: t.update({NORM: t[NORM].astype(ml_dtypes.float8_e4m3fn)}),
        f"{NORM} is float8_e4m3fn, expected one of float32, bfloat16",
    ),
    "not finite": (
        lambda t: t[NORM].__setitem__(4, np.nan),
        f"{NORM}: found nan at [4], 1 such values",
    ),
    "a decoder alone": (
        lambda t: [t.pop(name) for name in list(t) if "visual" in name],
        "  missing: model.visual.patch_embed.proj.weight, expected shape [24, 3, 2, 16, 16]",
    ),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failures_say_what_is_wrong_and_leave_nothing(tmp_path, capsys, name):
    spoil, message = FAILURES[name]
    vlm_cases.folder(tmp_path / "in")
    corrupt(tmp_path / "in" / "model.safetensors", spoil)
    assert run(tmp_path / "in", tmp_path / "out") == 1
    out = capsys.readouterr()
    assert message in out.out + out.err
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_another_models_tensors_are_named(tmp_path, capsys):
    vlm_cases.folder(tmp_path / "in")
    toy.save(tmp_path / "in" / "model.safetensors", toy.tensors("transformer", "diffusers"))
    assert run(tmp_path / "in", tmp_path / "out") == 1
    expected = "looks like a transformer in diffusers layout, expected a vlm in transformers layout"
    assert expected in capsys.readouterr().out


def test_experts_and_files_without_sizes_are_refused(tmp_path, capsys):
    vlm_cases.folder(tmp_path / "moe", model_type="qwen3_vl_moe")
    assert run(tmp_path / "moe", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "moe/config.json" in error and "'qwen3_vl_moe', a mixture of experts" in error
    file = toy.save(tmp_path / "alone.safetensors", vlm_cases.tensors(vlm_cases.UNTIED))
    with pytest.raises(FileNotFoundError, match="is a vlm in the layout of a folder, but"):
        find(file)


def test_a_file_of_a_folder_takes_what_lies_beside_it(tmp_path):
    vlm_cases.folder(tmp_path / "in")
    assert run(tmp_path / "in" / "model.safetensors", tmp_path / "ours") == 0
    assert set(vlm_cases.PROCESSOR) <= {file.name for file in (tmp_path / "ours/vlm").iterdir()}


def test_the_type_in_every_part_of_the_config_follows(tmp_path):
    values = to_json(vlm_cases.UNTIED)
    text = values["text_config"] | {"dtype": "bfloat16"}
    vlm_cases.folder(tmp_path / "in", text_config=text, torch_dtype="bfloat16")
    flags = ("--to=transformers", "--dtype=float16")
    assert run(tmp_path / "in", tmp_path / "out", *flags) == 0
    written = json.loads((tmp_path / "out" / "vlm" / "config.json").read_text())
    assert written["text_config"] == text | {"dtype": "float16"}
    assert written["torch_dtype"] == "float16" and "dtype" not in written["vision_config"]


@pytest.mark.parametrize("cfg", [toy.TEXT_ENCODER, toy.UNTIED], ids=["tied", "untied"])
def test_a_qwen3_folder_on_its_own(tmp_path, cfg):
    """A causal language model with its tokenizer beside it."""
    tensors = toy.tensors("text_encoder", "diffusers", config=cfg)
    toy.save_sharded(tmp_path / "in", tensors, "model", 2)
    (tmp_path / "in" / "config.json").write_text(json.dumps(qwen3.to_json(cfg)))
    small = {name: text for name, text in vlm_cases.PROCESSOR.items() if "processor" not in name}
    for name, text in small.items():
        (tmp_path / "in" / name).write_text(text)
    assert run(tmp_path / "in", tmp_path / "ours") == 0
    assert run(tmp_path / "ours", tmp_path / "back") == 0
    back = tmp_path / "back" / "text_encoder"
    assert_same_tensors(read_folder(back), tensors)
    assert {name: (back / name).read_text() for name in small} == small


def test_a_bad_qwen3_config_is_called_by_its_own_path(tmp_path):
    values = qwen3.to_json(toy.TEXT_ENCODER) | {"new_trick": 1}
    toy.save(tmp_path / "m" / "model.safetensors", toy.tensors("text_encoder", "diffusers"))
    (tmp_path / "m" / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"m/config\.json: .* fields .*: new_trick=1") as error:
        find(tmp_path / "m")
    assert "text_encoder" not in str(error.value)


def test_a_repository_is_asked_for_the_processor_too(tmp_path, monkeypatch):
    asked = []

    def snapshot_download(repo_id, *, allow_patterns):
        asked.append((repo_id, allow_patterns))
        return str(tmp_path / "in")

    vlm_cases.folder(tmp_path / "in", shards=2)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert find("Qwen/Qwen3-VL-8B-Instruct").components["vlm"].config == vlm_cases.UNTIED
    repo_id, patterns = asked[-1]
    assert repo_id == "Qwen/Qwen3-VL-8B-Instruct"
    names = [file.name for file in (tmp_path / "in").iterdir()]
    wanted = list(huggingface_hub.utils.filter_repo_objects(names, allow_patterns=patterns))
    assert set(names) - set(wanted) == {"README.md", "training_args.bin"}


def test_files_are_what_the_safetensors_library_reads(tmp_path):
    vlm_cases.folder(tmp_path / "in")
    assert run(tmp_path / "in", tmp_path / "out", "--to=transformers") == 0
    values = load_file(tmp_path / "out" / "vlm" / "model.safetensors")
    assert {name: value.shape for name, value in values.items()} == vlm_cases.released_names(
        vlm_cases.UNTIED
    )
