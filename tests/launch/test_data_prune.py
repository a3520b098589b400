"""Drawings made into training data: what is left out, and who tells the stories."""

import json

import pytest
from PIL import Image

from clvr_jax.backends.protocol import Options
from clvr_jax.closed_loop import Budget, Loop
from clvr_jax.closed_loop.story import narrate, verify
from clvr_jax.data.conditioning import Policy
from clvr_jax.data.prune import prune
from clvr_jax.data.sources import open_source
from clvr_jax.data.trajectory import Action, Step, Trajectory
from clvr_jax.miniature.pictures import Picture, rendered
from clvr_jax.miniature.scene import Scene, Thing
from launch import data
from launch.data_prune import looker
from launch.drawing import folder, models, run
from tests.closed_loop.scripted import GENERATE, STOP, Images, Vlm, edit


@pytest.fixture
def drawn(tmp_path):
    """One that went back, one that ran out of pictures, one that is long."""
    script = (GENERATE, edit(1), edit(1), STOP, *[GENERATE, edit(1), edit(2), edit(3)] * 2, STOP)
    vlm = Vlm(*script[:4], *script[4:8], edit(4), *script[8:])
    policy = Policy(text="instruction", references="chosen")
    work = Loop(vlm, Images(), policy, Budget(generations=4), pause=0.0).run
    tasks = folder.tasks(["back", "spent", "long"], [0])
    run.draw(work, tasks, tmp_path / "out", {}, "x", 1, lambda event: None)
    return tmp_path / "out"


def test_what_ended_well_is_kept_without_what_led_nowhere(drawn, tmp_path, capsys):
    target = tmp_path / "data" / "train.jsonl"
    target.parent.mkdir()
    assert data.main(["prune", str(drawn), str(target)]) == 0
    assert capsys.readouterr().out.strip() == (
        f"wrote 2 records to {target}; left out 1 steps that led nowhere and 1 ended by "
        "generations trajectories"
    )
    source = open_source(target)
    back, long = source[0], source[1]
    assert (back.goal, len(back.steps), long.goal, len(long.steps)) == ("back", 2, "long", 4)
    assert data.main(["validate", str(target), "--min_side=8"]) == 0
    assert data.main(["prune", str(drawn), str(tmp_path / "b.jsonl"), "--max_steps=2"]) == 0
    assert "1 longer than 2 steps" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        data.main(["prune", str(drawn), str(tmp_path / "c.txt")])
    assert "must end in .jsonl" in capsys.readouterr().err


@pytest.mark.parametrize("look", [1, 2])
def test_what_was_drawn_unseen_is_no_example(tmp_path, capsys, look):
    """A conversation shows every picture; learnt from it, the model would claim to have seen."""
    policy = Policy(text="instruction", references="chosen")
    work = Loop(Vlm(GENERATE, edit(1), edit(2), STOP), Images(), policy, Budget(look=look)).run
    run.draw(work, folder.tasks(["x"], [0]), tmp_path / "out", {}, "x", 1, lambda event: None)
    given = ["prune", str(tmp_path / "out"), str(tmp_path / "a.jsonl")]
    if look == 1:
        assert data.main(given) == 0
        return
    with pytest.raises(SystemExit):
        data.main(given)
    assert "1 whose pictures the model did not all see" in capsys.readouterr().err


def test_a_story_is_told_by_a_model(drawn):
    made = open_source(drawn / "trajectories.jsonl")[2]
    vlm = Vlm("one\n\n two\nthree\nfour\nend\n", "one\ntwo")
    told = narrate(vlm, made, [], Options(max_tokens=64))
    assert told == ["one", "two", "three", "four", "end"]
    asked = vlm.sessions[0][0][0][0].text
    assert made.steps[1].action.line() in asked and made.steps[1].reasoning not in asked
    with pytest.raises(ValueError, match="a line each and one for the end, got 2"):
        narrate(vlm, made, [], Options(max_tokens=64))


