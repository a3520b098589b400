"""Prompts: true of their scenes, good English, of every kind and tier, nothing held out."""

import collections
import math
import re

import numpy as np
import pytest

from clvr_jax.miniature import held_out, prompts, scenes
from clvr_jax.miniature.goal import Goal, Group, Relation
from clvr_jax.miniature.held_out import Split
from clvr_jax.miniature.phrases import tokenize
from clvr_jax.miniature.places import PLACES
from clvr_jax.miniature.scene import Scene
from clvr_jax.miniature.words import ANYTHING, NUMBERS, PLURALS, noun_phrase


@pytest.mark.parametrize("kind", prompts.KINDS)
def test_scene_meets_prompt(kind):
    rng = np.random.default_rng(0)
    for _ in range(12):
        prompt, scene = prompts.sample(rng, kind)
        assert prompt.kind == kind and prompt.goal.holds(scene)
        assert prompt.complexity == prompts.complexity(prompt.goal, prompt.text)
        if kind.startswith("mix"):
            assert len(scene.things) == int(kind[3:]) and len(prompt.goal.groups) > 1


def test_kinds_are_what_they_are_called():
    rng = np.random.default_rng(1)
    for _ in range(20):
        goal = lambda kind: prompts.sample(rng, kind)[0].goal
        assert goal("single").count == 1 and goal("single").groups[0].colour is None
        assert goal("colour").groups[0].colour and goal("two").count == 2
        assert goal("counting").groups[0].count >= 2
        position = goal("position")
        assert position.relations or all(group.place for group in position.groups)
        first, second = goal("attribution").groups
        assert first.shape != second.shape and first.colour != second.colour


def test_same_seed_same_prompts():
    draw = lambda: [prompts.sample(np.random.default_rng(7)) for _ in range(3)]
    assert draw() == draw()


def test_english_agrees_in_number_and_article():
    rng = np.random.default_rng(2)
    one = {*PLURALS, *ANYTHING}
    many = {*PLURALS.values(), *ANYTHING.values()}
    for _ in range(120):
        words = tokenize(prompts.sample(rng)[0].text)
        for i, word in enumerate(words[:-1]):
            if word in ("a", "an"):
                assert (word == "an") == (words[i + 1][0] in "aeiou"), words
            if word in ("a", "an", "one", "the", *NUMBERS[1:]):
                noun = next((w for w in words[i + 1 :] if w in one | many), None)
                if words[i + 1] not in one | many and words[i + 1] != "object":
                    continue  # adjectives or a place in between are checked by the parser's tests
                assert noun in (many if word in NUMBERS[1:] else one), words
            if word == "there" and words[i + 1] in ("is", "are"):
                counted = words[i + 3] if words[i + 2] == "also" else words[i + 2]
                assert (words[i + 1] == "are") == (counted in NUMBERS[1:]), words
    assert noun_phrase(rng, 2, "cross", "red").endswith("red crosses")


def test_relation_is_said_the_right_way_round():
    rng = np.random.default_rng(3)
    goal = Goal((Group(1, "star", "red"), Group(1, "ring")), (Relation(0, "left of", 1),))
    texts = {prompts.write(goal, rng).lower() for _ in range(150)}
    assert len(texts) > 50
    for text in texts:
        assert re.search(r"star (is )?(to the )?left of (a|one|the) ring", text), text


def test_a_thing_is_referred_to_only_by_what_no_other_could_be():
    rng = np.random.default_rng(4)
    groups = (Group(1, "star", "red"), Group(1, "star", "blue"), Group(2, "ring"))
    goal = Goal(groups, (Relation(0, "above", 1),))
    for _ in range(100):
        assert not re.search(r"the star", prompts.write(goal, rng).lower())
    with pytest.raises(ValueError, match="no words tell"):
        prompts.write(Goal((Group(1, "star"), groups[0]), (Relation(0, "above", 1),)), rng)


def test_complexity_counts_things_bonds_and_words():
    goal = Goal(
        (Group(3, "star", "red"), Group(1, "ring", place="middle"), Group(1, "cross")),
        (Relation(1, "above", 2),),
    )
    text = "three red stars, a ring in the middle above a cross"
    assert prompts.complexity(goal, text) == pytest.approx(5 * math.log(5) + 3 + 1 + 1 + 1.1)
    assert [prompts.tier(value) for value in (0.0, 3.9, 4.0, 8.0, 14.0, 21.9, 22.0, 99.0)] == [
        0, 0, 1, 2, 3, 3, 4, 4,
    ]  # fmt: skip


