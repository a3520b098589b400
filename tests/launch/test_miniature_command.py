"""The miniature's recipe: every stage by the ordinary trainer, and what it leaves."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from clvr_jax.data.trajectory import Action, Step, Trajectory
from clvr_jax.miniature import prompts
from clvr_jax.miniature.held_out import Split
from configs import vlm_sft
from conversion import detect
from launch import recipe as recipes
from launch.drawing import folder
from launch.recipe import Recipe
from tests.launch.training import ENV, ROOT


def test_unknown_stages_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"unknown stages \['paint'\]; there are begin, vae"):
        Recipe(tmp_path).run(["paint"])


def test_what_was_begun_otherwise_is_not_gone_on_with(tmp_path, monkeypatch):
    """Or quick weights would pass for full ones."""
    monkeypatch.setattr(Recipe, "begin", lambda self, folder: folder.mkdir())
    Recipe(tmp_path, "quick").run(["begin"])
    Recipe(tmp_path, "quick").run(["begin"])
    with pytest.raises(ValueError, match="was begun with --preset=quick, full given; go on with"):
        Recipe(tmp_path).run(["begin"])
    with pytest.raises(ValueError, match="--seed=0, 3 given"):
        Recipe(tmp_path, "quick", 3).run(["begin"])


def test_fine_tuning_takes_conversations_as_long_as_they_can_be():
    """Of 2,484 drawings 56 were longer than the rows were, and the stage refused them all."""
    most = json.loads((detect.find("miniature-vlm").path / "config.json").read_text())
    data = vlm_sft.get_config("miniature").data
    assert data.tokens == data.positions == most["text_config"]["max_position_embeddings"]


def test_a_stage_costs_what_all_its_starts_took(tmp_path, monkeypatch):
    def broken(self, folder):
        time.sleep(1.1)
        raise ChildProcessError("it printed why")

    monkeypatch.setattr(Recipe, "begin", broken)
    with pytest.raises(ChildProcessError):
        Recipe(tmp_path).run(["begin"])
    known = json.loads((tmp_path / "recipe.json").read_text())
    assert not known["stages"]["begin"]["made"] and known["preset"] == "full"
    monkeypatch.setattr(Recipe, "begin", lambda self, folder: (time.sleep(1.1), folder.mkdir()))
    Recipe(tmp_path).run(["begin"])
    stage = json.loads((tmp_path / "recipe.json").read_text())["stages"]["begin"]
    assert stage["made"] and stage["seconds"] >= 2 and stage["cores"]


def test_leavings_of_a_start_that_was_killed_are_no_hindrance(tmp_path, monkeypatch):
    """What `conversion` would refuse to write over."""
    commands = []

    def called(command, what):
        target = Path(command[4])
        assert not target.exists() and not target.with_name(f"{target.name}.partial").exists()
        commands.append(command[2])
        (target / "vlm").mkdir(parents=True)

    monkeypatch.setattr(recipes, "_call", called)
    recipe = Recipe(tmp_path)
    for name in ("klein.partial", "vlm.parts", "vlm.parts.partial", "klein_sft.partial"):
        (tmp_path / name / "old").mkdir(parents=True)
    recipe._exported(tmp_path / "klein", tmp_path / "run")
    recipe._exported(tmp_path / "vlm", tmp_path / "run", only="vlm")
    recipe._adapters(tmp_path / "klein_sft", "klein_sft", "klein")
    assert commands == ["conversion", "conversion", "conversion.lora"]


def test_what_is_started_ends_with_the_recipe(tmp_path):
    """A training that outlived it would write into the folder of the next one."""
    asleep = "import time; print('asleep', flush=True); time.sleep(60)"
    code = (
        "import sys; from launch import recipe; "
        f"recipe._call([sys.executable, '-c', {asleep!r}], 'sleeping')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=ENV, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline().startswith("-c") and process.stdout.readline() == "asleep\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    assert process.stdout.read() == "", "the pipe is closed: the child is gone too"


def test_drawings_of_other_splits_are_not_trained_on(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    texts = [prompts.sample(rng, split=split)[0].text for split in (Split.TRAIN, Split.TEST)]

    def called(command, what, accepted=()):
        if what == "drawing":
            return 0
        lines = []
        for number, text in enumerate(texts):
            step = Step(reasoning="so", action=Action(kind="generate", prompt=text), image="1.png")
            given = Trajectory(id=f"t{number}", goal="a star", steps=(step,), outcome="stopped")
            lines.append(json.dumps(given.record()) + "\n")
        Path(command[5]).write_text("".join(lines))

    monkeypatch.setattr(recipes, "_call", called)
    monkeypatch.setitem(recipes.PROMPTS, "quick", 1)
    Recipe(tmp_path, "quick").trajectories(tmp_path / "trajectories")
    (line,) = (tmp_path / "trajectories" / "train.jsonl").read_text().splitlines()
    assert json.loads(line)["id"] == "t0"
    assert [file.name for file in (tmp_path / "trajectories").iterdir()] == ["train.jsonl"]


@pytest.mark.parametrize("failed", [1, 2])
def test_a_few_drawings_may_fail(tmp_path, monkeypatch, failed):
    """Seeds come of prompts: what failed fails again, and one of hundreds is no loss."""

    def called(command, what, accepted=()):
        if what != "drawing":
            raise InterruptedError(what)
        assert accepted == {folder.SOME_FAILED}, "another status is a refusal"
        for number in range(60):
            place = tmp_path / "runs" / "drawings" / str(number)
            place.mkdir(parents=True)
            (place / folder.RESULT).write_text(json.dumps({"error": number < failed or None}))
        return folder.SOME_FAILED

    monkeypatch.setattr(recipes, "_call", called)
    monkeypatch.setitem(recipes.PROMPTS, "quick", 5)
    error, words = (InterruptedError, "choosing") if failed == 1 else (ChildProcessError, "2 of 60")
    with pytest.raises(error, match=words):
        Recipe(tmp_path, "quick").trajectories(tmp_path / "trajectories")


def test_a_record_of_another_version_is_told(tmp_path):
    (tmp_path / "recipe.json").write_text('{"begin": {"preset": "full"}}')
    with pytest.raises(ValueError, match=r"recipe\.json is of an earlier version"):
        Recipe(tmp_path).run(["begin"])


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
    assert list(recorded["stages"]) == list(made.stages) and recorded["preset"] == "quick"
    assert all(stage["made"] and stage["cores"] for stage in recorded["stages"].values())

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
