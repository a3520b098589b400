"""The scripted teacher in the loop: it plans, looks, corrects one thing at a time, and stops."""

import re

import numpy as np
import pytest
from PIL import Image

from clvr_jax.backends import requests
from clvr_jax.backends.protocol import (
    Closed,
    InvalidRequest,
    Options,
    Pending,
    Session,
    Vlm,
    assistant,
    system,
    user,
)
from clvr_jax.data.conditioning import Policy as Conditioning
from clvr_jax.data.conditioning import condition
from clvr_jax.data.trajectory import Step, Trajectory
from clvr_jax.data.turns import Action, parse
from clvr_jax.miniature import detect, edits, phrases, prompts, render
from clvr_jax.miniature.goal import Goal, Group
from clvr_jax.miniature.held_out import Split
from clvr_jax.miniature.orders import by_place
from clvr_jax.miniature.painter import Painter
from clvr_jax.miniature.parse import parse_edit, parse_prompt
from clvr_jax.miniature.readings import read
from clvr_jax.miniature.scene import CELLS, Scene, Thing
from clvr_jax.miniature.teacher import Policy, Teacher, language
from clvr_jax.miniature.teacher.changes import changes
from clvr_jax.miniature.teacher.sight import Sight, see
from tests.miniature.perfect import glance, picture

POLICY = Policy()
MOST = 8  # generations
INSTRUCTION = Conditioning(text="instruction", references="chosen")


def opened(text: str) -> list:
    return [system(requests.CONTROL), user(text)]


def run(text: str, painter: Painter, policy: Policy = POLICY, seed: int = 0):
    """Return the trajectory and its scenes."""
    session, said, steps, scenes = Teacher(seed, policy, glance).start(), opened(text), [], []
    while True:
        turn = parse(session.ask(said).text, len(scenes) + 1)
        if turn.stop or len(scenes) == MOST:
            outcome = "stopped" if turn.stop else "generations"
            closing = turn.reasoning if turn.stop else ""
            trajectory = Trajectory(
                id="1", goal=text, steps=steps, closing=closing, outcome=outcome
            )
            return trajectory, scenes
        scenes.append(painter.draw(turn.action, scenes))
        steps.append(Step(reasoning=turn.reasoning, action=turn.action, image=f"{len(scenes)}.png"))
        said = [user(picture(scenes[-1]))]


def some_prompts(count: int, seed: int = 0) -> list[prompts.Prompt]:
    rng = np.random.default_rng(seed)
    kinds = [prompts.KINDS[i % len(prompts.KINDS)] for i in range(count)]
    return [prompts.sample(rng, kind)[0] for kind in kinds]


def check_exact(count: int, stepwise: float, seed: int) -> None:
    """A painter that does what it is told satisfies every goal, one change at a time."""
    policy = Policy(stepwise=stepwise)
    for number, prompt in enumerate(some_prompts(count, seed)):
        painter = Painter(np.random.default_rng(number))
        trajectory, scenes = run(prompt.text, painter, policy, seed)
        assert trajectory.outcome == "stopped" and prompt.goal.holds(scenes[-1]), prompt
        for index, step in enumerate(trajectory.steps):
            text = condition(trajectory, index, INSTRUCTION).text
            if step.action.kind == "generate":
                assert parse_prompt(text).holds(scenes[index])
                continue
            assert text == by_place(step.action)
            *sources, before = (scenes[n - 1] for n in step.action.references)
            assert parse_edit(text).satisfied(before, scenes[index], *sources)
            assert len(set(before.things) ^ set(scenes[index].things)) <= 2, "one thing"
        if not stepwise:
            assert len(scenes) == 1


def test_every_goal_is_reached_by_single_changes():
    check_exact(12, 0.0, seed=1)
    check_exact(12, 1.0, seed=2)


@pytest.mark.slow
def test_every_goal_is_reached_by_single_changes_in_many_cases():
    check_exact(600, 1.0, seed=3)


def check_fallible(count: int, mistakes: float) -> float:
    good = 0
    for number, prompt in enumerate(some_prompts(count, seed=3)):
        painter = Painter(np.random.default_rng(number), mistakes)
        trajectory, scenes = run(prompt.text, painter, seed=number)
        assert (trajectory.outcome == "stopped") == prompt.goal.holds(scenes[-1])
        good += trajectory.outcome == "stopped"
    return good / count


