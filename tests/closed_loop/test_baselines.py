"""What the loop is compared with: what each draws, asks and spends."""

import numpy as np
import pytest

from clvr_jax.backends import requests
from clvr_jax.backends.images import NotFinite
from clvr_jax.backends.protocol import InvalidRequest, Options, Overloaded
from clvr_jax.closed_loop import Budget, Loop, Task
from clvr_jax.closed_loop.baselines import BestOf, Rewrite, Single
from clvr_jax.closed_loop.events import Drew, Ended, Retried
from clvr_jax.data.conditioning import Policy
from clvr_jax.data.trajectory import Trajectory
from tests.closed_loop.scripted import GENERATE, STOP, Images, Vlm

TASK = Task("one", "a red circle", 7)


def level(picture):
    return int(np.asarray(picture)[0, 0, 0])


def test_a_single_picture_is_of_the_prompt():
    images, events = Images(), []
    made = Single(images).run(TASK, events.append)
    assert [(order.text, order.references) for order in images.orders] == [("a red circle", ())]
    assert (made.error, made.evaluations, made.tokens, level(made.answer)) == (None, 4, 0, 1)
    assert Trajectory.model_validate(made.trajectory.record()) == made.trajectory
    assert made.trajectory.metadata["mode"] == "single"
    assert [type(event) for event in events] == [Drew, Ended]


def test_all_begin_from_the_same_noise():
    """Differences between the modes are not differences between draws."""
    seeds = []
    for make in (
        lambda images: Single(images),
        lambda images: BestOf(images, Vlm("A: it", "A: it"), 3),
        lambda images: Rewrite(images, Vlm("a red circle in the middle")),
        lambda images: Loop(Vlm(GENERATE, STOP), images, Policy(text="instruction"), Budget()),
    ):
        images = Images()
        make(images).run(TASK)
        seeds.append([order.seed for order in images.orders])
    assert len({row[0] for row in seeds}) == 1 and len(set(seeds[1])) == 3


@pytest.mark.parametrize(
    "said, best", [(("A: x", "A: x"), 1), (("B: x", "tie: x"), 2), (("A: x", "B: x"), 3)]
)
def test_the_best_is_chosen_by_the_model(said, best):
    vlm, images = Vlm(*said), Images()
    made = BestOf(images, vlm, 3).run(TASK)
    assert level(made.answer) == best == made.trajectory.final
    assert (made.evaluations, made.tokens, len(vlm.sessions)) == (12, 20, 2)
    asked = [session[0][0][0] for session in vlm.sessions]
    assert all(requests.CHOOSE.match(message.text) == {"goal": TASK.goal} for message in asked)
    shown = [[level(picture) for picture in message.images] for message in asked]
    assert shown == [[1, 2], [2 if said[0][0] == "B" else 1, 3]]


def test_a_prompt_is_rewritten_once():
    vlm, images = Vlm("  a small red circle\nin the middle "), Images()
    made = Rewrite(images, vlm).run(TASK)
    assert images.orders[0].text == "a small red circle in the middle"
    assert requests.REWRITE.match(vlm.sessions[0][0][0][0].text) == {"goal": TASK.goal}
    assert made.trajectory.goal == TASK.goal and made.tokens == 10


def test_a_rewritten_prompt_that_was_cut_is_not_drawn():
    vlm, images = Vlm(*["a small red cir"] * 4, tokens=11), Images()
    made = Rewrite(images, vlm, Options(max_tokens=10)).run(TASK)
    assert not images.orders and made.tokens == 40
    assert made.error == "ValueError: the answer was cut after 10 tokens: 'a small red cir'"
    vlm = Vlm("B: the first has a bl", tokens=11)
    assert BestOf(Images(), vlm, 2, Options(max_tokens=10)).run(TASK).trajectory.final == 2


def test_goals_that_no_record_can_hold_are_told_before_anything_is_drawn():
    images = Images()
    made = Single(images).run(Task("one", "a <think>"))
    assert made.trajectory is None and "control token" in made.error and not images.orders


def test_what_fails_is_tried_again():
    events = []
    vlm = Vlm(Overloaded("busy"), "neither", "B: x")
    images = Images(None, NotFinite("no numbers"))
    made = BestOf(images, vlm, 2).run(TASK, events.append)
    assert made.error is None and made.trajectory.final == 2 and len(made.pictures) == 2
    whys = [event.why[:10] for event in events if isinstance(event, Retried)]
    assert whys == ["NotFinite:", "Overloaded", "ValueError"]
    assert made.evaluations == 12, "the picture of no numbers was computed too"
    options = [session[0][1] for session in vlm.sessions]
    assert len({option.seed for option in options}) == 3
    assert [option.temperature for option in options] == [0.0, 0.7, 0.7]


def test_what_keeps_failing_keeps_what_was_drawn():
    made = BestOf(Images(), Vlm(*["neither"] * 9), 2).run(TASK)
    assert made.error.startswith("ValueError: a choice begins with") and len(made.pictures) == 2
    assert made.trajectory.outcome == "failed" and made.answer is not None
    refused = Rewrite(Images(), Vlm(InvalidRequest("too long"), "a star")).run(TASK)
    assert refused.error == "InvalidRequest: too long" and refused.trajectory is None


def test_what_fails_at_the_limit_of_evaluations_is_left_out():
    """Equal evaluations are equal, whatever became of the pictures."""
    broken = NotFinite("no numbers")
    events, images = [], Images(None, broken)
    made = BestOf(images, Vlm("B: x"), 3, evaluations=12).run(TASK, events.append)
    assert made.error is None and made.evaluations == 12 and len(images.orders) == 3
    assert [step.image for step in made.trajectory.steps] == ["1.png", "2.png"]
    assert made.trajectory.final == 2 and not any(isinstance(e, Retried) for e in events)
    assert made.trajectory.metadata["left_out"] == ["NotFinite: no numbers"]
    spare = BestOf(Images(None, broken), Vlm("A: x", "A: x"), 3, evaluations=16).run(TASK)
    assert spare.evaluations == 16 and len(spare.pictures) == 3
    often = BestOf(Images(*[broken] * 5), Vlm(), 2).run(TASK)
    assert often.error is None and len(often.pictures) == 1 and often.evaluations == 24
    alone = Single(Images(broken), evaluations=4).run(TASK)
    assert (alone.error, alone.evaluations) == ("NotFinite: no numbers", 4)
    none = BestOf(Images(broken, broken), Vlm(), 2, evaluations=8).run(TASK)
    assert (none.error, none.evaluations, none.pictures) == ("NotFinite: no numbers", 8, ())
