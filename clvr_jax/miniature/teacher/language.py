"""The teacher's own language: everything it says beside prompts and edits."""

from collections.abc import Collection, Sequence

from clvr_jax.miniature.assignment import POINTS
from clvr_jax.miniature.chance import Rng, pick
from clvr_jax.miniature.goal import ATTRIBUTES, Fault, Goal, Group, Relation
from clvr_jax.miniature.places import CELL_NAMES, COORDINATES, related
from clvr_jax.miniature.references import say
from clvr_jax.miniature.scene import Scene, Thing
from clvr_jax.miniature.sentences import names
from clvr_jax.miniature.teacher.changes import mark
from clvr_jax.miniature.teacher.sight import Sight
from clvr_jax.miniature.words import (
    ANYTHING,
    NUMBERS,
    PLURALS,
    article,
    enumerate_words,
    kind_name,
    kind_words,
    noun_phrase,
    place_phrase,
    relation_phrase,
    vary,
)

SEE = ("I see", "the picture shows", "now I see", "in the picture I see")
NOTHING = ("nothing", "nothing at all")
WORKED = ("that worked", "the last change worked", "good, this is better")
SAME = ("that did not help", "the last change did not work")
WORSE = ("that made it worse", "the last change did harm")
MISSING = ("{group} is missing", "{group} is not there")
MISSING_SOME = ("{group} are missing", "{group} are not there")
WRONG = {
    "extra": ("{thing} is not asked for", "{thing} should not be there"),
    "colour": ("{thing} should be {wanted}", "{thing} has the wrong colour, it should be {wanted}"),
    "size": ("{thing} should be {wanted}", "{thing} has the wrong size, it should be {wanted}"),
    "looks": ("{thing} should be {wanted}", "{thing} is wrong, it should be {wanted}"),
    "place": ("{thing} should be {wanted}", "{thing} is in the wrong place, not {wanted}"),
    "relation": ("{thing} should be {wanted}", "{thing} is not {wanted}"),
    "unclear": ("{thing} is not clear", "{thing} is not clean"),
}
UNTIDY = ("the picture is not clean", "the picture is a mess")
MORE = ("and more is wrong", "and that is not all")
ACT = ("so I {edit}", "I {edit}", "next I {edit}", "now I {edit}")
KEEP = ("", " and keep the rest", " and keep all else as it is")
BACK = ("{image} was better, so I go back to it", "I go back to {image}, it was better")
ANEW = ("I draw a new picture", "it is better to draw it anew", "I begin again with a new picture")
WHOLE = ("I draw all of it at once", "I draw it in one picture", "I try all at once")
NEED = ("I need {things}", "the picture needs {things}", "I have to draw {things}")
BEGIN = ("I begin with {some}, the rest comes later", "first I draw {some} and later the rest")
DONE = ("all is right", "this is what was asked for", "nothing is missing and nothing is wrong")
STOP = ("I stop here", "I am done", "so I stop")

NONE = "none"
BESIDE = "more"  # than things, or than as many as there may be
ASKED = "asked"
NO_FAULT = "nothing is wrong"
SAME_PICTURE = "nothing has changed"
GONE = ("{thing} is gone", "{thing} is not there any more")
NEW = ("{thing} is new", "{thing} has been added")
MOVED = ("{thing} is now {place}", "{thing} has moved, it is now {place}")
BECAME = ("{thing} is now {other}", "{thing} has become {other}")
SHOWS = ("the picture shows", "there is", "I see", "this is a picture of")
WHICH = ("in the first picture", "in the second picture")
BOTH_RIGHT = ("both are right", "both show all that was asked for")
BOTH_WRONG = ("both are wrong", "neither is better than the other")


def sentence(*clauses: str) -> str:
    """Return clauses, the empty ones left out, as sentences."""
    return " ".join(f"{clause[0].upper()}{clause[1:]}." for clause in clauses if clause)


