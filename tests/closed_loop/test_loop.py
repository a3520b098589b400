"""The loop: what it asks, draws, spends and returns, whatever its models do."""

import dataclasses

import numpy as np
import pytest

from clvr_jax.backends.images import NotFinite
from clvr_jax.backends.protocol import (
    InvalidRequest,
    Options,
    Overloaded,
    Reply,
    TooLong,
    Usage,
    user,
)
from clvr_jax.closed_loop import Budget, Loop, Task
from clvr_jax.closed_loop.events import Acted, Drew, Ended, Retried, Said
from clvr_jax.closed_loop.loop import HIDDEN
from clvr_jax.closed_loop.result import answer_within, spent_within
from clvr_jax.closed_loop.turn import HEAT
from clvr_jax.data.conditioning import Policy
from clvr_jax.data.trajectory import Trajectory
from tests.closed_loop.scripted import GENERATE, STOP, Images, Vlm, edit

TASK = Task("one", "a red circle and a star", 7)
CHOSEN = Policy(text="instruction", references="chosen")


def loop(vlm, images=None, budget=None, **fields):
    images, budget = images or Images(), budget or Budget()
    return Loop(vlm, images, fields.pop("policy", CHOSEN), budget, pause=0.0, **fields)


def level(picture):
    return int(np.asarray(picture)[0, 0, 0])


def test_it_draws_looks_edits_and_stops():
    vlm, images, events = Vlm(GENERATE, edit(1), STOP), Images(), []
    made = loop(vlm, images, system="draw").run(TASK, events.append)
    t = made.trajectory
    assert made.error is None and t.outcome == "stopped" and t.closing == "All is right."
    assert [step.verdict for step in t.steps] == ["accepted", "accepted"]
    assert t.steps[0].critique == "Something is missing."
    assert t.final == 2 and level(made.answer) == 2
    assert (made.evaluations, made.tokens) == (8, 30)
    assert [order.text for order in images.orders] == ["a red circle", "add a star"]
    assert [len(order.references) for order in images.orders] == [0, 1]
    assert level(images.orders[1].references[0]) == 1
    told = [[message.role for message in messages] for messages, _ in vlm.sessions[0]]
    assert told == [["system", "user"], ["user"], ["user"]], "only what is new is said"
    assert level(vlm.sessions[0][2][0][0].images[0]) == 2
    kinds = [type(event) for event in events]
    assert kinds == [Said, Acted, Drew, Said, Acted, Drew, Said, Acted, Ended]
    again = Trajectory.model_validate(t.record())
    assert again == t, "what the loop writes is what training reads"
    assert [message.role for message in t.messages()][:3] == ["system", "user", "assistant"]
    assert t.steps[1].metadata["given"] == [1] and t.steps[1].metadata["tokens"] == 10


def test_conditions_are_made_by_the_policy_of_the_weights():
    vlm = Vlm(GENERATE, edit(1, "add a star to <IMG_GEN_1>"), STOP)
    images = Images(longest=1000)
    loop(vlm, images, policy=Policy()).run(TASK)
    assert images.orders[1].text == (
        "a red circle and a star\n\nI begin.\nimage 1\n\nSomething is missing."
    )


def test_seeds_depend_on_the_task_alone():
    seeds = []
    for vlm in (Vlm(GENERATE, edit(1), STOP), Vlm(GENERATE, edit(1), STOP)):
        images = Images()
        loop(vlm, images).run(TASK)
        seeds.append([order.seed for order in images.orders] + [o.seed for _, o in vlm.sessions[0]])
    assert seeds[0] == seeds[1] and len(set(seeds[0])) == 5
    images = Images()
    loop(Vlm(GENERATE, STOP), images).run(Task("one", TASK.goal, 8))
    assert images.orders[0].seed != seeds[0][0]


def test_the_answer_is_the_last_picture_that_was_accepted():
    """Going back to a picture accepts it; a picture that nothing is done with is rejected."""
    budget = Budget(generations=3)
    script = (GENERATE, edit(1), edit(1, "add a blue star"), edit(1, "remove the star"))
    made = loop(Vlm(*script), budget=budget).run(TASK)
    t = made.trajectory
    assert t.outcome == "generations" and len(t.steps) == 3 and not t.closing
    assert [step.verdict for step in t.steps] == ["accepted", "rejected", "rejected"]
    assert t.final == 1 and level(made.answer) == 1
    assert t.metadata["unfinished"]["action"]["prompt"] == "remove the star"
    onward = loop(Vlm(*script[:3], edit(3)), budget=budget).run(TASK).trajectory
    assert onward.final == 3, "the last picture would have been gone on from"
    anew = loop(Vlm(GENERATE, GENERATE), budget=Budget(generations=1)).run(TASK).trajectory
    assert anew.final == 1 and anew.steps[0].verdict == "rejected", "there is no other"