def test_mistakes_are_corrected():
    assert check_fallible(16, 0.3) > 0.9


@pytest.mark.slow
def test_mistakes_are_corrected_in_many_cases():
    assert check_fallible(600, 0.3) > 0.98


def test_prompts_with_held_out_combinations_are_reached_too():
    rng = np.random.default_rng(4)
    for number in range(8):
        prompt, _ = prompts.sample(rng, None, Split.HELD_OUT)
        _, scenes = run(prompt.text, Painter(rng), Policy(stepwise=1.0), number)
        assert prompt.goal.holds(scenes[-1])


def test_it_is_the_protocol_and_depends_on_the_conversation_alone():
    teacher = Teacher(0, POLICY, glance)
    session = teacher.start()
    assert isinstance(teacher, Vlm) and isinstance(session, Session)
    heard = []
    pending = session.submit(opened("a star and two red rings"), on_text=heard.append)
    assert isinstance(pending, Pending)
    first = pending.result().text
    assert heard == [first]
    shown = user(picture(Scene((Thing(3, "star", "red", "small"),))))
    second = session.ask([shown]).text
    again = teacher.start().ask([*opened("a star and two red rings"), assistant(first), shown])
    assert again.text == second
    others = {Teacher(s, POLICY, glance).start().ask([*opened("a star")]).text for s in range(9)}
    hot = [Options(temperature=1.0, seed=s) for s in range(9)]
    sampled = {teacher.start().ask(opened("a star"), options).text for options in hot}
    assert len(others) > 2 and len(sampled) > 2


def test_a_turn_taken_back_has_never_been():
    session = Teacher(0, POLICY, glance).start()
    with pytest.raises(InvalidRequest, match="no turn to take back"):
        session.take_back()
    session.ask(opened("a star and two red rings"))
    shown = user(picture(Scene((Thing(3, "star", "red", "small"),))))
    told = session.ask([shown]).text
    session.take_back()
    with pytest.raises(InvalidRequest, match="no turn to take back"):
        session.take_back()
    assert session.ask([shown]).text == told


def test_options_cut_a_turn():
    ask = lambda **options: (
        Teacher(0, POLICY, glance).start().ask(opened("a star"), Options(**options))
    )
    whole = ask()
    assert whole.finish == "stop" and whole.usage.completion == len(whole.text.split())
    short = ask(max_tokens=3)
    assert short.finish == "length" and short.text == " ".join(whole.text.split()[:3])
    assert ask(stop=("{",)).text == whole.text.partition("{")[0]


def test_what_cannot_be_answered_is_refused():
    teacher = Teacher(0, POLICY, glance)
    session = teacher.start()
    for messages, said in (
        ([], "no messages"),
        ([user("hello")], "no such request"),
        ([system(requests.CONTROL)], "no such request"),
        (opened("a green horse"), "horse"),
        (opened("a star above a ring. the star is below the ring"), "all of this at once"),
        (opened("a red star above a star"), "no words tell"),
        ([*opened("a star"), assistant("x"), user(Image.new("RGB", (8, 9)))], "8x9"),
        ([requests.CAPTION.message()], "1 pictures, 0"),
    ):
        with pytest.raises(InvalidRequest, match=said):
            session.ask(messages)
    assert session.ask(opened("a star")).text, "a refused turn leaves the session as it was"
    with pytest.raises(InvalidRequest):
        session.score([], ["yes"])
    teacher.close()
    with pytest.raises(Closed):
        session.ask([user("hello")])
    with pytest.raises(Closed):
        teacher.start()


RED, BLUE = Thing(0, "star", "red", "small"), Thing(15, "ring", "blue", "small")


def after(goal: str, *scenes: Scene, policy: Policy = POLICY, seed: int = 0):
    """Return the turn after some pictures of a trajectory."""
    said = opened(goal)
    for number, scene in enumerate(scenes, 1):
        said += [assistant(f"<IMG_GEN_{number}>"), user(picture(scene))]
    text = Teacher(seed, policy, glance).start().ask(said).text
    return parse(text, len(scenes) + 1)