def a(rng: Rng, thing: Thing, sized: bool = True) -> str:
    """Return "a small red star"."""
    return article(kind_words(rng, thing.shape, thing.colour, thing.size if sized else None))


def spot(rng: Rng, cell: int) -> str:
    """Return "in the top left corner": the words for one cell."""
    return place_phrase(rng, CELL_NAMES[cell])


def placed(rng: Rng, thing: Thing) -> str:
    """Return "a small red star in the top left corner"."""
    return f"{a(rng, thing)} {spot(rng, thing.cell)}"


def the(rng: Rng, thing: Thing, scene: Scene) -> str:
    """Return words that name a thing of the scene and no other: "the red star"."""
    return say(rng, mark(scene, thing))


def some(rng: Rng, group: Group) -> str:
    """Return "two red stars in the top row"."""
    words = noun_phrase(rng, *group[:4])
    return f"{words} {place_phrase(rng, group.place)}" if group.place else words


def usual(group: Group) -> str:
    """Return what a group asks for, always in the same words: "two small stars in the top row"."""
    noun = {**PLURALS, **ANYTHING}[group.shape or "thing"] if group.count > 1 else group.shape
    kind = kind_name(noun, group.colour, group.size)
    what = f"{NUMBERS[group.count - 1]} {kind}" if group.count > 1 else article(kind)
    return f"{what} in the {group.place}" if group.place else what


def usual_relation(goal: Goal, relation: Relation, *cells: int) -> str:
    """Return "the star is left of the red ring", in the words of `usual` but for its places.

    Args:
      goal: what is asked for.
      relation: one of its.
      cells: where its things are, if that is to be said: "the star at b2 is left of ...".

    Raises:
      ValueError: no words tell its things from others.
    """
    ends = [goal.groups[i] for i in (relation.first, relation.second)]
    if not all(names(goal.groups, i) for i in (relation.first, relation.second)):
        raise ValueError(
            f"{f' {relation.word} '.join(map(usual, ends))}: no words tell both from all else that "
            "is asked for; say colours or sizes"
        )
    at = [f" at {COORDINATES[cell]}" for cell in cells] or ["", ""]
    first, second = (
        f"{kind_name(end.shape or 'thing', end.colour, end.size)}{here}"
        for end, here in zip(ends, at, strict=True)
    )
    return f"the {first} is {relation.word} the {second}"


def listed(goal: Goal) -> list[str]:
    """Return all that a goal asks for as clauses: its things in their order, then its relations."""
    things = enumerate_words([usual(group) for group in goal.groups] or [NOTHING[0]])
    return [things, *(usual_relation(goal, relation) for relation in goal.relations)]


def checked(rng: Rng, goal: Goal, sight: Sight) -> list[str]:
    """Return what there is for all that is asked for, and whether that is right.

    First every group is looked for (see `sought`). Then it is said of each thing whether it serves
    for one, of what is not found what is to become it or that it is missing (see `compared`), what
    is wrong beside, and how relations stand. Of what is missing, no relation can be told. Where the
    picture holds more than that, it is said instead of all that would be wrong.
    """
    slots, things, _ = goal.assign(sight.scene)
    given: list[list[Thing]] = [[] for _ in goal.groups]
    for slot, thing in zip(slots, things, strict=True):
        given[slot] += [thing] if thing else []
    right = [
        [t for t in things if group.allows(t) and t.cell not in sight.overlooked]
        for group, things in zip(goal.groups, given, strict=True)
    ]
    used = {thing for found in right for thing in found}
    said = [
        sought(group, found, sight.scene, used)
        for group, found in zip(goal.groups, right, strict=True)
    ]
    said.append(serving(sight, used))
    if not sight.tidy:  # nothing else matters
        return [*said, vary(rng, UNTIDY)]
    faults = sight.faults(goal)
    because = lambda told, wrong: (
        f"{told}, {_wrong(rng, goal, sight.scene, wrong[0])}" if wrong else told
    )
    for index, group in enumerate(goal.groups):
        count = group.count - len(right[index])
        if count:
            rest = sorted(thing for thing in given[index] if thing not in used)
            own = [f for f in faults if f.group == index and f.kind not in ("missing", "relation")]
            said.append(because(compared(group._replace(count=count), rest), _together(own)))
    for fault in faults:
        if fault.group is None:
            wrong = _wrong(rng, goal, sight.scene, [fault])
            at = f"but {COORDINATES[fault.thing.cell]} unclear, " if fault.kind == "unclear" else ""
            said.append(f"{at}{wrong}")
    for relation in goal.relations:
        ends = given[relation.first], given[relation.second]
        if all(ends):
            cells = [thing.cell for (thing,) in ends]
            told = f"{usual_relation(goal, relation, *cells)}: {stand(relation.word, *cells)}"
            said.append(because(told, [[f] for f in faults if f.relation == relation]))
    return said


