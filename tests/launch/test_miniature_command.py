"""The miniature's recipe: every stage by the ordinary trainer, and what it leaves."""

import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from conversion import detect
from launch import recipe as recipes
from launch.recipe import Recipe
from tests.launch.training import ENV, ROOT


def test_unknown_stages_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"unknown stages \['paint'\]; there are begin, vae"):
        Recipe(tmp_path).run(["paint"])


@pytest.mark.slow
def test_every_stage_leaves_weights_that_others_read(tmp_path, monkeypatch):
    """Two steps of each training: minutes, nearly all of them compiling.

    What two steps have trained draws nothing right: drawings to learn from are of shipped weights.
    """
    for name, value in ENV.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(recipes.STEPS, "quick", dict.fromkeys(recipes.STEPS["quick"], 2))
    monkeypatch.setitem(recipes.PROMPTS, "quick", 1)
    made = Recipe(tmp_path / "mini", "quick")
    out = tmp_path / "mini"
    stages = list(made.stages)
    made.run(stages[: stages.index("trajectories")])
    shutil.move(out / "klein_long", tmp_path / "two_steps")
    shutil.copytree(detect.find("miniature").path, out / "klein_long")
    made.run(["trajectories"])
    shutil.rmtree(out / "klein_long")
    shutil.move(tmp_path / "two_steps", out / "klein_long")
    made.run()
    recorded = json.loads((out / "recipe.json").read_text())
    assert list(recorded) == list(made.stages)
    assert all(stage["preset"] == "quick" and stage["cores"] for stage in recorded.values())

    from launch import build, build_vlm

    weights = build.inspect_weights(str(out / "weights" / "klein"))
    assert not weights.distilled and weights.found.components["vae"].variant == "miniature"
    model = build.load_image_model(weights, dtype="float32")
    assert np.any(np.asarray(model.params["vae"]["bn"]["mean"]) != 0), "latents were measured"
    assert build_vlm.find(str(out / "weights" / "vlm")).variant == "miniature"
    tuned = {
        name: detect.find(out / "weights" / name).components for name in ("klein_sft", "vlm_sft")
    }
    assert tuned["klein_sft"]["transformer"].layout == "adapters"
    assert tuned["vlm_sft"]["vlm"].folder.samefile(out / "weights" / "vlm")
    size = sum(f.stat().st_size for f in (out / "weights").rglob("*") if f.is_file())
    assert size < 15e6
    # klein was trained on the latents of this VAE, and its run is weights by itself
    autoencoders = [
        build.inspect_weights(str(out / name)).found.components["vae"].open()
        for name in ("vae", "klein_long")
    ]
    one, other = (each.read("encoder/conv_in/kernel", None)[()] for each in autoencoders)
    np.testing.assert_array_equal(one, other)
    run = build.inspect_weights(str(out / "runs" / "klein_long")).found.components
    assert {name for name, part in run.items() if part.layout == "run"} == {
        "transformer",
        "text_encoder",
    }
    again = subprocess.run(
        [sys.executable, "-m", "launch.miniature", f"--out={out}", "--preset=quick"],
        cwd=ROOT,
        env=ENV,
        capture_output=True,
        text=True,
        check=True,
    )
    assert again.stdout.count("there already") == len(made.stages), "nothing is done twice"


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["klein", "vlm"])
def test_killed_and_resumed_equals_uninterrupted(tmp_path, variant, monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe = Recipe(tmp_path / "mini")
    recipe.run(["begin", "vlm_begin"] if variant == "vlm" else ["begin"])
    weights = tmp_path / "mini" / ("vlm_begin" if variant == "vlm" else "begin")

    def command(workdir):
        options = {"weights": weights, "steps": 6, "batch.rows": 2, "save.every": 3, "log": 1}
        return [
            *(sys.executable, "-m", "launch.train", f"--config=configs/miniature.py:{variant}"),
            *(f"--workdir={workdir}", "--resume"),
            *(f"--config.{name}={value}" for name, value in options.items()),
        ]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    quiet = dict(cwd=ROOT, env=ENV, stderr=subprocess.DEVNULL)
    subprocess.run(command(whole), check=True, **quiet)
    process = subprocess.Popen(command(killed), **quiet)
    deadline = time.time() + 600
    while not (killed / "checkpoints" / "3").exists() and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run(command(killed), check=True, **quiet)

    from clvr_jax.checkpoint import open_state

    states = [open_state(folder / "checkpoints", 6) for folder in (whole, killed)]
    assert states[0].specs.keys() == states[1].specs.keys()
    for name in states[0].specs:
        np.testing.assert_array_equal(*(state.read(name) for state in states), err_msg=name)
