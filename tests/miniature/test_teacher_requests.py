"""What the scripted teacher answers to each request, against the truth."""

import numpy as np
import pytest

from clvr_jax.backends import requests
from clvr_jax.backends.protocol import InvalidRequest, Options, assistant, system, user
from clvr_jax.backends.requests import Proxy, Request
from clvr_jax.data.turns import parse
from clvr_jax.miniature import edits, prompts, scenes
from clvr_jax.miniature.goal import Goal
from clvr_jax.miniature.held_out import Split
from clvr_jax.miniature.painter import Painter
from clvr_jax.miniature.parse import parse_prompt
from clvr_jax.miniature.places import PLACES
from clvr_jax.miniature.scene import Scene, Thing
from clvr_jax.miniature.teacher import Policy, Teacher
from clvr_jax.miniature.teacher.looks import difference, inventory, read_inventory
from tests.miniature.perfect import glance, picture

TEACHER = Teacher(0, Policy(stepwise=1.0), glance)
REQUESTS = {name: value for name, value in vars(requests).items() if isinstance(value, Request)}
FIELDS = {
    "edit": "add a star",
    "goal": "two stars",
    "questions": "is there a star?\nis there a ring?",
    "steps": "a\nb",
}


def ask(request: Request, *shown: Scene, **fields: str) -> str:
    return TEACHER.start().ask([request.message(*map(picture, shown), **fields)]).text


def cases(count: int, seed: int) -> list[tuple[prompts.Prompt, Scene, Scene]]:
    """Prompts with a right picture and one that differs from it by one edit, right or wrong."""
    rng = np.random.default_rng(seed)
    found = []
    for index in range(count):
        prompt, scene = prompts.sample(rng, prompts.KINDS[index % len(prompts.KINDS)])
        kind = edits.KINDS[1 + index % 5]  # there may be no room to add
        found.append((prompt, scene, edits.sample(rng, scene, kind)[2]))
    return found


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_is_known_by_its_text_alone(name):
    text = REQUESTS[name].message(**FIELDS).text
    matches = {other: request.match(text) for other, request in REQUESTS.items()}
    used = {
        field: value for field, value in FIELDS.items() if f"{{{field}}}" in REQUESTS[name].text
    }
    assert {other for other, fields in matches.items() if fields is not None} == {name}
    assert matches[name] == used


def test_a_checklist_is_satisfied_by_right_pictures_and_finds_wrong_ones():
    missed = wrong = 0
    for prompt, right, other in cases(18, 0):
        questions = ask(requests.CHECKLIST, goal=prompt.text)
        verdicts = [
            requests.checks(
                ask(requests.VERIFY, scene, questions=questions), questions.count("\n") + 1
            )
            for scene in (right, other)
        ]
        assert all(verdicts[0]), (prompt, questions)
        if not prompt.goal.holds(other):
            wrong += 1
            missed += all(verdicts[1])
        else:
            assert all(verdicts[1]), (prompt, questions)
    assert wrong > 9 and missed <= 1


def test_a_checklist_of_an_edit_is_about_the_pictures_before_and_after():
    rng = np.random.default_rng(1)
    for _ in range(12):
        before = scenes.sample(rng, Split.TRAIN)
        _, text, after = edits.sample(rng, before)
        question = ask(requests.EDIT_CHECKLIST, edit=text)
        assert ask(requests.VERIFY, before, after, questions=question) == "yes"
        assert ask(requests.VERIFY, before, before, questions=question) == "no"
    _, text, (source, before), after = edits.sample_pair(rng)
    question = ask(requests.EDIT_CHECKLIST, edit=text)
    assert ask(requests.VERIFY, source, before, after, questions=question) == "yes"


def test_a_critique_names_the_faults_by_their_kinds():
    for prompt, right, other in cases(12, 2):
        assert requests.faults(ask(requests.CRITIQUE, right, goal=prompt.text)) == []
        named = requests.faults(ask(requests.CRITIQUE, other, goal=prompt.text))
        assert set(named) == {fault.kind for fault in parse_prompt(prompt.text).faults(other)}


def test_the_better_picture_is_chosen_wherever_it_stands():
    for prompt, right, other in cases(12, 3):
        orders = (right, other), (other, right)
        chosen = [requests.choice(ask(requests.CHOOSE, *o, goal=prompt.text)) for o in orders]
        assert chosen == (["tie", "tie"] if prompt.goal.holds(other) else ["A", "B"])


def trajectory(goal: str, seed: int):
    """Return the turns of a trajectory, its conversation, and its scenes."""
    painter, session = Painter(np.random.default_rng(seed), 0.4), TEACHER.start()
    said, drawn, turns = [system(requests.CONTROL), user(goal)], [], []
    new = said
    while len(turns) < 9:
        text = session.ask(new).text
        turns.append(parse(text, len(drawn) + 1))
        if turns[-1].stop:
            break
        drawn.append(painter.draw(turns[-1].action, drawn))
        new = [user(picture(drawn[-1]))]
        said = [*said, assistant(text), *new]
    return turns, said, drawn


