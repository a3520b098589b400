"""Goals: exact truth, best assignments, faults, one form for all orders."""

import itertools

import numpy as np
import pytest

from clvr_jax.miniature import edits, prompts, scenes
from clvr_jax.miniature.assignment import EXACT, POINTS
from clvr_jax.miniature.goal import Fault, Goal, Group, Relation
from clvr_jax.miniature.held_out import Split
from clvr_jax.miniature.places import CELL_NAMES, PLACES, related
from clvr_jax.miniature.scene import CELLS, Scene, Thing

RED_CIRCLE = Thing(0, "circle", "red", "small")
BLUE_CIRCLE = Thing(5, "circle", "blue", "large")
STAR = Thing(10, "star", "red", "large")


def brute_force(goal: Goal, scene: Scene) -> bool:
    """Try every order of the things."""
    if goal.count != len(scene.things):
        return False
    for things in itertools.permutations(scene.things):
        of = dict(zip(goal.slots, things))
        fits = all(goal.groups[g].allows(t) for g, t in zip(goal.slots, things))
        if fits and all(related(of[a].cell, w, of[b].cell) for a, w, b in goal.relations):
            return True
    return False


def worth(goal: Goal, things: tuple) -> int:
    """Points of things (None: missing) in the slots, counted anew."""
    total = 0
    for group, thing in zip(goal.slots, things):
        if thing is not None:
            wrong = goal.groups[group].wrong(thing)
            total += sum(POINTS.values()) - sum(POINTS[name] for name in wrong)
            total += EXACT * (not wrong)
    of = dict(zip(goal.slots, things))
    for a, word, b in goal.relations:
        if of[a] and of[b] and related(of[a].cell, word, of[b].cell):
            total += POINTS["relation"]
    return total


def test_places_are_the_cells_they_say():
    assert PLACES["top left corner"] == {0} and PLACES["bottom right corner"] == {15}
    assert PLACES["top right corner"] == {3} and PLACES["bottom left corner"] == {12}
    assert PLACES["second row"] == {4, 5, 6, 7} and PLACES["third column"] == {2, 6, 10, 14}
    assert PLACES["leftmost column"] == {0, 4, 8, 12} and PLACES["bottom row"] == {12, 13, 14, 15}
    assert PLACES["left half"] == {0, 1, 4, 5, 8, 9, 12, 13} and PLACES["middle"] == {5, 6, 9, 10}
    assert PLACES["third place of the second row"] == {6}
    assert PLACES["last place of the third row"] == {11}
    assert sorted(CELL_NAMES) == list(range(CELLS)) and len(set(CELL_NAMES.values())) == CELLS


def test_relations_are_strict_and_look_the_right_way():
    assert related(0, "left of", 1) and related(12, "left of", 1) and not related(1, "left of", 5)
    assert related(1, "right of", 12) and not related(12, "right of", 1)
    assert related(3, "above", 4) and not related(4, "above", 7) and related(4, "below", 3)


def test_two_groups_may_fit_one_thing():
    goal = Goal((Group(1, "circle"), Group(1, "circle", "red")))
    assert goal.holds(Scene((RED_CIRCLE, BLUE_CIRCLE)))  # whichever order the things come in
    assert goal.holds(Scene((RED_CIRCLE._replace(cell=9), BLUE_CIRCLE)))
    assert not goal.holds(Scene((BLUE_CIRCLE, BLUE_CIRCLE._replace(cell=1))))


def test_of_equal_assignments_the_one_that_leaves_more_as_it_is_is_best():
    """A cyan cross is the cross that is asked for, not a star of another shape."""
    goal = Goal((Group(1, "star", "cyan"), Group(1, "cross", "cyan")))
    cyan, purple = Thing(5, "cross", "cyan", "small"), Thing(9, "cross", "purple", "small")
    assert goal.assign(Scene((cyan, purple))).things == (purple, cyan)


def test_relation_picks_the_thing_that_keeps_it():
    goal = Goal(
        (Group(1, "circle"), Group(1, "star"), Group(1, "circle")), (Relation(0, "below", 1),)
    )
    low = RED_CIRCLE._replace(cell=14)
    assert goal.holds(Scene((BLUE_CIRCLE, STAR, low)))
    assert not goal.holds(Scene((BLUE_CIRCLE, STAR, RED_CIRCLE)))


