"""Splits: disjoint by construction, nothing held out leaks, the fixed lists never change."""

import hashlib

import numpy as np
import pytest

from clvr_jax.data.turns import Action
from clvr_jax.miniature import edits, held_out, prompts, samples, scenes, scores, splits
from clvr_jax.miniature.goal import Goal, Group, Relation
from clvr_jax.miniature.held_out import Split
from clvr_jax.miniature.parse import parse_edit
from clvr_jax.miniature.places import related
from clvr_jax.miniature.scene import Scene, Thing

FIRST = {
    Split.TEST: "2835459846cc2e7d",
    Split.DEV: "80a14deea1234b95",
    Split.HELD_OUT: "4375f30bf54f6481",
}  # of the first four of each kind
WHOLE = {
    Split.TEST: "85c52cfd577d6f6a",
    Split.DEV: "5c7d9729672d8d7b",
    Split.HELD_OUT: "e344a8ae9c76e4a4",
}


def digest(listed) -> str:
    """Hash of texts and goals."""
    lines = "\n".join(f"{p.kind}|{p.text}|{p.goal.key()}|{p.complexity:.9f}" for p in listed)
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def leaks(scene: Scene) -> bool:
    """Look for held-out pairs and relations in a scene, thing by thing, without the tables."""
    for thing in scene.things:
        if (thing.shape, thing.colour) in held_out.PAIRS:
            return True
        for other in scene.things:
            for first, word, second in held_out.COMBINATIONS:
                shapes = (thing.shape, other.shape)
                if shapes == (first, second) and related(thing.cell, word, other.cell):
                    return True
    return False


def test_what_is_held_out():
    assert len(held_out.PAIRS) == 6
    assert len({s for s, _ in held_out.PAIRS}) == 6 == len({c for _, c in held_out.PAIRS})
    assert held_out.is_held("ring", "below", "star") and held_out.is_held("star", "above", "ring")
    assert not held_out.is_held("ring", "above", "star")
    star, ring = Thing(0, "star", "red", "small"), Thing(7, "ring", "blue", "small")
    assert held_out.taints(ring, (star, ring)) and not held_out.is_clean(Scene((star, ring)))
    assert held_out.is_clean(Scene((star._replace(cell=4), ring)))  # side by side
    assert not held_out.is_clean(Scene((ring._replace(colour="red"),)))


@pytest.mark.parametrize(
    "text, held",
    [
        ("add a green star", True),
        ("add a star", False),
        ("make the star green", True),
        ("make the ring green", False),
        ("turn the red ring into a star", True),
        ("replace the red star by a ring", False),
        ("move the star above the ring", True),
        ("move the star below the ring", False),
        ("move the ring below the blue star", True),
        ("remove the star above the ring", True),
        ("add a star above the ring", True),
        ("add a star above the red ring", True),
        ("make the star small", False),
    ],
)
def test_edits_that_name_what_is_held_out_are_known(text, held):
    assert held_out.edits_held(parse_edit(text)) is held


def test_parts_of_training_prompts_may_be_of_other_splits():
    """A drawing's first picture may ask for less than its prompt: that is a prompt of its own."""
    draws = lambda text: Action(kind="generate", prompt=text)
    rng = np.random.default_rng(3)
    for split in (Split.TRAIN, Split.DEV, Split.TEST):
        texts = [prompts.sample(rng, split=split)[0].text for _ in range(12)]
        assert {splits.may_train(draws(text)) for text in texts} == {split is Split.TRAIN}
    assert not splits.may_train(draws("a green star"))
    named = "take the ring of <IMG_GEN_2> and put it into image 2"
    kept = Action(kind="edit", prompt=named.replace("image 2", "<IMG_GEN_1>"), references=(2, 1))
    assert splits.may_train(kept)
    held = kept.prompt.replace("ring", "red ring")
    assert not splits.may_train(kept.model_copy(update={"prompt": held}))


def leakage(count: int):
    rng = np.random.default_rng(11)
    for i in range(count):
        split = (Split.TRAIN, Split.TRAIN, Split.TRAIN, Split.DEV, Split.TEST)[i % 5]
        prompt, scene = prompts.sample(rng, None, split)
        assert not held_out.asks_held(prompt.goal) and not leaks(scene), prompt
        assert held_out.split_of(prompt.goal, prompt.text) is split
        if i % 2 == 0 and split is Split.TRAIN:
            _, text, after = edits.sample(rng, scene)
            assert not leaks(after), text
        if i % 20 == 0:
            _, text, images, after = edits.sample_pair(rng)
            assert not any(leaks(image) for image in (*images, after)), text


