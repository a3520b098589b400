"""What the image model is given, written out by hand."""

import pytest

from clvr_jax.data.conditioning import Policy, condition, condition_next
from clvr_jax.data.trajectory import Action, Step, Trajectory

STEPS = [
    Step(
        reasoning="I begin with the jug.",
        action=Action(kind="generate", prompt="a jug"),
        image="1.png",
    ),
    Step(
        reasoning="<IMG_GEN_1> lacks its lid.",
        action=Action(kind="edit", prompt="add a lid to <IMG_GEN_1>", references=[1]),
        image="2.png",
    ),
    Step(
        reasoning="<IMG_GEN_2> is too dark; the light of <IMG_GEN_1> was right.",
        action=Action(
            kind="edit",
            prompt="<IMG_GEN_2> in the light of <IMG_GEN_1>",
            references=[2, 1],
        ),
        image="3.png",
    ),
    Step(
        reasoning="I frame <IMG_GEN_3>, with the handle of <IMG_GEN_1>.",
        action=Action(kind="edit", prompt="frame <IMG_GEN_3>", references=[3]),
        image="4.png",
    ),
]
JUG = Trajectory(id="jug", goal="a jug with a lid", steps=STEPS, closing="Done.")
BARE = Trajectory(
    id="bare",
    goal="a jug with a lid",
    steps=[step.model_copy(update={"action": None}) for step in STEPS],
)


def test_the_first_step_has_the_goal_and_its_reasoning():
    for references in ("all", "chosen"):
        assert condition(JUG, 0, Policy(references=references)) == (
            "a jug with a lid\n\nI begin with the jug.",
            (),
        )


def test_trajectory_with_all_images():
    assert condition(JUG, 2, Policy()) == (
        "a jug with a lid\n\n"
        "I begin with the jug.\nimage 1\n\n"
        "image 1 lacks its lid.\nimage 2\n\n"
        "image 2 is too dark; the light of image 1 was right.",
        (0, 1),
    )


def test_chosen_images_are_renumbered_in_the_order_of_the_action():
    policy = Policy(references="chosen")
    assert condition(JUG, 2, policy) == (
        "a jug with a lid\n\n"
        "I begin with the jug.\nimage 2\n\n"
        "image 2 lacks its lid.\nimage 1\n\n"
        "image 1 is too dark; the light of image 2 was right.",
        (1, 0),
    )
    assert condition(JUG, 3, policy) == (
        "a jug with a lid\n\n"
        "I begin with the jug.\n\n"
        "an earlier image lacks its lid.\n\n"
        "an earlier image is too dark; the light of an earlier image was right.\nimage 1\n\n"
        "I frame image 1, with the handle of an earlier image.",
        (2,),
    )


def test_the_last_images_with_other_names():
    policy = Policy(references="last_k", last_k=2, name="[{i}]", absent="[gone]")
    assert condition(JUG, 3, policy) == (
        "a jug with a lid\n\n"
        "I begin with the jug.\n\n"
        "[gone] lacks its lid.\n[1]\n\n"
        "[1] is too dark; the light of [gone] was right.\n[2]\n\n"
        "I frame [2], with the handle of [gone].",
        (1, 2),
    )
    assert condition(JUG, 1, policy).references == (0,)


def test_instructions():
    stock = Policy(text="instruction", references="chosen")
    assert condition(JUG, 0, stock) == ("a jug", ())
    assert condition(JUG, 2, stock) == ("image 1 in the light of image 2", (1, 0))
    every = Policy(text="instruction")
    assert condition(JUG, 2, every) == ("image 2 in the light of image 1", (0, 1))
    assert condition(BARE, 2, every) == ("a jug with a lid", (0, 1))
    assert condition(BARE, 2, Policy()) == condition(JUG, 2, Policy())


def test_a_step_without_an_image_yet():
    for index, step in enumerate(STEPS):
        for policy in (Policy(), Policy(text="instruction", references="chosen")):
            asked = condition_next(JUG.goal, STEPS[:index], step.reasoning, step.action, policy)
            assert asked == condition(JUG, index, policy)


def test_what_cannot_be():
    with pytest.raises(ValueError, match="the step has no action; use references=all or last_k"):
        condition(BARE, 1, Policy(references="chosen"))
    with pytest.raises(IndexError, match="step 4 of 4"):
        condition(JUG, 4, Policy())
    later = Action(kind="edit", prompt="x", references=[2])
    with pytest.raises(ValueError, match="refers to image 2; 1 to 1 exist"):
        condition_next("g", STEPS[:1], "r", later, Policy(references="chosen"))
    with pytest.raises(ValueError, match="the text for image 2 names <IMG_GEN_2>; 1 to 1 exist"):
        condition_next("g", STEPS[:1], "as <IMG_GEN_2>", None, Policy())
    with pytest.raises(ValueError, match="no image exists yet"):
        condition_next("as <IMG_GEN_1>", [], "r", None, Policy())


def test_policies_are_recorded():
    policy = Policy(text="instruction", references="last_k", last_k=3, buckets=[64, 128])
    assert Policy.from_json(policy.to_json()) == policy
    assert Policy.from_json({"references": "chosen"}) == Policy(references="chosen")
    assert Policy().to_json() == (
        '{"absent": "an earlier image", "buckets": [512, 1024, 2048], "last_k": null, '
        '"name": "image {i}", "references": "all", "text": "trajectory"}'
    )


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"reference": "all"}, "reference: is no field of the schema"),
        ({"references": "some"}, "references: Input should be 'all', 'chosen' or 'last_k'"),
        ({"references": "last_k"}, "references is last_k and last_k is None"),
        ({"last_k": 2}, "references is all and last_k is 2"),
        ({"name": "image"}, "it must hold {i}"),
        ({"buckets": [512, 128]}, "must be positive and ascend"),
    ],
)
def test_a_wrong_policy_is_refused(fields, message):
    with pytest.raises(ValueError) as caught:
        Policy.from_json(fields)
    assert message in str(caught.value)


def test_buckets_hold_texts_and_refuse_longer_ones():
    policy = Policy()
    assert [policy.bucket(n) for n in (0, 1, 512, 513, 1024, 2048)] == [
        512, 512, 512, 1024, 1024, 2048,
    ]  # fmt: skip
    with pytest.raises(ValueError, match="takes 2049 tokens, at most 2048"):
        policy.bucket(2049)
