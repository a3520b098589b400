"""The schema and the trained format, both ways."""

import json

import pytest
from pydantic import ValidationError

from clvr_jax.data.trajectory import Action, Message, Picture, Step, Trajectory
from clvr_jax.data.turns import Turn, explain, parse
from launch.toy_data import make

GENERATE = {"kind": "generate", "prompt": "a jug"}
EDIT = {"kind": "edit", "prompt": "add a lid to <IMG_GEN_1>", "references": [1]}


def record(**changes):
    steps = [
        {"reasoning": "I begin with the jug.", "action": GENERATE, "image": "1.png"},
        {"reasoning": "<IMG_GEN_1> lacks its lid.", "action": EDIT, "image": "2.png"},
    ]
    return {
        "id": "jug-1",
        "goal": "a jug with a lid",
        "steps": steps,
        "closing": "The jug has its lid.",
    } | changes


def faults(given) -> str:
    with pytest.raises(ValidationError) as caught:
        Trajectory.model_validate(given)
    return "\n".join(explain(caught.value))


def test_the_conversation_written_out():
    assert Trajectory.model_validate(record(system="Draw.")).messages() == [
        Message("system", ("Draw.",)),
        Message("user", ("a jug with a lid",)),
        Message(
            "assistant",
            ('I begin with the jug.\n{"action": "generate", "prompt": "a jug"}\n<IMG_GEN_1>',),
        ),
        Message("user", (Picture("1.png", 1),)),
        Message(
            "assistant",
            (
                "<IMG_GEN_1> lacks its lid.\n"
                '{"action": "edit", "prompt": "add a lid to <IMG_GEN_1>", "references": [1]}\n'
                "<IMG_GEN_2>",
            ),
        ),
        Message("user", (Picture("2.png", 2),)),
        Message("assistant", ('The jug has its lid.\n{"action": "stop"}',)),
    ]


def test_without_actions_the_marker_stands_alone():
    steps = [{"reasoning": "I begin.", "image": "1.png", "observation": "Look: <image> Go on."}]
    made = Trajectory.model_validate(record(steps=steps))
    assert [message.parts for message in made.messages()[1:]] == [
        ("I begin.\n<IMG_GEN_1>",),
        ("Look: ", Picture("1.png", 1), " Go on."),
        ("The jug has its lid.",),
    ]


def test_an_unfinished_trajectory_waits_for_the_assistant():
    made = Trajectory.model_validate(record(closing=""))
    assert made.messages()[-1] == Message("user", (Picture("2.png", 2),))
    stopped = Trajectory.model_validate(record(closing="", outcome="stopped"))
    assert stopped.messages()[-1] == Message("assistant", ('{"action": "stop"}',))


def test_records_come_back_as_they_were(tmp_path):
    for line in make(tmp_path, 3, (1, 3)).read_text().splitlines():
        assert Trajectory.model_validate(json.loads(line)).record() == json.loads(line)
    full = record(outcome="seconds", final=1, metadata={"seconds": [1.5, 2]})
    full["steps"][0] |= {"critique": "No lid.", "verdict": "rejected", "metadata": {"seed": 3}}
    assert Trajectory.model_validate(full).record() == full
    assert Trajectory.model_validate_json(json.dumps(full)).record() == full


@pytest.mark.parametrize(
    "turn",
    [
        Turn("I draw.", Action(**GENERATE), 3),
        Turn('Two lines,\n\n{"not": "an action"} and "quotes"', Action(**EDIT), 3),
        Turn("No action.", None, 3),
        Turn("As in <IMG_GEN_1>", None, 3),
        Turn("Done, see <IMG_GEN_2>", None, None, True),
        Turn("Done, see <IMG_GEN_2>"),
        Turn("", None, None, True),
        Turn("ein Krug, “schön” \u2028 日本", Action(kind="generate", prompt='"\\\n'), 3),
    ],
)
def test_a_turn_is_parsed_as_it_was_written(turn):
    assert parse(turn.text(), 3) == turn


