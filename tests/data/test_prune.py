"""Pruned trajectories: what stays, how it is numbered, and what is said of it."""

import pytest

from clvr_jax.data.prune import needed, prune
from clvr_jax.data.trajectory import Step, Trajectory
from clvr_jax.data.turns import Action


def step(number, references=(), reasoning="so", **fields):
    kind = "edit" if references else "generate"
    of = " and ".join(f"<IMG_GEN_{n}>" for n in references)
    action = Action(kind=kind, prompt=f"draw {number} {of}".strip(), references=references)
    return Step(reasoning=reasoning, action=action, image=f"{number}.png", **fields)


def trajectory(**fields):
    steps = (
        step(1),
        step(2, (1,), verdict="rejected"),
        step(3, reasoning="<IMG_GEN_2> is worse than <IMG_GEN_1>", critique="<IMG_GEN_3> is good"),
        step(4, (1, 3)),
        step(5, (4,)),
    )
    given = dict(id="x", goal="a star", steps=steps, closing="<IMG_GEN_4> is it", outcome="stopped")
    return Trajectory(**given | fields)


def test_only_what_the_answer_was_made_from_stays():
    made = trajectory(final=4)
    assert needed(made) == (1, 3, 4) and needed(trajectory()) == (1, 3, 4, 5)
    kept = prune(made)
    assert [s.image for s in kept.steps] == ["1.png", "3.png", "4.png"]
    assert [s.action.references for s in kept.steps] == [(), (), (1, 2)]
    assert kept.steps[2].action.prompt == "draw 4 <IMG_GEN_1> and <IMG_GEN_2>"
    assert kept.steps[1].reasoning == "an earlier picture is worse than <IMG_GEN_1>"
    assert kept.steps[1].critique == "<IMG_GEN_2> is good"
    assert kept.closing == "<IMG_GEN_3> is it" and kept.final is None
    assert {s.verdict for s in kept.steps} == {"accepted"} and kept.outcome == "stopped"
    assert len(made.steps) == 5, "the given one is as it was"


def test_its_story_can_be_told_anew():
    told = ["first", "second", "third, from <IMG_GEN_2>", "done"]
    kept = prune(trajectory(final=4), told)
    assert [s.reasoning for s in kept.steps] == told[:3] and kept.closing == "done"
    assert all(s.critique is None for s in kept.steps)
    with pytest.raises(ValueError, match="3 narratives for 3 steps"):
        prune(trajectory(final=4), told[:3])
    with pytest.raises(ValueError, match="IMG_GEN_9"):
        prune(trajectory(final=4), ["a", "<IMG_GEN_9>", "c", "d"])


def test_without_actions_nobody_knows():
    made = Trajectory(id="x", goal="y", steps=(Step(reasoning="so", image="1.png"),))
    with pytest.raises(ValueError, match="trajectory x has no actions"):
        needed(made)