def test_a_story_has_room_for_all_its_narratives_and_is_not_learnt_when_cut(drawn):
    made = open_source(drawn / "trajectories.jsonl")[2]
    vlm = Vlm("one\ntwo\nthree\nfour\nthe e", tokens=50)
    assert narrate(vlm, made, [], Options(max_tokens=10))[-1] == "the e"
    vlm = Vlm("one\ntwo\nthree\nfour\nthe e", "is it red? is it", tokens=51)
    with pytest.raises(ValueError, match="was cut after 50 tokens: 'one"):
        narrate(vlm, made, [], Options(max_tokens=10))
    with pytest.raises(ValueError, match="was cut after 50 tokens: 'is it red"):
        verify(vlm, made, [], Options(max_tokens=50))


def test_a_model_verifies_every_picture(drawn):
    """A new picture is shown alone, an edited one behind what it was made from."""
    made = open_source(drawn / "trajectories.jsonl")[2]
    replies = [*("is it?\n\nis it large?", "yes\nno, small"), *("done?", "Yes."), *("x?", "no") * 2]
    vlm = Vlm(*replies)
    blank = [Image.new("L", (8, 8), number) for number in range(4)]
    assert verify(vlm, made, blank, Options(max_tokens=64)) == [False, True, False, False]
    asked = [session[0][0][0] for session in vlm.sessions]
    assert "exactly this" in asked[0].text and made.steps[0].action.prompt in asked[0].text
    assert "nothing else" in asked[2].text and "add a star" in asked[2].text
    shown = [[picture.getpixel((0, 0)) for picture in message.images] for message in asked[1::2]]
    assert shown == [[0], [0, 1], [1, 2], [2, 3]]
    with pytest.raises(ValueError, match="step 1: the checklist is empty"):
        verify(Vlm(" "), made, blank, Options(max_tokens=64))


def test_one_unreadable_answer_costs_one_drawing(drawn, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(models, "vlm", lambda *given: Vlm("one line", "one\ntwo\nthree\nfour\nend"))
    target = tmp_path / "train.jsonl"
    assert data.main(["prune", str(drawn), str(target), "--vlm=x"]) == 0
    told = capsys.readouterr()
    assert "1 the model gave no readable answer about" in told.out
    assert "needs a line each and one for the end, got 1" in told.err
    assert [step.reasoning for step in open_source(target)[0].steps] == [
        "one",
        "two",
        "three",
        "four",
    ]


def test_nothing_left_is_an_error(drawn, tmp_path, capsys):
    with pytest.raises(SystemExit):
        data.main(["prune", str(drawn), str(tmp_path / "x.jsonl"), "--max_steps=1"])
    assert "nothing is left" in capsys.readouterr().err and not (tmp_path / "x.jsonl").exists()


def test_rejected_pictures_are_seen_but_not_learnt(drawn):
    made = open_source(drawn / "trajectories.jsonl")[2]
    short = prune(made, right=[True, False, True, True])
    assert [s.verdict for s in short.steps] == ["accepted", "rejected", "accepted", "accepted"]
    with pytest.raises(ValueError, match="1 verdicts for 4 steps"):
        prune(made, right=[True])
    with (
        pytest.raises(ValueError, match="give --vlm too"),
        looker(None, True),
    ):
        pass


@pytest.mark.slow
def test_the_teacher_tells_what_it_sees(tmp_path):
    one, two = Thing(0, "circle", "red", "large"), Thing(5, "star", "blue", "large")
    shown = rendered([Picture(Scene(s).codes(), 7) for s in ((one,), (one, two))], 2)
    steps = (
        Step(reasoning="x", action=Action(kind="generate", prompt="a red circle"), image="1.png"),
        Step(
            reasoning="y",
            action=Action(kind="edit", prompt="add a blue ring", references=(1,)),
            image="2.png",
        ),
    )
    for number, picture in enumerate(shown, 1):
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
    goal = "a red circle and a blue star"  # where the last step asked for a ring
    made = Trajectory(id="x", goal=goal, steps=steps, closing="z", outcome="stopped")
    (tmp_path / "trajectories.jsonl").write_text(json.dumps(made.record()) + "\n")
    target = tmp_path / "told.jsonl"
    assert data.main(["prune", str(tmp_path), str(target), "--vlm=teacher", "--verify"]) == 0
    told = open_source(target)[0]
    assert [step.verdict for step in told.steps] == ["accepted", "rejected"]
    assert "red circle" in told.steps[1].reasoning and len(told.closing) > 10
    assert [step.action for step in told.steps] == [step.action for step in steps]
