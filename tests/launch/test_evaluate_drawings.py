"""Folders of drawings compared: who passed, by how much, and who knew when to stop."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from clvr_jax.closed_loop import Result, Task
from clvr_jax.data.trajectory import Action, Step, Trajectory
from clvr_jax.miniature.held_out import Split
from clvr_jax.miniature.parse import parse_prompt
from clvr_jax.miniature.pictures import Picture, rendered
from clvr_jax.miniature.prompts import Prompt
from clvr_jax.miniature.scene import Scene, Thing
from launch import evaluate
from launch.drawing import folder
from launch.drawing.run import SETTINGS
from launch.evaluation import drawings, drawings_view

GOALS = ("a red circle", "two blue squares", "a green star")
RIGHT = {
    "a red circle": [Thing(0, "circle", "red", "large")],
    "two blue squares": [Thing(5, "square", "blue", "large"), Thing(9, "square", "blue", "small")],
    "a green star": [Thing(3, "star", "green", "large")],
}


@pytest.fixture(autouse=True)
def lists(monkeypatch):
    """The fixed lists hold one of the goals here: to make thousands of prompts takes a minute."""
    known = Prompt(GOALS[0], parse_prompt(GOALS[0]), "colour", 1.0)
    monkeypatch.setattr(drawings, "prompts", lambda split: (known,) if split is Split.DEV else ())


@pytest.fixture(scope="module")
def pictures():
    """A right and a wrong picture of every goal."""
    scenes = [Scene(tuple(RIGHT[goal])) for goal in GOALS] + [Scene(())]
    shown = rendered([Picture(scene.codes(), 7) for scene in scenes], len(scenes))
    wrong = Image.fromarray(shown[-1])
    return {goal: (Image.fromarray(picture), wrong) for goal, picture in zip(GOALS, shown)}


def write(out, pictures, made):
    """A folder of drawings; `made` says which pictures of each goal are right, and its end."""
    for number, (goal, (passes, outcome)) in enumerate(made.items()):
        task = Task(f"{number:04d}-x-0", goal)
        steps = tuple(
            Step(
                reasoning="so",
                action=Action(kind="generate", prompt=goal),
                image=f"{n}.png",
                metadata={"evaluations": 4},
            )
            for n in range(1, len(passes) + 1)
        )
        given = dict(id=task.id, goal=goal, steps=steps, outcome=outcome)
        mode = {"mode": "loop" if outcome else "one_shot"}
        trajectory = Trajectory(**given, metadata=mode) if steps else None
        shown = tuple(pictures[goal][0 if passed else 1] for passed in passes)
        error = None if steps else "Failed: x"
        cost = dict(seconds=2.0, evaluations=4 * len(passes), tokens=10)
        folder.write(out, Result(task, trajectory, shown, error, **cost), {})
    (out / SETTINGS).write_text("{}")
    return out


@pytest.fixture(scope="module")
def arms(tmp_path_factory, pictures):
    base = tmp_path_factory.mktemp("arms")
    loop = {
        GOALS[0]: ((False, True), "stopped"),
        GOALS[1]: ((True, False), "stopped"),
        GOALS[2]: ((True,), "stopped"),
    }
    single = {GOALS[0]: ((False,), None), GOALS[1]: ((True,), None), GOALS[2]: ((), "failed")}
    return {n: write(base / n, pictures, m) for n, m in (("loop", loop), ("single", single))}


def test_answers_are_judged_and_compared(arms):
    read = {name: drawings.read(place) for name, place in arms.items()}
    assert read["loop"][GOALS[1], 0].passed == (True, False)
    report = drawings.compare(read, "loop")
    loop, single = report["arms"]["loop"], report["arms"]["single"]
    assert (loop["passed"].passed, single["passed"].passed, report["prompts"]) == (2, 1, 3)
    assert loop["ever_right"].passed == 3 and loop["by_own_decision"].passed == 3
    assert (loop["stopped_unsatisfied"].passed, loop["stopped_unsatisfied"].trials) == (1, 3)
    # three pictures were right; one of them was gone on with
    assert (loop["edited_though_right"].passed, loop["edited_though_right"].trials) == (1, 3)
    assert single["by_own_decision"].passed == 0 and single["edited_though_right"].trials == 0
    assert loop["lengths"] == {"1": 1, "2": 2} and single["lengths"] == {"0": 1, "1": 2}
    assert (loop["evaluations"], loop["tokens"]) == (pytest.approx(20 / 3), 10.0)
    assert report["differences"]["single"]["all"].value == pytest.approx(1 / 3)
    assert report["differences"]["single"]["p_holm"] == 1.0
    assert [loop["budgets"][n]["passed"].passed for n in "128"] == [2, 2, 2]
    assert loop["budgets"]["1"]["evaluations"] < loop["budgets"]["2"]["evaluations"]
    assert loop["budgets"]["1"]["pictures"] == 1.0 and single["budgets"] == {}
    assert sum(rate.trials for g, rate in loop["groups"].items() if g.startswith("tier")) == 3
    assert (loop["groups"]["colour"].trials, loop["groups"]["other"].trials) == (1, 2)


def test_only_shared_prompts_are_compared(arms, tmp_path, pictures):
    less = write(tmp_path / "less", pictures, {GOALS[0]: ((True,), "stopped")})
    read = {"loop": drawings.read(arms["loop"]), "less": drawings.read(less)}
    report = drawings.compare(read, "less")
    assert report["prompts"] == 1 and report["left_out"] == {"loop": 2, "less": 0}
    other = write(tmp_path / "other", pictures, {GOALS[1]: ((True,), "stopped")})
    with pytest.raises(ValueError, match="share no prompt"):
        drawings.compare({"a": read["less"], "b": drawings.read(other)}, "a")
    with pytest.raises(ValueError, match="no arm is called 'best'; there are loop, less"):
        drawings.compare(read, "best")


def test_tables_say_it(arms):
    report = drawings.compare({n: drawings.read(place) for n, place in arms.items()}, "loop")
    stream = io.StringIO()
    drawings_view.show(report, Console(file=stream, width=140))
    text = stream.getvalue()
    assert "66.7 % (20.8 - 93.9, 3)" in text and "+33.3 (" in text and "stopped: 3" in text


def test_the_command_writes_and_refuses(arms, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["drawings", *(f"--arm={name}={place}" for name, place in arms.items()), f"--out={out}"]
    assert evaluate.main(flags) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out / "index.html")
    written = json.loads((out / "results.json").read_text())
    assert written["arms"]["loop"]["passed"]["rate"] == pytest.approx(2 / 3)
    assert set(written["differences"]["single"]["all"]) == {"value", "low", "high"}
    html = (out / "index.html").read_text()
    assert "loop less another way" in html and "Passed over evaluations of a prompt" in html
    assert html.count("<polyline") == 2, "the loop's curve, over evaluations and over tokens"
    for bad, words in (
        (["--arm=loop"], "NAME=FOLDER"),
        (flags[1:2] * 2, "every name once"),
        (["--arm=loop=x", "--against=best"], "no arm is called so; there are loop"),
        ([f"--arm=loop={tmp_path}"], "holds no drawings of launch.generate: no settings.json"),
    ):
        with pytest.raises(SystemExit):
            evaluate.main(["drawings", *bad, f"--out={tmp_path / 'new'}"])
        assert words in capsys.readouterr().err
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match="holds no drawings"):
        drawings.read(empty)


def test_prompts_are_printed_for_drawing(capsys):
    assert evaluate.main(["prompts", "--split=dev", "--count=2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 24 == len(set(lines))
    assert evaluate.main(["prompts", "--split=train", "--count=1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 12
    with pytest.raises(SystemExit):
        evaluate.main(["prompts", "--split=train"])
    assert "has no end: give --count" in capsys.readouterr().err


def test_pictures_of_other_sizes_are_refused(tmp_path, pictures):
    large = {goal: tuple(p.resize((80, 64)) for p in pair) for goal, pair in pictures.items()}
    place = write(tmp_path / "large", large, {GOALS[0]: ((True,), "stopped")})
    with pytest.raises(ValueError, match="is 80x64; 64x64 is needed"):
        drawings.read(place)
    assert np.asarray(pictures[GOALS[0]][0]).shape == (64, 64, 3)
