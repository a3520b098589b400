"""How good drawn pictures are: what a detector reads in them against what was asked for."""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from clvr_jax.backends.requests import FAULTS
from clvr_jax.miniature import edits, samples
from clvr_jax.miniature.edits import Edit
from clvr_jax.miniature.goal import Fault, Goal
from clvr_jax.miniature.held_out import Split
from clvr_jax.miniature.pictures import Picture, picture_of
from clvr_jax.miniature.places import CELL_NAMES
from clvr_jax.miniature.prompts import TIERS, Prompt, tier
from clvr_jax.miniature.readings import SURE, Readings
from clvr_jax.miniature.scene import CELLS, MOST, Scene
from clvr_jax.miniature.words import article, kind_name
from clvr_jax.statistics import Rate, rate

EDITS = (*edits.KINDS, *edits.PAIR_KINDS)
UNCLEAR = "unclear"  # the fault of a picture that holds more than clean things
_SEEDS = {Split.TEST: 20_260_101, Split.DEV: 20_260_102, Split.HELD_OUT: 20_260_103}


class Verdict(NamedTuple):
    """What is said of a picture that was drawn from a prompt.

    Attributes:
      passed: it is clean and holds just what was asked for.
      clean: it holds clean things and nothing else.
      faults: (kind of `FAULTS`, words); none if it passed. Those of an unclear picture are of what
        its things are most like.
    """

    passed: bool
    clean: bool
    faults: tuple[tuple[str, str], ...]


class EditCase(NamedTuple):
    """An edit to be drawn.

    Attributes:
      kind: of `EDITS`.
      text: the instruction.
      edit: the same as data.
      before: the scene that is changed.
      source: image 1, where there are two.
      shown: the pictures given, in order; the last is of `before`.
      after: one right result.
    """

    kind: str
    text: str
    edit: Edit
    before: Scene
    source: Scene | None
    shown: tuple[Picture, ...]
    after: Scene


class EditVerdict(NamedTuple):
    """What is said of a picture that was edited.

    Attributes:
      passed: it is clean, the change is made, and all else is as it was.
      clean: it holds clean things and nothing else.
      changed: the change is made.
      kept: all that the text does not name is as it was; where the text asks for a thing in a free
        place, one new thing may stand anywhere. An unclear picture is taken for what it is most
        like in both; one with more than `MOST` things has neither.
      faults: words; none if it passed.
    """

    passed: bool
    clean: bool
    changed: bool
    kept: bool
    faults: tuple[str, ...]


def judge(goal: Goal, readings: Readings, i: int) -> Verdict:
    """Judge picture i by what was read in it."""
    clean = bool(readings.clean[i])
    found = [] if clean else [(UNCLEAR, _unclear(readings, i))]
    if readings.counts[i] <= MOST:
        found += [
            (fault.kind, fault_words(fault, goal)) for fault in goal.faults(readings.scene(i))
        ]
    return Verdict(not found, clean, tuple(found))


def judge_edit(case: EditCase, readings: Readings, i: int) -> EditVerdict:
    """Judge picture i as the result of an edit."""
    clean = bool(readings.clean[i])
    said = [] if clean else [_unclear(readings, i)]
    if readings.counts[i] > MOST:
        return EditVerdict(False, clean, False, False, tuple(said))
    after = readings.scene(i)
    changed, kept = changed_and_kept(case.edit, case.before, after, case.source)
    if not (changed and kept):
        said.append("not done" if kept else "something else changed" if changed else "wrong change")
        said += _moved(case.before, after) or ["nothing changed"]
    return EditVerdict(clean and changed and kept, clean, changed, kept, tuple(said))


def changed_and_kept(
    edit: Edit, before: Scene, after: Scene, source: Scene | None = None
) -> tuple[bool, bool]:
    """Return (changed, kept), see `EditVerdict`; both just if the edit is satisfied."""
    outcome = edit.outcome(before, source)
    gone = outcome.gone
    rest = set(before.things) - {gone}
    come = set(after.things) - rest
    at_place = {thing for thing in come if gone and thing.cell == gone.cell}
    arrives = bool(outcome.cells) and (gone is None or gone.cell not in outcome.cells)
    kept = rest <= set(after.things) and len(come - at_place) <= arrives
    if not outcome.cells or arrives:  # the place of what goes must be empty
        changed = not at_place and (not arrives or any(map(outcome.allows, come)))
    else:
        changed = any(map(outcome.allows, at_place))
    return changed, kept


def edit_cases(split: Split, kind: str, count: int) -> list[EditCase]:
    """Return the first `count` edits of a kind: always the same, whatever the count.

    Raises:
      ValueError: the kind is unknown, or the split is that of training, which has no fixed edits.
    """
    if kind not in EDITS or split not in _SEEDS:
        raise ValueError(
            f"no fixed edits of kind {kind} in {split.value}; kinds are {', '.join(EDITS)}, splits "
            + ", ".join(each.value for each in _SEEDS)
        )
    stream = EDITS.index(kind)
    return [_case(samples.generator(_SEEDS[split], i, stream), split, kind) for i in range(count)]