def test_nothing_else_may_be_there():
    goal = Goal((Group(1, "circle"),))
    assert goal.holds(Scene((RED_CIRCLE,)))
    assert not goal.holds(Scene((RED_CIRCLE, STAR))) and not goal.holds(Scene())
    assert Goal(()).holds(Scene()) and not Goal(()).holds(Scene((STAR,)))


def test_holds_and_faults_agree_with_all_permutations():
    rng = np.random.default_rng(0)
    kinds = ("two", "counting", "position", "attribution", "mix3", "mix4")
    held = missed = 0
    for i in range(120):
        prompt, scene = prompts.sample(rng, kinds[i % len(kinds)])
        if prompt.goal.count > 4:
            continue  # of a counting prompt: too many orders
        if i % 2:
            scene = edits.sample(rng, scene)[2]
        truth = brute_force(prompt.goal, scene)
        assert prompt.goal.holds(scene) == truth == (not prompt.goal.faults(scene))
        held, missed = held + truth, missed + (not truth)
    assert held > 30 and missed > 20


def test_assignment_is_the_best_of_all():
    rng = np.random.default_rng(1)
    for i in range(36):
        goal = prompts.sample(rng, ("position", "mix3", "mix3", "mix4")[i % 4])[0].goal
        scene = scenes.sample(rng, Split.TRAIN, 1 + i % (3 if goal.count > 3 else 4))
        assigned = goal.assign(scene)
        assert sorted([t for t in assigned.things if t] + list(assigned.extra)) == list(
            scene.things
        )
        padded = [*scene.things, *[None] * goal.count]
        best = max(worth(goal, p) for p in itertools.permutations(padded, goal.count))
        assert worth(goal, assigned.things) == best


def test_faults_say_what_is_wrong():
    goal = Goal(
        (Group(1, "circle", "red", "small", "top row"), Group(1, "star")),
        (Relation(0, "above", 1),),
    )
    right = Scene((RED_CIRCLE, STAR))
    assert goal.faults(right) == ()
    kinds = lambda scene: {fault.kind for fault in goal.faults(scene)}
    assert kinds(Scene((STAR,))) == {"missing"} and kinds(right.put(BLUE_CIRCLE)) == {"extra"}
    assert kinds(Scene((RED_CIRCLE._replace(colour="blue"), STAR))) == {"colour"}
    assert kinds(Scene((RED_CIRCLE._replace(size="large"), STAR))) == {"size"}
    assert kinds(Scene((RED_CIRCLE._replace(cell=4), STAR))) == {"place"}
    assert kinds(Scene((RED_CIRCLE._replace(cell=14), STAR))) == {"place", "relation"}
    assert kinds(Scene((RED_CIRCLE, STAR._replace(shape="ring")))) == {"shape"}
    beside = Scene((RED_CIRCLE, STAR._replace(cell=3)))
    assert goal.faults(beside) == (Fault("relation", 0, RED_CIRCLE, goal.relations[0]),)


def test_canonical_form_is_one_for_all_orders():
    a, b, c = Group(1, "circle"), Group(1, "star", "red"), Group(2, "ring")
    goal = Goal((a, b, c), (Relation(0, "left of", 1),))
    same = Goal((Group(1, "ring"), b, Group(1, "ring"), a), (Relation(1, "right of", 3),))
    other = Goal((a, b, c), (Relation(1, "left of", 0),))
    assert goal.canonical() == same.canonical() and goal.key() == same.key()
    assert goal.key() != other.key()
    assert goal.canonical().canonical() == goal.canonical()


def test_canonical_goals_hold_in_the_same_scenes():
    rng = np.random.default_rng(2)
    for _ in range(20):
        prompt, scene = prompts.sample(rng, "mix5")
        assert prompt.goal.canonical().holds(scene)


@pytest.mark.parametrize(
    "groups, relations",
    [
        ((Group(9, "star"),), ()),
        ((Group(0, "star"),), ()),
        ((Group(1, "dog"),), ()),
        ((Group(1, "star", place="roof"),), ()),
        ((Group(2, "star"), Group(1, "ring")), (Relation(0, "above", 1),)),
        ((Group(1, "star"),), (Relation(0, "above", 0),)),
    ],
)
def test_impossible_goals_are_refused(groups, relations):
    with pytest.raises(ValueError):
        Goal(groups, relations)
