"""Every option of the stages does something, and what runs trained is what comes out of them."""

import dataclasses
import functools
import json
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from clvr_jax.checkpoint import open_state
from clvr_jax.data.conditioning import Policy
from clvr_jax.tree import flatten
from configs import image_sft, vlm_sft
from conversion import detect
from conversion.cli import main as convert
from conversion.lora.__main__ import main as convert_lora
from launch import build, toy
from launch import toy_data as data
from launch.training import compose, image, vlm
from launch.training import run as running
from tests.launch import training
from tests.launch.training import ENV, ROOT


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("options")
    toy.write(place / "klein")
    toy.write_vlm(place / "vlm")
    data.make(place / "data", count=4, steps=1, size=(64, 64))
    return place


def config(folder, stage, **changes):
    made = (image_sft if stage == "image" else vlm_sft).get_config("toy")
    made.weights = str(folder / ("klein" if stage == "image" else "vlm"))
    made.data.train = str(folder / "data" / "trajectories.jsonl")
    made.update_from_flattened_dict({name.replace("__", "."): v for name, v in changes.items()})
    return made


def job(given):
    """The job of a config on one device, without its data."""
    kind = image if given.stage == "image" else vlm
    weights = kind.find(given)
    nets = kind.networks(given, weights)
    return compose.make_job(given, kind.stage(given, nets, weights), 10, None), nets


def command(folder, stage, workdir, *options):
    return training.arguments(folder, stage, workdir, "steps=2", *options)


def run(command, code=0):
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=500)
    assert done.returncode == code, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def adapted(folder):
    """An image run: adapters with alpha, mixed precision, a moving average, a group."""
    run(
        command(
            *(folder, "image", folder / "adapted"),
            f"data.features={folder}/features",
            *("condition.text=instruction", "condition.buckets=(96,)"),
            *("precision=mixed", "lora.rank=2", "lora.alpha=6.0", "ema=0.5", "save.every=1"),
            *("lora.pattern=single_blocks/(qkv|attn_out)/kernel", "dropout=0.5"),
            "optim.groups=(('attn_out', 0.5),)",
        )
    )
    return folder / "adapted"


@pytest.fixture(scope="module")
def half(folder):
    """A VLM run in bfloat16 whose tower is frozen."""
    run(
        command(
            *(folder, "vlm", folder / "half", "precision=bfloat16", "optim.moments=bfloat16"),
            *("train=^language/", "batch.accumulation=2", "chunk=64"),
            *("optim.groups=(('^language/layers', 0.5),)", "template.enable_thinking=True"),
        )
    )
    return folder / "half"


@pytest.mark.slow
def test_adapters_of_a_run_become_a_lora_file(folder, adapted, tmp_path):
    """With the moving average, and alpha / rank = 3 folded in."""
    saved = open_state(adapted / "checkpoints")
    a, b = (saved.read(f"ema/lora/single_blocks/attn_out/{part}") for part in "ab")
    assert a.shape[-1] == 2 and np.abs(b).max() > 0
    out = tmp_path / "style.safetensors"
    weights = f"--weights={folder}/klein"
    assert convert_lora([str(adapted), str(out), "--to=peft", weights]) == 0
    assert any("lora_A" in name for name in load_file(out))
    from conversion.lora import read

    abstract = detect.find(folder / "klein").components["transformer"].abstract()
    back = flatten(read(out, abstract))
    assert set(back) == {
        f"single_blocks/{name}/{part}" for name in ("qkv", "attn_out") for part in "ab"
    }
    np.testing.assert_allclose(
        np.matmul(back["single_blocks/attn_out/a"][0], back["single_blocks/attn_out/b"][0]),
        np.matmul(a[0], 3 * b[0]),
        rtol=1e-5,
        atol=1e-8,
    )
    earlier = tmp_path / "earlier.safetensors"
    given = [str(adapted / "checkpoints" / "1"), str(earlier), "--to=peft", weights]
    assert convert_lora(given) == 0
    assert any(
        not np.array_equal(value, load_file(out)[name])
        for name, value in load_file(earlier).items()
    )
    assert convert_lora([str(adapted), str(tmp_path / "peft"), "--to=peft", weights]) == 0
    found = detect.find(tmp_path / "peft")
    assert found.manifest["conditioning"]["text"] == "instruction"
    read_kernel = lambda place: np.asarray(
        place.components["transformer"].open().read("single_blocks/qkv/kernel", 1)
    )
    own = read_kernel(detect.find(adapted))
    np.testing.assert_allclose(read_kernel(found), own, rtol=1e-6, atol=1e-7)
    assert not np.array_equal(own, read_kernel(detect.find(folder / "klein")))


