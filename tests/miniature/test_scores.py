"""Scores of pictures: right ones pass, wrong ones are told what is wrong with them."""

import numpy as np
import pytest

from clvr_jax.miniature import detect_eval, edits, scenes, scores
from clvr_jax.miniature.edits import Edit
from clvr_jax.miniature.goal import Goal, Group, Relation
from clvr_jax.miniature.held_out import Split
from clvr_jax.miniature.places import PLACES
from clvr_jax.miniature.prompts import Prompt, sample
from clvr_jax.miniature.readings import certain, read
from clvr_jax.miniature.references import Description
from clvr_jax.miniature.scene import CELLS, Scene, Thing, thing
from tests.miniature.perfect import renders


def perfect(*drawn):
    """Readings of a detector that never errs."""
    return certain(np.stack([scene.codes() for scene in drawn]))


def corner(name):
    return min(PLACES[name])


CIRCLE = Thing(corner("top left corner"), "circle", "red", "large")
STAR = Thing(corner("bottom right corner"), "star", "blue", "small")
GOAL = Goal(
    (Group(1, "circle", "red", "large", "top row"), Group(1, "star", "blue")),
    (Relation(0, "left of", 1),),
)


def test_renders_of_true_scenes_pass_and_empty_paper_does_not():
    rng = np.random.default_rng(0)
    drawn = [sample(rng, None, Split.TEST) for _ in range(60)]
    codes = np.stack([scene.codes() for _, scene in drawn])
    pictures = np.concatenate([renders(codes, range(60)), np.full((1, 64, 64, 3), 236, np.uint8)])
    readings = detect_eval.detect(pictures)
    verdicts = [scores.judge(prompt.goal, readings, i) for i, (prompt, _) in enumerate(drawn)]
    report = scores.prompt_report([prompt for prompt, _ in drawn], verdicts)
    assert report["overall"].value == 1.0 and report["overall"].low > 0.9
    assert all(fault["pictures"] == 0 for fault in report["faults"].values())
    assert sum(kind.trials for kind in report["kinds"].values()) == 60
    empty = scores.judge(drawn[0][0].goal, readings, 60)
    assert not empty.passed and {kind for kind, _ in empty.faults} == {"missing"}


@pytest.mark.parametrize(
    "things,kind,words",
    [
        ((CIRCLE,), "missing", "missing: blue star"),
        ((CIRCLE, STAR, thing(5, 1)), "extra", "extra: "),
        ((CIRCLE, STAR._replace(colour="red")), "colour", "should be blue"),
        ((CIRCLE, STAR._replace(shape="ring")), "shape", "should be a star"),
        ((CIRCLE._replace(size="small"), STAR), "size", "should be large"),
        ((CIRCLE._replace(cell=4), STAR), "place", "should be in: top row"),
        ((CIRCLE, STAR._replace(cell=12)), "relation", "is not left of the blue star"),
    ],
)
def test_a_fault_has_its_name(things, kind, words):
    verdict = scores.judge(GOAL, perfect(Scene(things)), 0)
    assert not verdict.passed and verdict.clean
    assert [name for name, _ in verdict.faults] == [kind]
    assert words in verdict.faults[0][1]


def test_unclear_pictures_fail_even_if_their_guess_is_right():
    codes = Scene((CIRCLE, STAR)).codes()[None]
    unsure = np.ones((1, CELLS))
    unsure[0, CIRCLE.cell] = 0.2
    verdict = scores.judge(GOAL, read(codes, unsure, np.array([True])), 0)
    assert verdict == (False, False, (("unclear", "unclear: top left corner"),))
    crowded = read(np.ones((1, CELLS), int), np.ones((1, CELLS)), np.array([True]))
    assert scores.judge(GOAL, crowded, 0).faults == (("unclear", "more than 8 things"),)


def test_faults_are_counted_by_picture_and_by_times():
    prompt = Prompt("", Goal((Group(2, "star"),)), "counting", 9.0)
    readings = perfect(Scene(), Scene((STAR, STAR._replace(cell=0))))
    report = scores.prompt_report(
        [prompt] * 2, [scores.judge(prompt.goal, readings, i) for i in range(2)]
    )
    assert report["faults"]["missing"] == {"pictures": 1, "times": 2}
    assert report["kinds"]["counting"][:2] == (1, 2)
    assert list(report["tiers"]) == ["2: 8 to 14"]