def _order(prompt):
    """An edit as a narrative has it, but for its first letter."""
    return prompt.rstrip(".").removeprefix("Please ").removeprefix("please ")[1:]


def test_a_story_is_told_from_actions_and_pictures():
    for number, (prompt, _, _) in enumerate(cases(6, 4)):
        turns, _, drawn = trajectory(prompt.text, number)
        actions = [turn.action for turn in turns if turn.action][: len(drawn)]
        steps = "\n".join(action.line() for action in actions)
        told = ask(requests.NARRATE, *drawn, goal=prompt.text, steps=steps).split("\n")
        assert len(told) == len(drawn) + 1 and all(told)
        for line, action in zip(told, actions):
            assert action.kind == "generate" or _order(action.prompt) in line
    with pytest.raises(InvalidRequest, match="one line of action a picture"):
        ask(requests.NARRATE, *drawn, goal=prompt.text, steps="no action")


def test_a_proxy_prompt_says_what_the_next_picture_should_be():
    kinds = set()
    for number, (prompt, _, _) in enumerate(cases(12, 5)):
        turns, said, drawn = trajectory(prompt.text, number)
        exact = Painter(np.random.default_rng(number))
        for step, turn in enumerate(turns[: len(drawn)]):
            heard = [*said[: 3 + 2 * step], requests.PROXY.message()]
            proxy = requests.proxy(TEACHER.start().ask(heard).text)
            assert parse_prompt(proxy.scene).holds(exact.draw(turn.action, drawn)), (turn, proxy)
            assert proxy.references == turn.action.references
            assert proxy.edit == (turn.action.prompt if proxy.references else None)
            kinds.add(turn.action.kind)
    assert kinds == {"generate", "edit"}
    with pytest.raises(InvalidRequest, match="draws nothing"):
        TEACHER.start().ask([*said[:2], assistant("done"), requests.PROXY.message()])


def test_a_rewritten_prompt_leaves_nothing_open_and_asks_for_the_same():
    for prompt, _, _ in cases(12, 6):
        goal = parse_prompt(ask(requests.REWRITE, goal=prompt.text))
        assert all(None not in group for group in goal.groups)
        things = [Thing(min(PLACES[group.place]), *group[1:4]) for group in goal.groups]
        assert prompt.goal.holds(Scene(tuple(things)))


def test_pictures_are_told():
    rng = np.random.default_rng(7)
    for count in range(9):
        scene = scenes.sample(rng, Split.TRAIN, count)
        assert read_inventory(ask(requests.INVENTORY, scene)) == scene
        assert inventory(scene).count("\n") + 1 == max(1, count)
        said = ask(requests.CAPTION, scene)
        assert all(thing.colour in said and thing.shape in said for thing in scene.things)
    with pytest.raises(ValueError, match="no line of an inventory"):
        read_inventory("a star")


def test_differences_are_told_one_by_one():
    rng = np.random.default_rng(8)
    said = {"remove": "gone|any more", "add": "new|added", "move": "now"}
    for index in range(18):
        before = scenes.sample(rng, Split.TRAIN, 1 + index % 7)
        kind = edits.KINDS[index % 6]
        _, _, after = edits.sample(rng, before, kind)
        lines = difference(before, after, rng)
        assert len(lines) == 1
        assert any(word in lines[0] for word in said.get(kind, "now|become").split("|"))
    assert ask(requests.DIFFERENCE, after, after) == "nothing has changed"


def test_answers_of_models_are_read_with_tolerance():
    assert requests.checks("1. Yes.\n2) no, there is none", 2) == [True, False]
    assert requests.choice("**B**: it is right") == "B"
    assert requests.faults("Nothing is wrong.") == []
    assert requests.faults("Colour and size: the star\n\n- extra: a ring") == [
        "colour",
        "size",
        "extra",
    ]
    assert requests.faults("Check: a star in no place: none.\nmissing: a star") == ["missing"]
    assert requests.faults("checks: a star, star for star.\n\nNothing is wrong.") == []
    given = 'Here: {"scene": "a star", "edit": "add a star", "references": [2, 1]}'
    assert requests.proxy(given) == Proxy(scene="a star", edit="add a star", references=(2, 1))
    for read, reply in (
        (lambda text: requests.checks(text, 2), "yes"),
        (requests.choice, "Both"),
        (requests.faults, "it is bad"),
        (requests.faults, "check: all of it"),
        (requests.proxy, "none"),
        (requests.proxy, '{"scene": "a star", "edit": "add a star"}'),
    ):
        with pytest.raises(ValueError, match=reply.replace("{", r"\{")):
            read(reply)


def test_a_request_without_its_fields_is_refused():
    with pytest.raises(ValueError, match="needs goal"):
        requests.CRITIQUE.message()


def test_samples_differ_by_seed():
    texts = {
        TEACHER.start()
        .ask([requests.REWRITE.message(goal="a star")], Options(temperature=1.0, seed=s))
        .text
        for s in range(4)
    }
    assert len(texts) > 1
    assert all(isinstance(parse_prompt(text), Goal) for text in texts)