def test_nothing_held_out_leaks():
    leakage(100)


@pytest.mark.slow
def test_nothing_held_out_leaks_in_many():
    leakage(20_000)


def test_held_out_prompts_ask_for_what_is_held_out():
    rng = np.random.default_rng(12)
    for _ in range(40):
        prompt, scene = prompts.sample(rng, None, Split.HELD_OUT)
        assert held_out.asks_held(prompt.goal) and leaks(scene) and prompt.goal.holds(scene)


def test_a_goal_is_of_one_split_however_it_is_said():
    goal = Goal(
        (Group(1, "ring", "blue"), Group(2, "star"), Group(1, "cross")), (Relation(0, "above", 2),)
    )
    same = Goal((goal.groups[2], goal.groups[1], goal.groups[0]), (Relation(0, "below", 2),))
    assert held_out.split_of(goal, "one way") is held_out.split_of(same, "another")
    assert held_out.is_common(Goal((Group(1, "circle"),)))
    assert not held_out.is_common(Goal((Group(2, "circle", "red"),)))
    assert not held_out.is_common(Goal((Group(1, "circle", place="middle"),)))


def test_shares_of_splits():
    rng = np.random.default_rng(13)
    keys = [str(rng.random()) for _ in range(2000)]
    found = [held_out.split_of_key(key) for key in keys]
    assert found.count(Split.TEST) / 2000 == pytest.approx(0.10, abs=0.02)
    assert found.count(Split.DEV) / 2000 == pytest.approx(0.10, abs=0.02)


@pytest.mark.parametrize("split", FIRST)
def test_fixed_lists_begin_as_ever(split):
    """A change here makes new lists: numbers measured before no longer compare."""
    found = {}
    for kind in prompts.HELD_OUT_KINDS:
        splits.extend(found, split, kind, 4)
    assert digest(found.values()) == FIRST[split]


def test_other_fixed_cases_begin_as_ever():
    """Or numbers of before and after a change would be of other edits and pictures."""
    cases = [case for kind in scores.EDITS for case in scores.edit_cases(Split.TEST, kind, 3)]
    edited = "\n".join(
        f"{c.text}|{c.before}|{c.source}|{c.after}|{[p.seed for p in c.shown]}" for c in cases
    )
    seen = [scenes.sample(samples.generator(1, n), Split.TEST) for n in range(20)]
    found = [hashlib.sha256(t.encode()).hexdigest()[:16] for t in (edited, repr(seen))]
    assert found == ["07087435bc19da7a", "0c76f34b6d8a18a3"]


@pytest.mark.slow
@pytest.mark.parametrize("split", WHOLE)
def test_fixed_lists(split):
    listed = splits.prompts(split)
    kinds = prompts.HELD_OUT_KINDS if split is Split.HELD_OUT else prompts.KINDS
    sizes = {Split.TEST: 2400, Split.DEV: 600, Split.HELD_OUT: 900}
    assert len(listed) == sizes[split] == len({held_out.plain(p.text) for p in listed})
    assert all(sum(p.kind == k for p in listed) == len(listed) // len(kinds) for k in kinds)
    assert all(held_out.split_of(p.goal, p.text) is split for p in listed)
    assert digest(listed) == WHOLE[split]


@pytest.mark.slow
def test_splits_are_disjoint():
    dev, test = splits.prompts(Split.DEV), splits.prompts(Split.TEST)
    assert not {p.text.lower() for p in dev} & {p.text.lower() for p in test}
    apart = lambda ps: {p.goal.key() for p in ps if not held_out.is_common(p.goal)}
    assert not apart(dev) & apart(test)
    rng = np.random.default_rng(14)
    train = [prompts.sample(rng)[0] for _ in range(20_000)]
    assert not apart(train) & (apart(test) | apart(dev))
    assert not {held_out.plain(p.text) for p in train} & {held_out.plain(p.text) for p in test}


def test_training_prompts_have_no_list():
    with pytest.raises(ValueError, match="without end"):
        splits.prompts(Split.TRAIN)
    listed = splits.training(3)
    assert [p.kind for p in listed] == [kind for kind in prompts.KINDS for _ in range(3)]
    assert all(held_out.split_of(p.goal, p.text) is Split.TRAIN for p in listed)
    assert len({held_out.plain(p.text) for p in listed}) == len(listed)


def test_scenes_of_any_number():
    rng = np.random.default_rng(15)
    for count in range(9):
        scene = scenes.sample(rng, Split.TRAIN, count)
        assert len(scene.things) == count and not leaks(scene)
