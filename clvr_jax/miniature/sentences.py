"""Goals in words: lists of things, places before or behind, relations in or after the list."""

import functools

import numpy as np

from clvr_jax.miniature import words
from clvr_jax.miniature.chance import pick, shuffle
from clvr_jax.miniature.goal import Goal, Group

VERBS = ("draw", "paint", "show", "make", "create", "sketch")
ASKS = (*VERBS, "draw me", "paint me", "show me", "make me", "give me")  # "please" may come before
WISHES = ("i want", "i would like", "i need")
FRAMES = (
    "a picture of",
    "a picture with",
    "an image of",
    "an image showing",
    "a scene with",
    "a drawing of",
    "a painting of",
    "a canvas with",
)
THERE = ("there is", "there are")  # with one thing first, with several first
ALSO = ("there is also", "there are also")
EMPTY = "an empty picture"


@functools.lru_cache(4096)
def names(groups: tuple[Group, ...], index: int) -> tuple[tuple, ...]:
    """Return what may be said to mean one group and no other, as (shape, colour, size).

    Each is said of the group, no other group could be meant, the shortest come first; the shape
    is always said where it is known. Empty if the group has none: then nothing can refer to it.
    """
    group = groups[index]
    if group.count > 1:
        return ()
    colours, sizes = {None, group.colour}, {None, group.size}
    found = [
        (group.shape, colour, size)
        for colour in sorted(colours, key=str)
        for size in sorted(sizes, key=str)
        if not any(o.may_be(group.shape, colour, size) for o in groups if o is not group)
        and (group.shape or colour or size)
    ]
    return tuple(sorted(found, key=lambda name: sum(part is not None for part in name)))


def write(goal: Goal, rng: np.random.Generator) -> str:
    """Return a prompt for a goal.

    Raises:
      ValueError: a group in a relation cannot be named apart from the others.
    """
    if not goal.groups:
        return words.finish(rng, [EMPTY])
    groups = goal.groups
    call = lambda i: "the " + words.kind_words(rng, *pick(rng, names(groups, i)))
    phrase = [words.noun_phrase(rng, *group[:4]) for group in groups]

    pairs, late, tails = [], [], {}
    inside = set()  # groups whose item of the list is spoken for
    for relation in goal.relations:
        first, word, second = relation
        if not names(groups, first) or not names(groups, second):
            raise ValueError(f"no words tell the things of {relation} from others in {goal}")
        saying, way = words.relation_phrase(rng, word), rng.random()
        fresh = first not in inside and groups[first].place is None
        if fresh and second not in inside and groups[second].place is None and way < 0.5:
            pairs.append(f"{phrase[first]} {saying} {phrase[second]}")
            inside |= {first, second}
        elif fresh and second not in tails and way < 0.7:
            tails[first] = f"{phrase[first]} {saying} {call(second)}"
            inside.add(first)
        else:
            late.append(f"{call(first)} is {saying} {call(second)}")

    plain, fronted = [*pairs], []
    awaited = {r.second for r in goal.relations if r.first in tails}  # "the" comes after them
    for i, group in enumerate(groups):
        if i in inside:
            continue
        way = rng.random()
        if group.place is None:
            plain.append(phrase[i])
        elif way < 0.6 or i in awaited or (way > 0.85 and not names(groups, i)):
            plain.append(f"{phrase[i]} {words.place_phrase(rng, group.place)}")
        elif way < 0.85:
            verb = pick(rng, ("is", "there is") if group.count == 1 else ("are", "there are"))
            fronted.append(f"{words.place_phrase(rng, group.place)} {verb} {phrase[i]}")
        else:
            plain.append(phrase[i])
            late.append(f"{call(i)} is {words.place_phrase(rng, group.place)}")
    plain = shuffle(rng, plain) + list(tails.values())
    return words.finish(rng, _lists(rng, plain) + fronted + shuffle(rng, late))


def _lists(rng: np.random.Generator, items: list[str]) -> list[str]:
    """Return the sentences that list items: none, one, or two for a long list."""
    if not items:
        return []
    cut = len(items)
    if len(items) > 3 and rng.random() < 0.3:
        cut = 2 + int(rng.random() * (len(items) - 2))
    first = words.enumerate_words(items[:cut])
    if (way := rng.random()) < 0.55:
        first = f"{_opener(rng)} {first}"
    elif way < 0.7:
        first = f"{_agree(THERE, items[0])} {first}"
    rest = items[cut:]
    return [first, f"{_agree(ALSO, rest[0])} {words.enumerate_words(rest)}"] if rest else [first]


def _opener(rng: np.random.Generator) -> str:
    """Return words with a list behind, e.g. "please draw", "i want a picture of"."""
    way = rng.random()
    if way < 0.25:
        return pick(rng, FRAMES)
    lead = pick(rng, WISHES) if way < 0.4 else pick(rng, ASKS)
    lead = f"please {lead}" if 0.4 < way < 0.5 else lead
    return f"{lead} {pick(rng, FRAMES)}" if rng.random() < 0.3 else lead


def openers() -> tuple[str, ...]:
    """Return all openers of lists."""
    leads = (*WISHES, *ASKS, *(f"please {ask}" for ask in ASKS))
    return (*leads, *FRAMES, *(f"{lead} {frame}" for lead in leads for frame in FRAMES))


def _agree(forms: tuple[str, str], item: str) -> str:
    """Return "there is" before one thing, "there are" before several."""
    return forms[item.split()[0] in words.NUMBERS[1:]]