def test_a_prompt_is_asked_for_in_its_own_words_and_gone_through_one_by_one():
    """So that what is said can be checked against the text, word by word."""
    goal = "please draw a tiny red star, two rings and a cross. the star is above the cross"
    turn = after(goal, policy=Policy(stepwise=0.0))
    assert turn.action.prompt == goal
    needed = "a small red star, two rings and a cross. The small red star is above the cross."
    assert needed in turn.reasoning
    ring, cross = BLUE._replace(cell=8), Thing(12, "cross", "black", "large")
    turn = after(goal, Scene((RED, ring, cross)))
    for line in (
        "a1: a small red star at a1, a3: a small blue ring at a3 and a4: a large black cross at a4",
        "A small red star at a1: a small red star, small for small, red for red, star for star, "
        "a1 asked.",
        "Two rings at a3: a small blue ring, ring for ring, a3 asked, at a3: a small blue ring, "
        "ring for ring, used.",
        "A cross at a4: a large black cross, cross for cross, a4 asked. "
        "So a1 asked, a3 asked and a4 asked.",
        "A ring: it is missing. The small red star at a1 is above the cross at a4: a1 above a4.",
    ):
        assert line in turn.reasoning
    right = after(goal, Scene((RED, ring, BLUE, cross)))
    assert right.stop and not re.search(r" no\b", right.reasoning)
    low = after(goal, Scene((RED._replace(cell=13), ring, BLUE, cross._replace(cell=1))))
    told = "The small red star at b4 is above the cross at b1: b4 above b1 no, the red star"
    assert told in low.reasoning
    half = after(goal, Scene((RED, ring, BLUE)))
    assert "A cross: it is missing." in half.reasoning and "above" not in half.reasoning
    other = after("a red star", Scene((ring,)))
    assert (
        "A red star at a3: a small blue ring, blue for red no. So a3 no. "
        "A red star at a3: a small blue ring, blue for red no, ring for star no, the blue ring"
    ) in other.reasoning, "what serves for nothing may become what is needed"
    more = after("a red star", Scene((RED, ring)))
    assert (
        "red for red, star for star, a1 asked. So a1 asked and a3 no. The blue ring"
        in more.reasoning
    ), "what is too much comes last"


def test_what_is_there_stands_beside_what_is_asked_for():
    group = parse_prompt("two small red stars in the top half").groups[0]
    things = [Thing(9, "star", "blue", "small"), Thing(2, "ring", "red", "large")]
    assert language.compared(group, things) == (
        "two small red stars in the top half at b3: a small blue star, small for small, "
        "blue for red no, star for star, b3 for top half no, at c1: a large red ring, "
        "large for small no, red for red, ring for star no, c1 for top half"
    )
    anything = parse_prompt("three things").groups[0]
    assert language.compared(anything, things[:1]) == (
        "three things at b3: a small blue star, two are missing"
    )
    assert language.compared(anything, []) == "three things: three are missing"


def test_what_is_overlooked_is_found_among_what_is_left_over():
    """Lessons have it: who errs once has to know how to go on."""
    ring = BLUE._replace(cell=8)
    turn = after("a red star and a ring", Scene((RED, ring)), policy=Policy(oversight=1.0))
    told = (
        "A red star at a3: a small blue ring, blue for red no. A ring at a1: a small red star, "
        "star for ring no. So a1 no and a3 no. A red star at a1: a small red star, red for red, "
        "star for star. A ring at a3: a small blue ring, ring for ring."
    )
    assert turn.stop and told in turn.reasoning
    half = after("a red star and a ring", Scene((RED,)), policy=Policy(oversight=1.0))
    assert "star for star. A ring: it is missing." in half.reasoning
    assert parse_edit(half.action.prompt).kind == "add"


def test_what_is_left_for_later_is_the_end_of_the_list():
    goal = "three stars, a ring and a cross. the ring is left of the cross"
    first = after(goal, policy=Policy(stepwise=1.0)).action.prompt
    assert first in ("three stars", "three stars and a ring")
    assert after("five stars", policy=Policy(stepwise=1.0)).action.prompt in (
        "three stars",
        "four stars",
    )


