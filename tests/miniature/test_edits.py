"""Edits: one change, unambiguous, everything else kept, nothing held out comes about."""

import dataclasses

import numpy as np
import pytest

from clvr_jax.miniature import edits, held_out, scenes
from clvr_jax.miniature.edits import Edit
from clvr_jax.miniature.held_out import Split
from clvr_jax.miniature.references import Description, refer
from clvr_jax.miniature.scene import COLOURS, SHAPES, SIZES, Scene, Thing

STAR, RING = Thing(5, "star", "red", "small"), Thing(10, "ring", "blue", "large")
TWIN = STAR._replace(cell=0)
SCENE = Scene((STAR, RING))


@pytest.mark.parametrize("kind", edits.KINDS)
def test_sampled_edits_do_what_they_say(kind):
    rng = np.random.default_rng(0)
    for _ in range(10):
        before = scenes.sample(rng, Split.TRAIN, int(rng.integers(1, 8)))
        edit, text, after = edits.sample(rng, before, kind)
        assert edit.kind == kind and edit.satisfied(before, after) and held_out.is_clean(after)
        assert not edit.satisfied(before, before)
        assert edit.satisfied(before, edit.apply(before))
        assert 2 <= len(text.split()) <= 30
        gone, come = set(before.things) - set(after.things), set(after.things) - set(before.things)
        assert (len(gone), len(come)) == {"add": (0, 1), "remove": (1, 0)}.get(kind, (1, 1))
        if kind in ("recolour", "replace", "resize"):
            assert gone.pop().cell == come.pop().cell
        elif kind == "move":
            assert gone.pop()[1:] == come.pop()[1:]


def test_any_other_change_is_no_result():
    """All scenes one change away from the right one are wrong, except by what the text leaves."""
    rng = np.random.default_rng(1)
    for i in range(12):
        before = scenes.sample(rng, Split.TRAIN, 2)
        edit, _, after = edits.sample(rng, before, edits.KINDS[i % 6])
        outcome = edit.outcome(before)
        for thing in after.things:
            changed = [after.without(thing.cell)]
            for name, values in (("shape", SHAPES), ("colour", COLOURS), ("size", SIZES)):
                for value in values:
                    if value != getattr(thing, name):
                        changed.append(after.put(thing._replace(**{name: value})))
            for cell in after.free():
                changed.append(after.without(thing.cell).put(thing._replace(cell=cell)))
            for scene in changed:
                new = set(scene.things) - (set(before.things) - {outcome.gone})
                free = thing not in before.things and len(new) == 1 and outcome.allows(*new)
                assert edit.satisfied(before, scene) == free
        for cell in after.free()[:3]:
            assert not edit.satisfied(before, after.put(Thing(cell, "cross", "black", "small")))


def test_freedom_and_its_limits():
    add = Edit("add", None, Description("cross", "blue"))
    for cell, size in ((0, "small"), (15, "large")):
        assert add.satisfied(SCENE, SCENE.put(Thing(cell, "cross", "blue", size)))
    assert not add.satisfied(SCENE, SCENE.put(Thing(0, "cross", "red", "small")))
    assert not add.satisfied(SCENE, SCENE.put(Thing(5, "cross", "blue", "small")))  # over the star
    move = Edit("move", Description("star"), Description(word="below", other=Description("ring")))
    assert move.satisfied(SCENE, Scene((RING, STAR._replace(cell=12))))
    assert not move.satisfied(SCENE, Scene((RING, STAR._replace(cell=11))))  # beside, not below
    assert not move.satisfied(SCENE, Scene((RING, STAR._replace(cell=12, size="large"))))
    assert not move.satisfied(SCENE, SCENE.put(STAR._replace(cell=12)))  # copied, not moved
    assert not move.satisfied(SCENE, Scene((RING._replace(cell=9), STAR._replace(cell=12))))
    grow = Edit("resize", Description("star"), Description(size="large"))
    assert grow.apply(SCENE) == Scene((STAR._replace(size="large"), RING))
    swap = Edit("replace", Description("star"), Description("cross"))
    for colour in ("red", "black"):
        assert swap.satisfied(SCENE, Scene((Thing(5, "cross", colour, "large"), RING)))


