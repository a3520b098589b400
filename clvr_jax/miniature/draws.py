"""Goals at random, kind by kind."""

from collections.abc import Callable

from clvr_jax.miniature import held_out, scenes
from clvr_jax.miniature.chance import Rng, pick
from clvr_jax.miniature.goal import Goal, Group, Relation
from clvr_jax.miniature.held_out import Split
from clvr_jax.miniature.places import AREAS, OPPOSITE, PLACES, RELATIONS, SPOTS
from clvr_jax.miniature.scene import SHAPES, SIZES
from clvr_jax.miniature.sentences import names

MIXES = {f"mix{n}": n for n in range(3, 9)}  # name -> how many things
KINDS = ("single", "colour", "two", "counting", "position", "attribution", *MIXES)
HELD_OUT_KINDS = tuple(kind for kind in KINDS if kind not in ("single", "two"))  # name a pair


def draw(kind: str, rng: Rng, split: Split) -> Goal | None:
    """Return a goal of a kind of `KINDS`, or None if this draw led to none.

    It names nothing held out; in `Split.HELD_OUT` it does, at least one pair or relation.
    """
    goal = _DRAWS[kind](rng, split)
    return _hold(goal, rng) if split is Split.HELD_OUT else goal


def pairs(groups: tuple[Group, ...], rng: Rng) -> list[tuple[int, int]]:
    """Return the pairs of groups that a relation can name, each once, in random order."""
    single = [i for i in range(len(groups)) if names(groups, i)]
    pairs = [(a, b) for k, a in enumerate(single) for b in single[k + 1 :]]
    keys = rng.random((len(pairs), 2)).tolist()
    mixed = sorted(zip(keys, pairs))
    return [pair if key[1] < 0.5 else pair[::-1] for key, pair in mixed]


def _maybe(rng: Rng, options: tuple[str, ...], chance: float) -> str | None:
    return pick(rng, options) if rng.random() < chance else None


def _somewhere(rng: Rng) -> str:
    return pick(rng, SPOTS if rng.random() < 0.1 else AREAS)


def _coloured(rng: Rng, shape: str, split: Split) -> tuple[str, str | None]:
    """A shape with a trained colour, which is said in a third of the cases."""
    shape, colour = scenes.kind(rng, shape, None, split)
    return shape, colour if rng.random() < 0.35 else None


def _single(rng: Rng, split: Split) -> Goal:
    return Goal((Group(1, pick(rng, SHAPES), size=_maybe(rng, SIZES, 0.25)),))


def _colour(rng: Rng, split: Split) -> Goal:
    return Goal((Group(1, *scenes.kind(rng, None, None, split), _maybe(rng, SIZES, 0.25)),))


def _two(rng: Rng, split: Split) -> Goal:
    first = pick(rng, SHAPES)
    second = pick(rng, [shape for shape in SHAPES if shape != first])
    return Goal(tuple(Group(1, s, size=_maybe(rng, SIZES, 0.2)) for s in (first, second)))


def _counting(rng: Rng, split: Split) -> Goal:
    shape, colour = scenes.kind(rng, None, None, split)
    shape = shape if rng.random() < 0.93 else None
    colour = colour if shape is None or rng.random() < 0.35 else None
    count = 2 + int(rng.random() * 7)
    group = Group(count, shape, colour, _maybe(rng, SIZES, 0.15))
    if count > 5 or rng.random() < 0.7:
        return Goal((group,))
    other, colour = scenes.kind(rng, pick(rng, [s for s in SHAPES if s != shape]), None, split)
    count = 1 + int(rng.random() * min(4, 8 - count))
    return Goal((group, Group(count, other, colour if group.colour else None)))


