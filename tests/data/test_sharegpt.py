"""ShareGPT records both ways."""

import json

import pytest

from clvr_jax.data.index import RecordError
from clvr_jax.data.sharegpt import from_record, to_record
from clvr_jax.data.trajectory import Trajectory
from launch.toy_data import make

PLAIN = {
    "id": "jug-1",
    "conversations": [
        {"from": "human", "value": "a jug with a lid"},
        {"from": "gpt", "value": "I begin with the jug.\n<IMG_GEN_1>"},
        {"from": "human", "value": "<image>"},
        {"from": "gpt", "value": "<IMG_GEN_1> lacks its lid.\n<IMG_GEN_2>"},
        {"from": "human", "value": "<image>\nGo on."},
        {"from": "gpt", "value": "<IMG_GEN_2> has it."},
    ],
    "images": ["1.png", "2.png"],
}


def changed(turn=None, value=None, **fields):
    record = json.loads(json.dumps(PLAIN)) | fields
    if turn is not None:
        record["conversations"][turn]["value"] = value
    return record


def faults(record) -> list[str]:
    with pytest.raises(RecordError) as caught:
        from_record(record, "name")
    return list(caught.value.faults)


def test_a_record_without_actions():
    made = from_record(PLAIN, "unused")
    assert made.goal == "a jug with a lid" and made.closing == "<IMG_GEN_2> has it."
    assert [step.image for step in made.steps] == ["1.png", "2.png"]
    assert made.steps[1].reasoning == "<IMG_GEN_1> lacks its lid." and not made.has_actions
    assert made.steps[1].observation == "<image>\nGo on."
    assert to_record(made) == PLAIN


@pytest.mark.parametrize("style", ["conversations", "messages"])
@pytest.mark.parametrize("actions", [True, False])
def test_round_trip(tmp_path, style, actions):
    for line in make(tmp_path, 3, (1, 2, 4), actions=actions).read_text().splitlines():
        made = Trajectory.model_validate_json(line)
        changes = [{}, {"system": "Draw."}, {"closing": ""}]
        changes += [{"closing": "", "outcome": "stopped"}] if actions else []
        for change in changes:
            variant = made.model_copy(update=change)
            record = to_record(variant, style)
            assert from_record(json.loads(json.dumps(record)), "x") == variant
            assert to_record(from_record(record, "x"), style) == record


def test_roles_of_both_variants_a_missing_id_and_a_system_field():
    turns = [
        {"role": {"human": "user", "gpt": "assistant"}[t["from"]], "content": t["value"]}
        for t in PLAIN["conversations"]
    ]
    made = from_record({"messages": turns, "images": PLAIN["images"], "system": "Draw."}, "f-3")
    assert made.id == "f-3" and made.system == "Draw."
    assert to_record(made)["conversations"][1:] == PLAIN["conversations"]
    assert from_record(changed(tools="", videos=[]), "x") == from_record(PLAIN, "x")


def turns(*roles):
    return [{"from": role, "value": "x"} for role in roles]


@pytest.mark.parametrize(
    "record,message",
    [
        (changed(images=["1.png"]), "2 <image> tags in the turns, 1 images are listed"),
        (changed(images=["1.png", "2.png", "3.png"]), "2 <image> tags in the turns, 3 images"),
        (changed(images="1.png"), "images: must be a list of paths"),
        (changed(2, "look"), "turn 3: must hold <image> once, holds it 0 times"),
        (changed(2, "<image><image>"), "turn 3: must hold <image> once, holds it 2 times"),
        (changed(0, "<image> of a jug"), "turn 1: <image> stands before any image was drawn"),
        (changed(1, "<image>\n<IMG_GEN_1>"), "turn 2: <image> stands in a turn of the assistant"),
        (changed(3, "no marker"), "turn 4: must end with <IMG_GEN_2>"),
        (changed(3, "x\n<IMG_GEN_3>"), "must end with <IMG_GEN_2>; its last marker is <IMG_GEN_3>"),
        (changed(3, "<IMG_GEN_2> and so"), "turn 4: text follows <IMG_GEN_2>: 'and so'"),
        (changed(5, "x\n<IMG_GEN_3>"), "turn 6: draws <IMG_GEN_3>, but no turn after it shows it"),
        (changed(5, "see <IMG_GEN_7>"), "the closing names <IMG_GEN_7>; 1 to 2 exist"),
        (changed(1, "as <IMG_GEN_2>\n<IMG_GEN_1>"), "step 1: the reasoning names <IMG_GEN_2>"),
        (changed(5, 'x\n{"action": "stop"}'), "turn 6: has a stop action, the steps have no"),
        (changed(0, " "), "goal: is empty"),
        (changed(1, "<IMG_GEN_1>"), "step 1: reasoning: is empty"),
        (changed(5, "x<|im_end|>"), "closing: contains <|im_end|>"),
        (changed(extra=1), "extra: is no field of the format"),
        (changed(videos=["a.mp4"]), "videos: must be empty"),
        (changed(messages=[]), "has conversations and messages"),
        (changed(conversations=[]), "conversations: must be a list of turns"),
        (changed(conversations=turns("human"), images=[]), "no steps: the conversation has no"),
        (changed(conversations=turns("human", "gpt"), images=[]), "no steps: no turn shows an"),
        (
            changed(conversations=turns("gpt", "human"), images=[]),
            "turn 1: wrong role order, the assistant speaks where the user must",
        ),
        (
            changed(conversations=turns("system", "human", "gpt", "gpt"), images=[]),
            "turn 4: wrong role order, the assistant speaks where the user must",
        ),
        (changed(conversations=turns("human", "tool"), images=[]), "turn 2: from is 'tool'"),
        (changed(conversations=[{"from": {}, "value": "x"}]), "turn 1: from is {}; it may be"),
        (changed(conversations=[{"from": "human"}], images=[]), "turn 1: must have from and value"),
    ],
)
def test_a_broken_record_is_refused(record, message):
    told = faults(record)
    assert any(message in fault for fault in told), told


def test_all_faults_are_told_at_once():
    record = changed(3, "no marker")
    record["conversations"][1]["value"] = "x <IMG_GEN_4>"
    assert faults(record) == [
        "turn 2: must end with <IMG_GEN_1>; its last marker is <IMG_GEN_4>",
        "turn 4: must end with <IMG_GEN_2>",
    ]
    assert len(faults(changed(2, "look", extra=1, images=[]))) == 3


def test_steps_with_actions_end_with_the_stop_action(tmp_path):
    made = Trajectory.model_validate_json(make(tmp_path, 1, 1).read_text())
    record = to_record(made)
    record["conversations"][-1]["value"] = "Done."
    assert faults(record) == [
        'turn 4: the steps have actions, so it must end with {"action": "stop"}'
    ]
    record["conversations"][-1]["value"] = 'x\n{"action": "generate", "prompt": "y"}'
    assert faults(record) == ["turn 4: has an action but no <IMG_GEN_2>"]