def sought(group: Group, found: Sequence[Thing], scene: Scene, used: Collection[Thing]) -> str:
    """Return what is asked for and what serves for it: what is all as asked.

    "A ring at c3: a small red ring, ring for ring, c3 asked". If that is not enough, what comes
    next to it is named, up to the point why it does not serve: "a blue star at b2: a small red
    star, red for blue no", or that it serves already: "a ring at c3: a small red ring, ring for
    ring, used". So what is looked for may be found by its likeness, and what is found is compared
    word by word.

    Args:
      group: what is asked for.
      found: what there is for it.
      scene: what there is.
      used: what serves for this group or another.
    """
    said = [[*_points(group, t), f"{COORDINATES[t.cell]} {ASKED}"] for t in sorted(found)]
    near = [thing for thing in scene.things if thing in used or not group.allows(thing)]
    if len(found) < group.count and near:
        thing = min(near, key=lambda thing: sum(POINTS[name] for name in group.wrong(thing)))
        points = _points(group, thing)
        wrong = [i for i, point in enumerate(points) if point.endswith(" no")]
        said.append(points[: wrong[0] + 1] if wrong else [*points, "used"])
    told = ", ".join(point for points in said for point in points)
    return f"{usual(group)} {told}" if told else f"{usual(group)}: {NONE}"


def serving(sight: Sight, used: Collection[Thing]) -> str:
    """Return "so b2 asked, c2 no unclear and b3 asked": what things serve for, and if unclear.

    If there is more in the picture than its things, "more no" comes last.
    """
    unclear = lambda thing: " unclear" * (thing.cell in sight.unclear)
    serves = lambda thing: f"{ASKED if thing in used else 'no'}{unclear(thing)}"
    said = [f"{COORDINATES[t.cell]} {serves(t)}" for t in sight.scene.things]
    return f"so {enumerate_words([*(said or [NONE]), *[f'{BESIDE} no'] * (not sight.tidy)])}"


def compared(group: Group, things: Sequence[Thing]) -> str:
    """Return what is asked for, what is there for it, and all that is asked of that.

    "a blue star at b2: a small red star, red for blue no, star for star". What is there stands
    beside what is asked for, so that no more than two words are compared at once. Where fewer
    things are there than are asked for, the rest is said to be missing.
    """
    said = [point for thing in things for point in _points(group, thing)]
    absent = group.count - len(things)
    if absent:
        which = "it" if group.count == 1 else number(absent)
        said.append(f"{which} {'is' if absent == 1 else 'are'} missing")
    return f"{usual(group)}{'' if things else ':'} {', '.join(said)}"


def _points(group: Group, thing: Thing) -> list[str]:
    """Return "at b2: a small red star", "red for blue no", "star for star"."""
    wrong, said = group.wrong(thing), [f"at {found(thing)}"]
    for name in ("size", "colour", "shape", "place"):
        asked = getattr(group, name)
        if asked:
            there = COORDINATES[thing.cell] if name == "place" else getattr(thing, name)
            said.append(f"{there} for {asked}{' no' * (name in wrong)}")
    return said