@pytest.mark.slow
def test_a_run_without_adapters_has_no_lora_file(folder, half, tmp_path, capsys):
    weights = f"--weights={folder}/klein"
    assert convert_lora([str(half), str(tmp_path / "x"), weights]) == 1
    assert "trained the vlm" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_is_drawn_from_and_converted(folder, adapted, tmp_path):
    out = tmp_path / "out"
    assert convert([str(adapted), str(out), "--to=diffusers", "--dtype=bfloat16"]) == 0
    trained = detect.find(out).components["transformer"].open().read("single_blocks/qkv/kernel", 0)
    assert trained.dtype == ml_dtypes.bfloat16
    read = lambda place: np.asarray(
        detect.find(place).components["transformer"].open().read("single_blocks/qkv/kernel", 0)
    )
    merged, base = read(adapted), read(folder / "klein")
    saved = open_state(adapted / "checkpoints")
    a, b = (saved.read(f"ema/lora/single_blocks/qkv/{part}")[0] for part in "ab")
    np.testing.assert_allclose(merged, base + np.tensordot(a, 3 * b, 1), rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(np.asarray(trained), merged.astype(ml_dtypes.bfloat16))
    assert build.inspect_weights(str(adapted)).pattern == "full"
    run(
        [
            *(sys.executable, "-m", "launch.generate", f"--weights={adapted}"),
            *("--prompt=a circle", f"--out={tmp_path / 'drawn'}", "--config.steps=1"),
            *("--config.height=64", "--config.width=64"),
        ]
    )
    assert list((tmp_path / "drawn").glob("*.png"))


@pytest.mark.slow
def test_the_pattern_that_a_run_trained_with_is_known(folder, adapted):
    record = json.loads((adapted / "run.json").read_text())
    try:
        (adapted / "run.json").write_text(json.dumps({**record, "pattern": "causal"}))
        assert build.inspect_weights(str(adapted)).pattern == "causal"
    finally:
        (adapted / "run.json").write_text(json.dumps(record))


@pytest.mark.slow
def test_weights_that_a_run_began_from_and_that_moved(adapted):
    record = json.loads((adapted / "run.json").read_text())
    try:
        (adapted / "run.json").write_text(json.dumps({**record, "weights": "/gone/klein"}))
        with pytest.raises(FileNotFoundError, match=r"trained the transformer of /gone/klein, and"):
            detect.find(adapted)
    finally:
        (adapted / "run.json").write_text(json.dumps(record))


@pytest.mark.slow
def test_a_frozen_tower_is_left_as_it_was(folder, half):
    names = open_state(half / "checkpoints").specs
    assert any("language/" in name for name in names)
    assert not any("visual" in name for name in names)
    base = detect.find(folder / "vlm").components["vlm"]
    trained, before = detect.find(half).components["vlm"].open(), base.open()
    for path in flatten(base.abstract()):
        layer = 0 if path.startswith(base.stacked) else None
        now, then = np.asarray(trained.read(path, layer)), np.asarray(before.read(path, layer))
        if path.startswith("visual/"):
            np.testing.assert_array_equal(now, then)
        else:
            assert now.dtype == ml_dtypes.bfloat16
            assert path.endswith("scale") or not np.array_equal(now, then.astype(now.dtype)), path
    asked = ("--prompt=hi", "--config.max_tokens=4", "--config.context=256")
    run([sys.executable, "-m", "launch.ask", f"--weights={half}", *asked])


def test_options_of_the_image_stage_reach_what_they_are_about(folder):
    given = functools.partial(config, folder, "image")
    stage = lambda made: job(made)[0].stage
    times = dict(distribution="uniform", mean=0.5, std=2.0, shift="3.0", weighting="bell")
    chosen = stage(given(**{f"times__{name}": value for name, value in times.items()}))
    sampling = chosen.loss.keywords["settings"].times
    assert dataclasses.asdict(sampling) == {**times, "shift": 3.0}
    made, nets = job(given(remat="attention", attention="blocked"))
    assert (nets.transformer.remat, nets.transformer.implementation) == ("attention", "blocked")
    assert stage(given(pictures__pattern="causal")).record["pattern"] == "causal"
    assert (
        stage(given(condition__references="last_k", condition__last_k=2)).record["conditioning"][
            "last_k"
        ]
        == 2
    )
    assert set(made.stage.others) == {"vae", "text_encoder"}
    assert stage(given(data__features="x")).others == {}

    weights = image.find(given())

    def read(**changes):
        made = given(**changes)
        nets = image.networks(made, weights)
        return image.data(made.data.train, made, nets, weights, 1, (0, 1), epochs=1)

    plain = read()
    first = plain.steps[0]
    assert first.static.noise == (4, 4) and first.static.pattern == "full" and len(plain.steps) == 4
    small = read(pictures__areas=(32 * 32,), pictures__pattern="causal").steps[0].static
    assert small.noise == (2, 2) and small.pattern == "causal"
    assert read(condition__buckets=(96,), condition__text="instruction").steps[0].static.text == 96
    orders = [[int(s.rows[0, 0]) for s in read(seed=n, epochs=1).steps] for n in range(4)]
    assert len(set(map(tuple, orders))) > 1
    dropped = read(dropout=0.999).make(first)
    assert (dropped["lengths"] < plain.make(first)["lengths"]).all()
    assert read(batch__accumulation=2).steps[0].rows.shape == (2, 1)


def test_options_of_the_vlm_stage_reach_what_they_are_about(folder):
    given = functools.partial(config, folder, "vlm")
    made, nets = job(given(chunk=64, remat="full", attention="blocked"))
    assert nets.chunk == 64 and nets.train_vision
    for half in (nets.language, nets.vision):
        assert (half.remat, half.implementation) == ("full", "blocked")
    assert made.stage.loss.keywords["networks"] == nets
    weights = vlm.find(given())
    assert vlm.reader(given(template__enable_thinking=True), weights).options == {
        "enable_thinking": True
    }

    def read(validation=False, **changes):
        made = given(**changes)
        nets, rows = vlm.networks(made, weights), (1, (0, 1))
        return vlm.data(
            made.data.train, made, nets, weights, *rows, epochs=2, validation=validation
        )

    assert len(read(data__tokens=4096).steps) == 2 < len(read(data__tokens=512).steps)
    assert len(read(data__tokens=4096, data__images=1).steps) == 8
    last = lambda data, i=0: int(data.make(data.steps[i])["positions"].max())
    whole = functools.partial(read, data__tokens=4096)
    longest = [last(whole(data__positions=4096, seed=seed), i) for seed in range(4) for i in (0, 1)]
    assert len(set(longest)) > 3 and 4096 > max(longest) > last(whole()), "anew in every epoch"
    assert last(whole(data__positions=4096, validation=True)) == last(whole())
    most = weights.config.text.max_positions
    for wrong in (4095, most + 1):
        message = f"data.positions is {wrong}; give the 4096 of data.tokens at least and the {most}"
        with pytest.raises(ValueError, match=message):
            whole(data__positions=wrong)


def test_what_is_trained(folder):
    given = functools.partial(config, folder, "vlm")
    paths = lambda made: set(flatten(made.trained()))
    whole, nets = job(given())
    assert nets.train_vision and any(path.startswith("model/visual/") for path in paths(whole))
    made, nets = job(given(train="^language/", optim__moments="bfloat16", ema=0.9))
    assert not nets.train_vision
    assert all(path.startswith("model/language/") for path in paths(made))
    shapes = jax.tree_util.tree_leaves_with_path(made.abstract())
    assert not any("visual" in jax.tree_util.keystr(path) for path, _ in shapes)
    assert set(flatten(made.frozen_model())) == {
        path.removeprefix("model/") for path in paths(whole) - paths(made)
    }
    made, nets = job(given(lora__rank=2))
    assert not nets.train_vision
    assert {path.split("/")[1] for path in paths(made)} == {"language"}
    assert not any("lm_head" in path for path in paths(made))
    made, nets = job(given(lora__rank=2, lora__pattern="(language/layers|visual/blocks)/.*kernel$"))
    assert nets.train_vision and any("visual/blocks" in path for path in paths(made))
    with pytest.raises(ValueError, match="train is 'nothing', which matches none of"):
        job(given(train="nothing"))
    with pytest.raises(ValueError, match=r"'\^visual/' matches none of language"):
        job(given(train="^language/", optim__groups=(("^visual/", 0.1),)))


def test_frozen_weights_that_changed_are_refused_on_resume(folder, tmp_path):
    frozen = lambda stage, **changes: running._frozen(job(config(folder, stage, **changes))[0])
    assert set(frozen("image")) == {"vae", "text_encoder"}
    assert frozen("image", data__features="x") == {} == frozen("vlm")
    same = frozen("vlm", train="^language/")
    assert set(same) == {"vlm"} and same == frozen("vlm", lora__rank=2)
    toy.write_vlm(tmp_path / "other", seed=1)
    now = frozen("vlm", lora__rank=2, weights=str(tmp_path / "other"))
    given = {"data": "x", "rows": [1, 8]}
    running._compare({**given, "frozen": same}, {**given, "frozen": same}, tmp_path)
    with pytest.raises(ValueError, match="fingerprint of weights that are not trained was"):
        running._compare({**given, "frozen": same}, {**given, "frozen": now}, tmp_path)


def test_weights_that_do_not_fit_are_told_before_they_are_read(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist"):
        image.find(config(folder, "image", weights=str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match=r"holds a transformer of sizes 'tiny', .* 'klein_4b'"):
        image.find(config(folder, "image", sizes="klein_4b"))
    with pytest.raises(ValueError, match=r"of sizes .* the config says 'qwen3_vl_8b'"):
        vlm.find(config(folder, "vlm", sizes="qwen3_vl_8b"))
    with pytest.raises(ValueError, match="this stage trains a Qwen3-VL"):
        vlm.find(config(folder, "vlm", weights=str(folder / "klein")))


@pytest.mark.parametrize("stage", ["image", "vlm"])
def test_data_that_is_empty_or_small(folder, tmp_path, stage):
    """An epoch of one step is a run; no record at all is none."""
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    made = config(folder, stage)
    kind = image if stage == "image" else vlm
    weights = kind.find(made)
    nets = kind.networks(made, weights)
    read = functools.partial(kind.data, config=made, nets=nets, weights=weights, process=(0, 1))
    with pytest.raises(ValueError, match=r"empty\.jsonl") as error:
        read(str(empty), rows=1, epochs=1, validation=True)
    assert len(str(error.value).splitlines()) <= 2
    rows = read(made.data.train, rows=16, steps=3)
    assert [step.epoch for step in rows.steps] == [0, 1, 2]
    made.optim.warmup = 100.0
    with pytest.raises(ValueError, match=r"optim\.warmup is 100 steps, the whole training has 3"):
        compose.make_job(made, kind.stage(made, nets, weights), len(rows.steps), None)


def test_a_dry_run_writes_nothing(folder, tmp_path):
    """Not even into caches, and asks no hub."""
    home = tmp_path / "home"
    home.mkdir()
    env = {name: value for name, value in ENV.items() if "CACHE" not in name}
    env |= {"HOME": str(home), "TMPDIR": str(home), "HF_HUB_OFFLINE": "1"}
    told = subprocess.run(
        [
            *(sys.executable, "-m", "launch.train", "--config=configs/image_sft.py:klein_4b"),
            *(f"--workdir={tmp_path}/run", "--dry_run", "--target=h200x8"),
            f"--config.data.train={folder}/data/trajectories.jsonl",
        ],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert told.returncode == 0, told.stderr
    assert "is not in the local cache" in told.stdout
    assert list(tmp_path.rglob("*")) == [home]


def test_the_miniature_is_fine_tuned_as_its_weights_were_trained():
    """Its padding is part of the condition: other lengths are other conditions."""
    recorded = detect.find("miniature").manifest["conditioning"]
    assert image.policy(image_sft.get_config("miniature")) == Policy.from_json(recorded)