@pytest.mark.parametrize(
    "budget, outcome, pictures",
    [
        (Budget(generations=2), "generations", 2),
        (Budget(evaluations=11), "evaluations", 2),
        (Budget(evaluations=12), "evaluations", 3),
        (Budget(tokens=20), "tokens", 2),
        (Budget(tokens=25), "tokens", 2),
    ],
)
def test_budgets_hold_exactly(budget, outcome, pictures):
    script = [GENERATE, *[edit(1)] * 9]
    images = Images()
    made = loop(Vlm(*script), images, budget).run(TASK)
    assert made.trajectory.outcome == outcome
    assert len(made.pictures) == len(images.orders) == pictures
    for name in ("evaluations", "tokens"):
        limit = getattr(budget, name)
        assert limit is None or getattr(made, name) <= limit


def test_a_turn_is_cut_when_its_seconds_are_over():
    vlm = Vlm(GENERATE, 30.0, STOP)
    made = loop(vlm, budget=Budget(seconds=0.3)).run(TASK)
    assert made.trajectory.outcome == "seconds" and 0.3 <= made.seconds < 5
    assert made.tokens == 13, "what it had written was paid for"
    assert made.trajectory.metadata["unfinished"]["think_s"] > 0.1


def test_waiting_for_a_failing_model_ends_with_the_budget():
    vlm = Vlm(GENERATE, *[Overloaded("busy")] * 9)
    made = dataclasses.replace(loop(vlm, budget=Budget(seconds=0.2)), pause=0.15).run(TASK)
    assert made.trajectory.outcome == "seconds" and made.seconds < 1


def test_a_conversation_that_fills_the_context_has_come_to_an_end():
    """Not to a failure, which would be drawn again, and fill it again."""
    made = loop(Vlm(GENERATE, TooLong("too long"))).run(TASK)
    assert made.trajectory.outcome == "context" and made.error is None and made.answer
    full = Reply("I see", "length", Usage(95, 0, 5))
    vlm = Vlm(GENERATE, *[full] * 4)
    vlm.context = 100
    assert loop(vlm).run(TASK).trajectory.outcome == "context"
    vlm = Vlm(GENERATE, full, STOP)
    vlm.context = 100
    assert loop(vlm).run(TASK).trajectory.outcome == "stopped", "another turn may fit"
    first = loop(Vlm(TooLong("too long"))).run(TASK)
    assert first.trajectory is None and "context" in first.error


def test_a_budget_that_ends_before_the_first_picture_says_so():
    made = loop(Vlm(GENERATE), budget=Budget(evaluations=3)).run(TASK)
    assert made.trajectory is None and "evaluations" in made.error


@pytest.mark.parametrize("goal", ["", "  ", "a <think>", "as <IMG_GEN_1>"])
def test_goals_that_no_record_can_hold_are_told_before_anything_is_drawn(goal):
    images = Images()
    made = loop(Vlm(GENERATE, STOP), images).run(Task("one", goal))
    assert made.trajectory is None and "the prompt" in made.error and not images.orders


def test_no_picture_is_begun_that_would_not_be_done_in_time():
    images = Images(seconds=0.4)
    made = loop(Vlm(GENERATE, edit(1), STOP), images, Budget(seconds=0.6)).run(TASK)
    assert made.trajectory.outcome == "seconds" and len(images.orders) == 1
    assert made.seconds < 0.6


def test_one_run_tells_of_all_smaller_budgets():
    script = [GENERATE, edit(1), edit(1), edit(3), GENERATE, edit(3), edit(6), STOP]
    whole = loop(Vlm(*script)).run(TASK).trajectory
    assert len(whole.steps) == 7 and whole.outcome == "stopped"
    answers = []
    for pictures in range(1, 9):
        made = loop(Vlm(*script), budget=Budget(generations=pictures)).run(TASK)
        answers.append(made.trajectory.final)
        assert answer_within(whole, pictures) == answers[-1]
        spent = spent_within(whole, pictures)
        assert (spent["evaluations"], spent["tokens"]) == (made.evaluations, made.tokens)
    assert answers == [1, 1, 3, 3, 3, 6, 7, 7]


@pytest.mark.parametrize("look, seen", [(1, [True, True, True]), (2, [False, True, False])])
def test_the_model_looks_as_often_as_it_is_told(look, seen):
    vlm = Vlm(GENERATE, edit(1), edit(2), STOP)
    made = loop(vlm, budget=Budget(look=look)).run(TASK)
    shown = [bool(messages[0].images) for messages, _ in vlm.sessions[0][1:]]
    steps = made.trajectory.steps
    assert shown == seen == [step.metadata["shown"] for step in steps]
    assert seen == [step.critique is not None for step in steps], "said of what it saw"
    assert seen == [step.verdict is not None for step in steps]


def test_without_looking_it_is_a_plan():
    vlm = Vlm(GENERATE, edit(1), STOP)
    loop(vlm, budget=Budget(look=0)).run(TASK)
    assert [messages for messages, _ in vlm.sessions[0][1:]] == [(user(HIDDEN),)] * 2


