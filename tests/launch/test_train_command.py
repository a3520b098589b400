"""`python -m launch.train` as a user runs it: on toy weights, killed, resumed, exported."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from launch import toy
from launch import toy_data as data
from tests.launch.training import ENV, ROOT, arguments


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Toy weights of both stages and a dataset."""
    place = tmp_path_factory.mktemp("train")
    toy.write(place / "klein")
    toy.write_vlm(place / "vlm")
    data.make(place / "data", count=6, steps=(1, 2), size=(64, 64))
    return place


def run(command, code=0, extra=()):
    done = subprocess.run(
        [*command, *extra], cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == code, done.stderr[-3000:]
    return done


def state(workdir, step):
    from clvr_jax.checkpoint import open_state

    reader = open_state(workdir / "checkpoints", step)
    return {name: reader.read(name) for name in reader.specs}


def equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


OPTIONS = ("steps=10", "save.every=5", "log=1", "ema=0.9", "dropout=0.3")


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(folder, tmp_path):
    whole = tmp_path / "whole"
    run(arguments(folder, "image", whole, *OPTIONS))
    killed = tmp_path / "killed"
    command = arguments(folder, "image", killed, *OPTIONS)
    process = subprocess.Popen(command, cwd=ROOT, env=ENV, stderr=subprocess.DEVNULL)
    deadline = time.time() + 200
    while not (killed / "checkpoints" / "5").exists() and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    assert not (killed / "checkpoints" / "10").exists()
    told = run(command, extra=["--resume"]).stderr
    assert "resumed at step 5 of 10" in told
    equal(state(killed, 10), state(whole, 10))
    lines = lambda place: [
        (line["step"], line["loss"])
        for line in map(json.loads, (place / "metrics.jsonl").read_text().splitlines())
    ]
    assert lines(killed) == lines(whole)
    starts = json.loads((killed / "run.json").read_text())["starts"]
    assert len(starts) == 2 and starts[0]["versions"]["jax"] and starts[0]["devices"] == 1


@pytest.mark.slow
def test_sigterm_saves_and_says_how_to_go_on(folder, tmp_path):
    command = arguments(folder, "image", tmp_path / "run", "steps=100000", "save.every=0", "log=1")
    process = subprocess.Popen(command, cwd=ROOT, env=ENV, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.startswith("step 2/"):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stderr.read()
    assert process.wait(60) == 143
    assert "the state is saved; --resume goes on" in rest
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1


@pytest.mark.slow
def test_another_config_data_or_folder_is_refused(folder, tmp_path):
    workdir = tmp_path / "run"
    run(arguments(folder, "image", workdir, "steps=1"))
    again = run(arguments(folder, "image", workdir, "steps=1"), code=1)
    assert "--resume goes on with it, --overwrite deletes it" in again.stderr
    other = arguments(folder, "image", workdir, "steps=1", "optim.learning_rate=0.5", "log=3")
    told = run(other, code=1, extra=["--resume"]).stderr
    assert "--config.optim.learning_rate: the run has 0.001, 0.5 given" in told
    assert "log" not in told.split("begun with another config")[1].split("give the run's")[0]
    (workdir / "config.json").unlink()
    assert "holds no run" in run(arguments(folder, "image", workdir, "steps=1"), code=1).stderr


def test_bad_data_is_refused_before_anything_starts(folder, tmp_path):
    lines = (folder / "data" / "trajectories.jsonl").read_text().splitlines()
    broken = [json.loads(line) for line in lines]
    broken[1]["steps"][0]["image"] = "nowhere.png"
    bad = folder / "data" / "bad.jsonl"
    bad.write_text("\n".join(json.dumps(record) for record in broken))
    command = arguments(folder, "image", tmp_path / "run")
    command = [part.replace("trajectories.jsonl", "bad.jsonl") for part in command]
    told = run(command, code=1).stderr
    assert "bad.jsonl:2" in told and "nowhere.png" in told
    assert not (tmp_path / "run").exists()
    bad.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["image", "vlm"])
def test_dry_run_plans_for_machines_that_are_not_there(folder, tmp_path, stage):
    command = arguments(folder, stage, tmp_path / "run")
    told = run(command, extra=["--dry_run", "--target=h20x8"]).stdout
    for expected in ("8 x NVIDIA H20", "parameters:", "sharding", "memory of one device", "fits"):
        assert expected in told
    assert "first row: " in told and "trajectories.jsonl:" in told.replace("\n", "")
    assert not (tmp_path / "run").exists()
    missing = [
        part.replace(str(folder / "klein"), "org/none").replace(str(folder / "vlm"), "org/none")
        for part in command
    ]
    sizes = "klein_9b" if stage == "image" else "qwen3_vl_8b"
    told = run(missing, extra=["--dry_run", "--target=v5e-64", f"--config.sizes={sizes}"]).stdout
    assert "64 x TPU v5e" in told and "a nominal one was planned for" in told


@pytest.mark.slow
def test_a_run_is_weights(folder, tmp_path):
    """Its newest checkpoint converts, by the moving average, and another run begins from it."""
    workdir, again = tmp_path / "run", tmp_path / "again"
    run(arguments(folder, "image", workdir, "steps=2", "ema=0.5", "save.every=1"))
    out = tmp_path / "out"
    run([sys.executable, "-m", "conversion", str(workdir), str(out), "--to=diffusers"])
    from conversion import detect

    trained = detect.find(out).components["transformer"].open()
    saved = state(workdir, 2)
    np.testing.assert_array_equal(
        np.asarray(trained.read("single_blocks/qkv/kernel", 1)),
        saved["ema/model/single_blocks/qkv/kernel"][1],
    )
    assert json.loads((out / "conditioning.json").read_text())["text"] == "trajectory"
    earlier = detect.find(workdir / "checkpoints" / "1").components["transformer"].open()
    assert not np.array_equal(
        np.asarray(earlier.read("img_in/kernel", None)), saved["ema/model/img_in/kernel"]
    )
    command = arguments(folder, "image", again, "steps=1", "lora.rank=2", "lora.alpha=4.0")
    command = [part.replace(str(folder / "klein"), str(workdir)) for part in command]
    run(command)
    adapted = state(again, 1)
    merged = detect.find(again).components["transformer"].open()
    a, b = (adapted[f"params/lora/single_blocks/qkv/{part}"][0] for part in "ab")
    delta = np.tensordot(a, 2 * b, 1)
    np.testing.assert_allclose(
        np.asarray(merged.read("single_blocks/qkv/kernel", 0)),
        saved["ema/model/single_blocks/qkv/kernel"][0] + delta,
        rtol=1e-6,
    )
    assert np.abs(delta).max() > 0