def _case(rng: np.random.Generator, split: Split, kind: str) -> EditCase:
    if kind in edits.PAIR_KINDS:
        edit, text, (source, before), after = edits.sample_pair(rng, split)
        shown = picture_of(source, rng), picture_of(before, rng)
        return EditCase(kind, text, edit, before, source, shown, after)
    edit, text, before, after = edits.sample_scene(rng, kind, split)
    return EditCase(kind, text, edit, before, None, (picture_of(before, rng),), after)


def exact(readings: Readings, codes: Int[np.ndarray, "b cell"]) -> Bool[np.ndarray, "b"]:
    """Say which pictures are read as clean ones of just the scenes they show."""
    return readings.clean & (readings.codes == codes).all(1)


def rates(keys: Iterable[Hashable], passes: Iterable[bool]) -> dict[Any, Rate]:
    """Return the rate of each key, keys in the order in which they first come."""
    flags: dict[Any, list[bool]] = {}
    for key, passed in zip(keys, passes, strict=True):
        flags.setdefault(key, []).append(passed)
    return {key: rate(values) for key, values in flags.items()}


def prompt_report(prompts: Sequence[Prompt], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Return `overall`, `clean`, `kinds` and `tiers` as rates, and `faults`.

    A fault kind counts the `pictures` that have it and how many `times` it is found.
    """
    passes = [verdict.passed for verdict in verdicts]
    found = [Counter(kind for kind, _ in verdict.faults) for verdict in verdicts]
    tiers = rates([tier(prompt.complexity) for prompt in prompts], passes)
    return {
        "overall": rate(passes),
        "clean": rate(verdict.clean for verdict in verdicts),
        "kinds": rates([prompt.kind for prompt in prompts], passes),
        "tiers": {f"{n}: {tier_name(n)}": tiers[n] for n in sorted(tiers)},
        "faults": {
            kind: {"pictures": sum(kind in c for c in found), "times": sum(c[kind] for c in found)}
            for kind in FAULTS
        },
    }


def edit_report(cases: Sequence[EditCase], verdicts: Sequence[EditVerdict]) -> dict[str, Any]:
    """Return rates of `passed`, `changed`, `kept` and `clean`, by kind and number of references."""
    keys = {
        "kinds": [case.kind for case in cases],
        "references": [str(len(case.shown)) for case in cases],
    }
    report: dict[str, Any] = {}
    for name, of in keys.items():
        report[name] = {key: {} for key in dict.fromkeys(of)}
        for field in ("passed", "changed", "kept", "clean"):
            for key, value in rates(of, [getattr(each, field) for each in verdicts]).items():
                report[name][key][field] = value
    return report


def tier_name(number: int) -> str:
    """Return the complexities of a tier in words."""
    low, high = (0.0, *TIERS)[number], (*TIERS, None)[number]
    return f"{low:g} and more" if high is None else f"{low:g} to {high:g}"


def fault_words(fault: Fault, goal: Goal) -> str:
    """Return a fault in words, e.g. "red circle should be blue"."""
    group = None if fault.group is None else goal.groups[fault.group]
    asked = group and kind_name(*group[1:4])
    if fault.kind == "missing":
        return f"missing: {asked}" + (f", {group.place}" if group.place else "")
    thing = f"{kind_name(*fault.thing[1:])}, {CELL_NAMES[fault.thing.cell]}"
    if fault.kind == "extra":
        return f"extra: {thing}"
    if fault.kind == "place":
        return f"{thing}, should be in: {group.place}"
    if fault.kind == "relation":
        other = kind_name(*goal.groups[fault.relation.second][1:4])
        return f"{thing}, is not {fault.relation.word} the {other}"
    wanted = getattr(group, fault.kind)
    return f"{thing}, should be {article(wanted) if fault.kind == 'shape' else wanted}"


def _unclear(readings: Readings, i: int) -> str:
    """Say where a picture is not clean."""
    if readings.counts[i] > MOST:
        return f"more than {MOST} things"
    cells = [CELL_NAMES[cell] for cell in np.flatnonzero(readings.confidence[i] < SURE)]
    if len(cells) > 3:
        return f"unclear in {len(cells)} places"
    return f"unclear: {', '.join(cells)}" if cells else "paper not clean"


def _moved(before: Scene, after: Scene) -> list[str]:
    """Say what differs, place by place."""
    said = []
    of = lambda thing: kind_name(*thing[1:]) if thing else "empty"
    for cell in range(CELLS):
        old, new = before.at(cell), after.at(cell)
        if old != new:
            said.append(f"{CELL_NAMES[cell]}: {of(old)} → {of(new)}")
    return said