def spoilt(rng, scene):
    """A scene with up to two cells changed in any way."""
    for cell in rng.choice(CELLS, int(rng.integers(3)), replace=False):
        code = int(rng.integers(97)) * int(rng.random() < 0.7)
        if not code:
            scene = scene.without(int(cell))
        elif len(scene.things) < 8 or scene.at(int(cell)):
            scene = scene.put(thing(int(cell), code))
    return scene


@pytest.mark.parametrize("kind", scores.EDITS)
def test_an_edit_passes_just_if_it_is_satisfied(kind):
    rng = np.random.default_rng(1)
    for case in scores.edit_cases(Split.TEST, kind, 6):
        results = [case.after, case.before, *(spoilt(rng, case.after) for _ in range(8))]
        results += [spoilt(rng, case.before) for _ in range(4)]
        readings = perfect(*results)
        for i, after in enumerate(results):
            verdict = scores.judge_edit(case, readings, i)
            assert verdict.passed == case.edit.satisfied(case.before, after, case.source)
            assert verdict.passed == (verdict.changed and verdict.kept) == (not verdict.faults)
        nothing = scores.judge_edit(case, readings, 1)
        assert not nothing.changed and nothing.kept
        assert nothing.faults == ("not done", "nothing changed")


def test_what_changed_and_what_was_kept_are_told_apart():
    before = Scene((CIRCLE, STAR))
    edit = Edit("move", Description(shape="star"), Description(place="top right corner"))
    goes = STAR._replace(cell=corner("top right corner"))
    judged = lambda *things: scores.changed_and_kept(edit, before, Scene(things))
    assert judged(CIRCLE, goes) == (True, True)
    assert judged(CIRCLE, STAR, goes) == (False, True)  # it stands in both places
    assert judged(CIRCLE, STAR._replace(cell=1)) == (False, True)  # moved elsewhere
    assert judged(CIRCLE._replace(colour="blue"), goes) == (True, False)
    assert judged(goes) == (True, False)
    assert judged(CIRCLE, goes, thing(6, 3)) == (True, False)


def test_cases_are_the_same_whatever_their_number_and_of_their_split():
    few, more = (scores.edit_cases(Split.TEST, "move", n) for n in (2, 4))
    assert [(c.text, c.before, c.after) for c in more[:2]] == [
        (c.text, c.before, c.after) for c in few
    ]
    assert all(np.array_equal(a.shown[0].codes, b.shown[0].codes) for a, b in zip(few, more))
    brought = scores.edit_cases(Split.TEST, "bring", 1)[0]
    assert len(brought.shown) == 2 and brought.source is not None
    held = scores.edit_cases(Split.HELD_OUT, "add", 3)
    assert not any(set(case.after.things) <= set(case.before.things) for case in held)
    with pytest.raises(ValueError, match="no fixed edits of kind paint"):
        scores.edit_cases(Split.TEST, "paint", 1)
    with pytest.raises(ValueError, match="in train"):
        scores.edit_cases(Split.TRAIN, "move", 1)


def test_edit_report_counts_by_kind_and_references():
    drawn = [scores.edit_cases(Split.TEST, kind, 1)[0] for kind in ("add", "bring")]
    readings = perfect(drawn[0].after, drawn[1].before)
    verdicts = [scores.judge_edit(case, readings, i) for i, case in enumerate(drawn)]
    report = scores.edit_report(drawn, verdicts)
    assert report["kinds"]["add"]["passed"][:2] == (1, 1)
    assert report["references"]["2"]["passed"][:2] == (0, 1)
    assert report["references"]["2"]["kept"][:2] == (1, 1)


def test_exact_wants_clean_pictures():
    rng = np.random.default_rng(2)
    drawn = [scenes.sample(rng, Split.TEST) for _ in range(4)]
    codes = np.stack([scene.codes() for scene in drawn])
    tidy = np.array([True, False, True, True])
    wrong = codes.copy()
    wrong[2] = 0
    found = scores.exact(read(wrong, np.ones(codes.shape), tidy), codes)
    assert found.tolist() == [True, False, False, True]
    assert scores.EDITS[:-1] == edits.KINDS