def found(thing: Thing, unclear: bool = False) -> str:
    """Return "b2: a small red star", or "b2: a small unclear red star"."""
    size = f"{thing.size}{' unclear' * unclear}"
    return f"{COORDINATES[thing.cell]}: {article(kind_name(thing.shape, thing.colour, size))}"


def stand(word: str, first: int, second: int) -> str:
    """Return "b2 above b3", with "no" if that is not so."""
    said = f"{COORDINATES[first]} {word} {COORDINATES[second]}"
    return said if related(first, word, second) else f"{said} no"


def number(count: int) -> str:
    """Return "none", "one", "two"."""
    return NUMBERS[count - 1] if count else NONE


def several(count: int) -> str:
    """Return "one thing", "three things"."""
    return f"{number(count)} thing{'s' * (count != 1)}"


def seen(rng: Rng, sight: Sight) -> str:
    """Return "I see a1: a small red star at a1 and c2: a large blue ring at c2"."""
    return f"{vary(rng, SEE)} {all_of(sight) or pick(rng, NOTHING)}"


def all_of(sight: Sight) -> str:
    """Return "a1: a small red star at a1 and c2: a large blue ring at c2", in the order of cells.

    A thing has its place on both sides: who reads on from either finds the other. If it is unclear,
    that is said twice: among its looks, where it is seen, and behind the second place, where it is
    found again. If there is more in the picture, "more" comes last.
    """
    told = []
    for thing in sight.scene.things:
        unclear = thing.cell in sight.unclear
        told.append(f"{found(thing, unclear)} at {COORDINATES[thing.cell]}{' unclear' * unclear}")
    told += [BESIDE] * (not sight.tidy)
    return enumerate_words(told) if told else ""


def wrong(rng: Rng, goal: Goal, sight: Sight) -> list[tuple[str, str]]:
    """Return the kinds ("colour", "shape and size") and the words of what is wrong.

    Missing things of one group are said together, and so is all that is wrong with the looks of
    one thing.
    """
    said = []
    for faults in _together(sight.faults(goal)):
        kinds = dict.fromkeys(fault.kind for fault in faults)
        said.append((" and ".join(kinds), _wrong(rng, goal, sight.scene, faults)))
    return said + [("unclear", vary(rng, UNTIDY))] * (not sight.tidy)


def _together(faults: Sequence[Fault]) -> list[list[Fault]]:
    """Put together what is told in one clause: see `wrong`."""
    found: dict[tuple, list[Fault]] = {}
    for fault in faults:
        what = "looks" if fault.kind in ATTRIBUTES else fault.kind
        found.setdefault((what, *fault[1:]), []).append(fault)
    return list(found.values())


def _wrong(rng: Rng, goal: Goal, scene: Scene, faults: list[Fault]) -> str:
    """Return faults of one thing, or of the missing things of one group, as a clause."""
    kind, index, thing, relation = faults[0]
    group = None if index is None else goal.groups[index]
    if kind == "missing":
        form = vary(rng, MISSING if len(faults) == 1 else MISSING_SOME)
        return form.format(group=some(rng, group._replace(count=len(faults))))
    if len(faults) > 1 or kind == "shape":
        kind = "looks"
    form, wanted = vary(rng, WRONG[kind]), ""
    if kind == "relation":
        served = dict(zip(*goal.assign(scene)[:2], strict=True))
        wanted = f"{relation_phrase(rng, relation.word)} {the(rng, served[relation.second], scene)}"
    elif kind == "place":
        wanted = place_phrase(rng, group.place)
    elif kind == "looks":
        size = group.size if any(fault.kind == "size" for fault in faults) else None
        wanted = article(kind_words(rng, group.shape, group.colour, size))
    elif kind in ATTRIBUTES:
        wanted = getattr(group, kind)
    return form.format(thing=the(rng, thing, scene), wanted=wanted)