def test_kinds_spread_over_tiers():
    rng = np.random.default_rng(5)
    tiers = collections.Counter(prompts.tier(prompts.sample(rng)[0].complexity) for _ in range(300))
    assert set(tiers) == {0, 1, 2, 3, 4} and min(tiers.values()) > 20


def test_free_attributes_and_cells_are_uniform():
    rng = np.random.default_rng(6)
    goal = Goal((Group(1, "circle"), Group(1, "cross")), (Relation(0, "left of", 1),))
    drawn = [scenes.draw(goal, rng, Split.TRAIN, composed=False) for _ in range(1500)]
    circles = [next(t for t in scene.things if t.shape == "circle") for scene in drawn]
    colours = collections.Counter(thing.colour for thing in circles)
    assert set(colours) == set(held_out.COLOURS_OF["circle"])  # all but the held-out one
    assert max(colours.values()) < 1.5 * min(colours.values())
    rows = collections.Counter(thing.row for thing in circles)
    assert max(rows.values()) < 1.3 * min(rows.values())
    columns = collections.Counter(thing.column for thing in circles)
    for column, share in enumerate((3 / 6, 2 / 6, 1 / 6)):  # pairs of columns that it leaves
        assert columns[column] / 1500 == pytest.approx(share, abs=0.07)


@pytest.mark.parametrize(
    "goal, cells",
    [
        (Goal((Group(1, "star"),)), {5}),
        (Goal((Group(3, "star"), Group(3, "ring"))), {5, 6, 9, 10, 1, 2}),
        # what is bound comes first, in its place, then what is free
        (Goal((Group(1, "star"), Group(1, "ring", place="middle"))), {6, 5}),
        (Goal((Group(1, "star"), Group(1, "ring")), (Relation(0, "right of", 1),)), {5, 4}),
    ],
)
def test_open_places_are_composed(goal, cells):
    """Nearest the middle first, in the order of the words."""
    rng = np.random.default_rng(11)
    for _ in range(20):
        scene = scenes.draw(goal, rng, Split.HELD_OUT)
        assert {thing.cell for thing in scene.things} == cells
        star = next(thing for thing in scene.things if thing.shape == "star")
        assert star.cell == (6 if goal.groups[-1].place else 5)


def test_impossible_goals_find_no_scene():
    rng = np.random.default_rng(7)
    assert scenes.draw(Goal((Group(2, "star", place="top left corner"),)), rng, Split.TRAIN) is None
    above = Goal((Group(1, "star", place="top row"), Group(1, "cross")), (Relation(0, "below", 1),))
    assert scenes.draw(above, rng, Split.TRAIN) is None


@pytest.mark.parametrize("detail", [0.0, 0.5, 1.0])
def test_descriptions_are_true(detail):
    rng = np.random.default_rng(8)
    for count in range(9):
        for _ in range(10):
            scene = scenes.sample(rng, Split.HELD_OUT, count)
            prompt = prompts.describe(scene, rng, detail, relations=count % 3)
            assert prompt.goal.holds(scene), prompt
            if detail == 1:  # and of no other scene
                other = scenes.draw(prompt.goal, rng, Split.HELD_OUT)
                assert other == scene


def test_nothing_held_out_in_training_scenes():
    rng = np.random.default_rng(9)
    for _ in range(60):
        prompt, scene = prompts.sample(rng)
        assert held_out.is_clean(scene) and not held_out.asks_held(prompt.goal)


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="no prompts of kind many"):
        prompts.sample(np.random.default_rng(0), "many")
    with pytest.raises(ValueError, match="held_out"):
        prompts.sample(np.random.default_rng(0), "single", Split.HELD_OUT)


def test_places_hold_their_groups():
    rng = np.random.default_rng(10)
    goal = Goal((Group(3, "star", place="top row"), Group(2, "ring", place="rightmost column")))
    for _ in range(50):
        scene = scenes.draw(goal, rng, Split.HELD_OUT)
        assert isinstance(scene, Scene)
        stars = {t.cell for t in scene.things if t.shape == "star"}
        assert stars <= PLACES["top row"] and len(stars) == 3