def test_broken_answers_are_asked_again():
    events = []
    vlm = Vlm("A circle.", GENERATE, edit(4), edit(1, "add " * 30), edit(1), STOP)
    made = loop(vlm).run(TASK, events.append)
    assert made.trajectory.outcome == "stopped" and len(made.pictures) == 2
    whys = [event.why for event in events if isinstance(event, Retried)]
    assert [why[:18] for why in whys] == [
        "there is no action",
        "image 4 does not e",
        "the text takes 119",
    ]
    assert made.trajectory.steps[1].metadata["retries"] == whys[1:]
    assert made.tokens == 60, "what is thrown away was paid for"
    again = vlm.sessions[0][1][0]
    assert len(again) == 1 and "there is no action" in again[0].text


def test_models_that_fail_are_asked_again():
    failing = Vlm(Overloaded("busy"), GENERATE, RuntimeError("lost"), STOP)
    images = Images(NotFinite("no numbers"), RuntimeError("broken"))
    made = loop(failing, images).run(TASK)
    assert made.trajectory.outcome == "stopped" and made.error is None
    assert made.trajectory.steps[0].metadata["retries"] == [
        "Overloaded: busy",
        "NotFinite: no numbers",
        "RuntimeError: broken",
    ]
    assert len({order.seed for order in images.orders}) == 3, "another noise each time"
    assert made.evaluations == 8, "the picture of no numbers was computed too"
    assert made.trajectory.steps[0].metadata["evaluations"] == 8
    closing = made.trajectory.metadata["closing"]
    assert closing["retries"] == ["RuntimeError: lost"] and closing["tokens"] == 10


def test_no_budget_for_another_try_is_a_budget_that_is_used_up():
    images = Images(None, NotFinite("no numbers"))
    made = loop(Vlm(GENERATE, edit(1), STOP), images, Budget(evaluations=8)).run(TASK)
    assert made.trajectory.outcome == "evaluations" and made.error is None
    assert made.trajectory.metadata["unfinished"]["retries"] == ["NotFinite: no numbers"]
    assert spent_within(made.trajectory, 8)["evaluations"] == made.evaluations == 8
    assert spent_within(made.trajectory, 1)["evaluations"] == 4


def test_what_keeps_failing_loses_nothing_that_was_drawn():
    events = []
    made = loop(Vlm(GENERATE, *["no"] * 9), retries=2).run(TASK, events.append)
    assert made.trajectory.outcome == "failed" and len(made.pictures) == 1
    assert made.error.startswith("Failed: step 2 failed 3 times")
    assert made.trajectory.metadata["error"] == made.error
    assert isinstance(events[-1], Ended)
    first = loop(Vlm(*["no"] * 9), retries=1).run(TASK)
    assert first.trajectory is None and first.answer is None and "step 1 failed" in first.error


def test_a_request_that_can_never_be_answered_is_not_repeated():
    vlm = Vlm(GENERATE, InvalidRequest("too long"))
    made = loop(vlm).run(TASK)
    assert made.error == "InvalidRequest: too long" and len(vlm.sessions[0]) == 2


def test_turns_longer_than_they_may_be_are_asked_again():
    vlm = Vlm(GENERATE, GENERATE, tokens=9)
    made = loop(vlm, retries=1, options=Options(max_tokens=8)).run(TASK)
    assert "longer than 8 tokens" in made.error and made.tokens == 16


def test_a_turn_without_an_end_is_taken_back_and_asked_anew_by_chance():
    """Kept, it would lead the next ones astray; asked greedily, it would come again."""
    vlm = Vlm(GENERATE, Reply("I see. I see.", "length", Usage(20, 0, 50)), edit(1), STOP)
    made = loop(vlm, options=Options(max_tokens=50)).run(TASK)
    first, second, back, anew, last = vlm.sessions[0]
    assert made.trajectory.outcome == "stopped" and made.tokens == 80
    assert made.trajectory.steps[1].metadata["retries"] == ["it was longer than 50 tokens"]
    assert back == "taken back" and anew[0] == second[0], "the same picture, and nothing else"
    heats = [options.temperature for _, options in (first, second, anew, last)]
    assert heats == [0.0, 0.0, HEAT, 0.0] and second[1].seed != anew[1].seed


def test_a_grammar_is_asked_for_where_it_is_wanted():
    vlm = Vlm(GENERATE, STOP)
    loop(vlm, constrain=True).run(TASK)
    first, second = (options.grammar for _, options in vlm.sessions[0])
    assert "references" not in first and "references" in second


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(generations=0), "generations is 0; it must be above 0"),
        (dict(seconds=0.0), "seconds is 0.0"),
        (dict(look=-1), "look is -1"),
    ],
)
def test_budgets_that_allow_nothing_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        Budget(**fields)