def test_what_the_goal_leaves_open_is_left_open():
    found = []
    for seed in range(12):
        turn = after("a red star and a ring", Scene((RED,)), seed=seed)
        becomes = parse_edit(turn.action.prompt).becomes
        assert (becomes.shape, becomes.colour, becomes.size) == ("ring", None, None)
        found.append(becomes.place)
    assert found.count(None) > len(found) / 2
    placed = after("a red star and a ring in the bottom row", Scene((RED,))).action.prompt
    assert parse_edit(placed).becomes.place is not None


def test_every_change_can_be_read_back():
    """Also beside a thing that only its place tells from its twin."""
    rng, found = np.random.default_rng(8), []
    twins = Scene(tuple(Thing(cell, "circle", "blue", "small") for cell in (5, 10)))
    goal = parse_prompt("a large blue circle and a red triangle left of a small blue circle")
    misplaced = twins.put(Thing(15, "triangle", "red", "small"))
    for _ in range(20):
        found += [*changes(goal, Sight(twins), rng), *changes(goal, Sight(misplaced), rng)]
    placed = {edit.kind for edit in found if edit.becomes.other and edit.becomes.other.place}
    assert placed == {"add", "move"}
    for _ in range(60):
        prompt, _ = prompts.sample(rng)
        spoilt = Painter(rng, 1.0).draw(Action(kind="generate", prompt=prompt.text), [])
        found += changes(prompt.goal, Sight(spoilt), rng)
    assert all(parse_edit(edits.write(edit, rng)) == edit for edit in found)


def test_a_move_is_asked_for_as_its_fault_is_told():
    """So that the place need not be found: "the star should be left of the ring" says it."""
    goal, ring = (
        "a star left of a ring. there is also a cross in the top row",
        BLUE._replace(cell=5),
    )
    star, cross = RED._replace(cell=10), Thing(3, "cross", "black", "large")
    for seed in range(12):
        edit = parse_edit(after(goal, Scene((star, ring, cross)), seed=seed).action.prompt)
        assert (edit.thing.shape, edit.becomes.word) == ("star", "left of")
        assert edit.becomes.other.shape == "ring"
        edit = parse_edit(
            after(goal, Scene((star, ring._replace(cell=8), cross)), seed=seed).action.prompt
        )
        assert (edit.thing.shape, edit.becomes.word) == ("ring", "right of"), (
            "nothing is left of it"
        )
        low = cross._replace(cell=15)
        scene = Scene((star._replace(cell=4), ring, low))
        edit = parse_edit(after(goal, scene, seed=seed).action.prompt)
        assert (edit.thing.shape, edit.becomes.place) == ("cross", "top row")


def test_of_a_picture_that_is_not_clean_nothing_else_is_told():
    untidy = lambda pictures: read(
        glance(pictures).codes, np.ones((1, CELLS), np.float32), np.array([False])
    )
    session = Teacher(0, POLICY, untidy).start()
    shown = user(picture(Scene((RED, BLUE._replace(shape="cross")))))
    told = session.ask([*opened("a star and a ring"), assistant("x"), shown]).text
    assert "d4: a small blue cross at d4 and more. " in told
    rest = told.split("So a1 asked, d4 no and more no. ")[1]
    assert re.fullmatch(r"The picture is (not clean|a mess)\. [^.]*\.", rest.split("\n")[0])
    assert parse(told, 2).action.kind == "generate"


def test_a_worse_picture_is_left_for_an_earlier_one():
    turn = after("a red star and a blue ring", Scene((RED,)), Scene((BLUE._replace(colour="red"),)))
    assert turn.action.references == (1,) and "<IMG_GEN_1>" in turn.reasoning


def test_what_an_earlier_picture_has_is_brought_from_there():
    scenes = Scene((BLUE, RED._replace(shape="ring", colour="black"))), Scene((RED,))
    turn = after("a red star and a blue ring", *scenes, policy=Policy(bring=1.0))
    assert turn.action.references == (1, 2)
    assert {"<IMG_GEN_1>", "<IMG_GEN_2>"} <= set(re.findall(r"<\w+>", turn.action.prompt))
    assert parse_edit(by_place(turn.action)).kind == "bring"