def _position(rng: Rng, split: Split) -> Goal:
    first = pick(rng, SHAPES)
    if rng.random() < 0.35:
        kind = _coloured(rng, first, split)
        return Goal((Group(1, *kind, _maybe(rng, SIZES, 0.1), _somewhere(rng)),))
    second = pick(rng, [shape for shape in SHAPES if shape != first])
    groups = tuple(
        Group(1, *_coloured(rng, shape, split), _maybe(rng, SIZES, 0.1))
        for shape in (first, second)
    )
    if rng.random() < 0.3:
        return Goal(tuple(group._replace(place=_somewhere(rng)) for group in groups))
    return _relate(groups, 1, rng, split)


def _attribution(rng: Rng, split: Split) -> Goal:
    first = scenes.kind(rng, None, None, split)
    while True:
        second = scenes.kind(rng, None, None, split)
        if second[0] != first[0] and second[1] != first[1]:
            return Goal(tuple(Group(1, *kind, _maybe(rng, SIZES, 0.2)) for kind in (first, second)))


def _mix(total: int) -> Callable[[Rng, Split], Goal]:
    """Return the draw of goals with `total` things in two or more groups."""

    def draw(rng: Rng, split: Split) -> Goal:
        groups: dict[Group, None] = {}
        left = total
        while left:
            most = left if groups else left - 1  # two groups at least
            count = 1 if rng.random() < 0.7 else min(most, 2 + int(rng.random() * 3))
            shape, colour = scenes.kind(rng, None, None, split)
            shape = shape if rng.random() < 0.96 else None
            colour = colour if shape is None or rng.random() < 0.7 else None
            size = _maybe(rng, SIZES, 0.3)
            place = _somewhere(rng) if rng.random() < 0.25 else None
            if place and len(PLACES[place]) < count:
                place = None
            group = Group(1, shape, colour, size, place)
            if group not in groups:
                groups[group] = count
                left -= count
        found = tuple(group._replace(count=count) for group, count in groups.items())
        return _relate(found, int(rng.random() * (1 + total / 2.5)), rng, split)

    return draw


def _relate(groups: tuple[Group, ...], most: int, rng: Rng, split: Split) -> Goal:
    """Return a goal of the groups with at most that many relations, none of them held out."""
    relations = []
    for first, second in pairs(groups, rng)[:most] if most else ():
        shapes = groups[first].shape, groups[second].shape
        trained = [word for word in RELATIONS if not held_out.is_held(shapes[0], word, shapes[1])]
        words = RELATIONS if split is Split.HELD_OUT else trained
        relations.append(Relation(first, pick(rng, words), second))
    return Goal(groups, tuple(relations))


def _hold(goal: Goal, rng: Rng) -> Goal | None:
    """Return the goal with a held-out pair or relation put in, or None if things became alike."""
    groups = list(goal.groups)
    if goal.relations and rng.random() < 0.5:
        relation = pick(rng, goal.relations)
        shape, word, other = pick(rng, held_out.COMBINATIONS)
        if rng.random() < 0.5:
            shape, word, other = other, OPPOSITE[word], shape
        groups[relation.first] = groups[relation.first]._replace(shape=shape)
        groups[relation.second] = groups[relation.second]._replace(shape=other)
        relations = tuple(r._replace(word=word) if r is relation else r for r in goal.relations)
    else:
        shape, colour = pick(rng, sorted(held_out.PAIRS))
        index = int(rng.random() * len(groups))
        groups[index] = groups[index]._replace(shape=shape, colour=colour)
        relations = goal.relations
    bound = {i for r in relations for i in (r.first, r.second)}
    apart = len({group[1:] for group in groups}) == len(groups)
    if apart and all(names(tuple(groups), i) for i in bound):
        return Goal(tuple(groups), relations)
    return None


_DRAWS: dict[str, Callable[[Rng, Split], Goal]] = {
    "single": _single,
    "colour": _colour,
    "two": _two,
    "counting": _counting,
    "position": _position,
    "attribution": _attribution,
    **{name: _mix(total) for name, total in MIXES.items()},
}