@pytest.mark.parametrize(
    "edit, scene",
    [
        (Edit("remove", Description("cross")), SCENE),  # none such
        (Edit("remove", Description("star")), SCENE.put(TWIN)),  # two such
        (Edit("recolour", Description("star"), Description(colour="red")), SCENE),  # is so
        (Edit("move", Description("star"), Description(place="middle")), SCENE),  # is there
        (Edit("move", Description("star"), Description(place="top left corner")), SCENE.put(TWIN)),
        (Edit("add", None, Description("star", place="top left corner")), SCENE.put(TWIN)),
        (Edit("bring", Description("star"), Description()), SCENE),  # without image 1
        (
            Edit("add", None, Description("star")),
            Scene(tuple(TWIN._replace(cell=c) for c in range(8))),
        ),
    ],
)
def test_impossible_edits_are_refused(edit, scene):
    with pytest.raises(ValueError):
        edit.apply(scene)


def test_open_places_are_taken_as_in_pictures_drawn_at_once():
    add = Edit("add", None, Description("cross", place="top row"))
    scene = Scene((Thing(1, "ring", "red", "small"),))
    for before, cell in ((Scene(), 1), (scene, 2)):  # nearest the middle
        (new,) = set(add.apply(before, rng=np.random.default_rng(7)).things) - set(before.things)
        assert new.cell == cell


def test_references_mean_one_thing_even_among_twins():
    rng = np.random.default_rng(2)
    seen = set()
    for i in range(48):
        scene = scenes.sample(rng, Split.TRAIN, 1 + i % 8)
        if i % 4 == 0:  # all alike: only places tell them apart
            scene = Scene(tuple(TWIN._replace(cell=t.cell) for t in scene.things))
        for thing in scene.things:
            name = refer(rng, scene, thing)
            assert name.find_all(scene) == (thing,)
            seen.add("place" if name.place else "relation" if name.word else "kind")
    assert seen == {"kind", "place", "relation"}


def test_shortest_references_are_usual():
    rng = np.random.default_rng(3)
    names = [refer(rng, SCENE, STAR) for _ in range(200)]
    assert sum(name == Description("star") for name in names) > 100
    assert len(set(names)) > 3


def test_pairs_bring_the_thing_as_it_is():
    rng = np.random.default_rng(4)
    for _ in range(12):
        edit, text, (source, before), after = edits.sample_pair(rng)
        assert "image 1" in text and "image 2" in text and len(text.split()) <= 32
        assert edit.satisfied(before, after, source) and held_out.is_clean(after)
        (come,) = set(after.things) - set(before.things)
        assert come[1:] == edit.thing.find(source)[1:]
        other = after.put(come._replace(size=next(s for s in SIZES if s != come.size)))
        assert not edit.satisfied(before, other, source)


def test_held_out_edits_touch_what_is_held_out():
    rng = np.random.default_rng(5)
    for _ in range(10):
        before = scenes.sample(rng, Split.HELD_OUT, 4)
        edit, _, after = edits.sample(rng, before, "recolour", Split.HELD_OUT)
        assert edit.satisfied(before, after)
        assert not (held_out.is_clean(before) and held_out.is_clean(after))


def test_full_and_empty_scenes():
    rng = np.random.default_rng(6)
    full = scenes.sample(rng, Split.TRAIN, 8)
    assert all(edits.sample(rng, full)[0].kind != "add" for _ in range(20))
    assert edits.sample(rng, Scene())[0].kind == "add"
    for scene, kind in ((full, "add"), (Scene(), "remove")):
        with pytest.raises(ValueError, match="found no edit"):
            edits.sample(rng, scene, kind)
    with pytest.raises(ValueError, match="no edits of kind blur"):
        edits.sample(rng, full, "blur")


@pytest.mark.parametrize(
    "kind, thing, message",
    [
        ("paint", Description("star"), "no edits of kind paint, only add"),
        ("add", Description("star"), "add takes no thing"),
        ("remove", None, "all other edits take one"),
    ],
)
def test_edits_that_are_none_are_refused(kind, thing, message):
    with pytest.raises(ValueError, match=message):
        Edit(kind, thing)


def test_edits_are_values():
    edit = Edit("remove", Description("star"))
    assert edit == Edit("remove", Description("star")) and len({edit, edit}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        edit.kind = "add"