def test_a_hopeless_picture_is_drawn_anew():
    black = Scene(tuple(Thing(cell, "cross", "black", "large") for cell in range(5)))
    assert after("five small red stars", black).action.kind == "generate"


def test_an_edit_that_is_in_vain_too_often_makes_it_draw_anew():
    scenes = [Scene((RED,))] + 3 * [Scene()]
    assert after("a red star and a blue ring", *scenes[:3]).action.kind == "edit"
    assert after("a red star and a blue ring", *scenes).action.kind == "generate"


def test_pictures_as_bad_as_one_another_are_in_vain_too():
    wrong = [Scene((RED._replace(colour="black"), BLUE)), Scene((RED, BLUE._replace(size="large")))]
    goal = "a small red star and a small blue ring"
    assert after(goal, *wrong, *wrong[:1]).action.kind == "edit"
    assert after(goal, *wrong, *wrong).action.kind == "generate"


def test_what_did_not_help_is_not_asked_for_again_at_once():
    goal, stuck = "a red star, a blue ring and a black cross", Scene((RED,))
    first, then = (after(goal, *times * [stuck]).action for times in (1, 2))
    assert parse_edit(first.prompt).becomes.shape != parse_edit(then.prompt).becomes.shape


def unsure(scene: Scene, *cells: int, tidy: bool = True) -> Sight:
    confidence = np.ones((1, CELLS), np.float32)
    confidence[0, list(cells)] = 0.2
    return see(read(scene.codes()[None], confidence, np.array([tidy])))


def test_unclear_pictures_are_not_right():
    goal, scene = Goal((Group(1, "star"),)), Scene((RED,))
    assert unsure(scene).shows(goal) and unsure(scene).badness(goal) == 0
    unclear, untidy = unsure(scene, 0), unsure(scene, tidy=False)
    assert unclear.tidy and unclear.unclear == (0,) and not unclear.shows(goal)
    assert not untidy.tidy and not untidy.shows(goal)
    crowd = np.full((1, CELLS), RED.code)
    assert not see(read(crowd, np.ones((1, CELLS)), np.array([True]))).tidy


def test_an_unclear_thing_is_removed():
    blurred = lambda pictures: read(
        glance(pictures).codes, np.where(np.arange(CELLS) == 0, 0.1, 1.0)[None], np.array([True])
    )
    session = Teacher(0, POLICY, blurred).start()
    shown = user(picture(Scene((RED, BLUE))))
    turn = parse(session.ask([*opened("a star and a ring"), assistant("x"), shown]).text, 2)
    assert parse_edit(turn.action.prompt).kind == "remove"


@pytest.mark.slow
def test_it_works_with_a_detector_on_rendered_pictures():
    session = Teacher(0, Policy(stepwise=1.0), detect.detect).start()
    painter, said, scenes = Painter(np.random.default_rng(0)), opened("four stars"), []
    while (turn := parse(session.ask(said).text, len(scenes) + 1)).action:
        scenes.append(painter.draw(turn.action, scenes))
        pixels = render.render(scenes[-1].codes()[None], render.keys(np.array([len(scenes)])))
        said = [user(Image.fromarray(np.asarray(pixels[0])))]
    assert Goal((Group(4, "star"),)).holds(scenes[-1])


def test_the_language_is_small_and_the_turns_are_short():
    words, lengths = set(), []
    for number, prompt in enumerate(some_prompts(12, seed=5)):
        painter = Painter(np.random.default_rng(number), 0.5)
        trajectory, _ = run(prompt.text, painter, seed=number)
        narratives = [*(step.reasoning for step in trajectory.steps), trajectory.closing]
        lengths += [len(text.split()) for text in narratives if text]
        words |= set(re.findall(r"[a-z]+", " ".join(narratives).lower()))
    assert len(words - phrases.VOCABULARY) <= 100
    # of each of eight things: what is seen, what is needed, and what is there, point by point; what
    # is not found is gone through twice
    assert 10 <= np.median(lengths) <= 90 and max(lengths) <= 340