def test_a_turn_may_end_before_its_marker_and_in_white_space():
    text = Turn("I draw.", Action(**GENERATE)).text()
    assert parse(f"\n{text} \n", 1) == Turn("I draw.", Action(**GENERATE))
    assert parse("I draw. <IMG_GEN_1>", 1) == Turn("I draw.", None, 1)


@pytest.mark.parametrize(
    "line,message",
    [
        ('{"action": "paint"}', "kind: Input should be 'generate' or 'edit'"),
        ('{"action": "edit", "prompt": "x"}', "no references"),
        ('{"action": "generate", "prompt": "x", "size": 3}', "size: is no field"),
        ('{"action": "generate", "prompt": "x", "kind": "edit"}', "kind is no field"),
        ('{"action": "generate", "prompt": ', "is no JSON"),
        ('{"action": "stop", "prompt": "x"}', "stop takes nothing else"),
        ('{"action": "stop"}\n<IMG_GEN_2>', "stops and draws <IMG_GEN_2>"),
    ],
)
def test_a_broken_action_line_is_refused(line, message):
    with pytest.raises(ValueError, match=message):
        parse(f"I see.\n{line}", 2)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"goal": "  "}, "goal: is empty"),
        ({"goal": "as <IMG_GEN_1>"}, "the goal names <IMG_GEN_1>"),
        ({"goal": "a<|im_end|>"}, "goal: contains <|im_end|>"),
        ({"closing": "see <|image_pad|>"}, "closing: contains <|image_pad|>"),
        ({"closing": "<think>no</think>"}, "closing: contains <think>"),
        ({"closing": "an <image>"}, "closing: contains <image>"),
        ({"closing": "see <IMG_GEN_3>"}, "the closing names <IMG_GEN_3>; 1 to 2 exist"),
        ({"closing": 'x\n{"action": "stop"}'}, "closing: ends with an action line"),
        ({"steps": []}, "steps: List should have at least 1 item"),
        ({"final": 3}, "final is 3, there are 2 images"),
        ({"id": 7}, "id: Input should be a valid string, given 7"),
        ({"gaol": "x"}, "gaol: is no field of the schema"),
        ({"outcome": "tired"}, "outcome: Input should be"),
    ],
)
def test_a_broken_record_is_refused(changes, message):
    assert message in faults(record(**changes))


@pytest.mark.parametrize(
    "number,changes,message",
    [
        (1, {"reasoning": ""}, "step 1: reasoning: is empty"),
        (1, {"reasoning": "as <IMG_GEN_1>"}, "step 1: the reasoning names <IMG_GEN_1>; no image"),
        (2, {"reasoning": "as <IMG_GEN_2>"}, "names <IMG_GEN_2>; 1 to 1 exist"),
        (2, {"action": None}, "steps [2] have no action"),
        (2, {"action": EDIT | {"references": [2]}}, "step 2: reference 2 is a later image"),
        (2, {"action": EDIT | {"references": [0]}}, "step 2: action.references.0: Input"),
        (2, {"action": EDIT | {"references": [1, 1]}}, "name an image twice"),
        (2, {"action": EDIT | {"references": ["1"]}}, "step 2: action.references.0: Input"),
        (1, {"action": GENERATE | {"references": [1]}}, "only edit takes any"),
        (1, {"image": ""}, "step 1: image: String should have at least 1 character"),
        (1, {"picture": "x"}, "step 1: picture: is no field"),
        (1, {"observation": "no tag"}, "step 1: observation: must hold <image> once"),
    ],
)
def test_a_broken_step_is_refused(number, changes, message):
    given = record()
    given["steps"][number - 1] |= changes
    assert message in faults(given)


def test_all_faults_are_told_at_once():
    given = record(goal="", extra=1)
    del given["steps"][1]["image"]
    told = faults(given)
    assert "goal: is empty" in told and "extra: is no field" in told
    assert "step 2: image: is missing" in told


def test_records_do_not_change():
    made = Trajectory.model_validate(record())
    with pytest.raises(ValidationError):
        made.goal = "another"
    moved = made.within("/data")
    assert [step.image for step in moved.steps] == ["/data/1.png", "/data/2.png"]
    assert made.steps[0] == Step.model_validate(record()["steps"][0])
