"""Scenes at random: all that a goal leaves open is drawn, places by how pictures are composed."""

import functools
from collections.abc import Iterable

import numpy as np

from clvr_jax.miniature.chance import pick
from clvr_jax.miniature.goal import Goal, Group
from clvr_jax.miniature.held_out import BANS, COLOURS_OF, PAIRS, SHAPES_OF, Split
from clvr_jax.miniature.places import OPPOSITE, ORDER, PLACES, RELATIONS, SO_TO
from clvr_jax.miniature.scene import CELLS, COLOURS, LOOKS, MOST, SHAPES, SIZES, Scene, Thing

_ALL = (1 << CELLS) - 1
_TWINS = 0.3  # share of scenes of anything in which several things are alike
_TRIES = 12  # placements of one goal; what then has none is rare or contradicts itself


def _mask(cells: Iterable[int]) -> int:
    """Cells as the bits of a number: sets that are quick to cut."""
    return sum(1 << cell for cell in cells)


_PLACE = {name: _mask(cells) for name, cells in PLACES.items()} | {None: _ALL}
_FROM = {word: [*map(_mask, SO_TO[word])] for word in RELATIONS}  # that stand so to a cell
_TO = {word: _FROM[OPPOSITE[word]] for word in RELATIONS}  # that a cell stands so to
_BANS = {
    shape: [tuple((other, _mask(cells)) for other, cells in entry) for entry in rows]
    for shape, rows in BANS.items()
}


@functools.cache
def _cells(mask: int) -> tuple[int, ...]:
    return tuple(cell for cell in range(CELLS) if mask >> cell & 1)


def kind(
    rng: np.random.Generator, shape: str | None, colour: str | None, split: Split
) -> tuple[str, str]:
    """Return a shape and a colour, drawn where None; a drawn one makes no held-out pair.

    In `Split.HELD_OUT` any pair may come.
    """
    free = split is Split.HELD_OUT
    if shape is None and colour is None:
        while True:
            pair = pick(rng, SHAPES), pick(rng, COLOURS)
            if free or pair not in PAIRS:
                return pair
    if shape is None:
        return pick(rng, SHAPES if free else SHAPES_OF[colour]), colour
    return shape, colour or pick(rng, COLOURS if free else COLOURS_OF[shape])


def changed(rng: np.random.Generator, thing: Thing, name: str) -> Thing:
    """Return a thing of another shape, colour or size: `name` is a key of `LOOKS`."""
    others = [value for value in LOOKS[name] if value != getattr(thing, name)]
    return thing._replace(**{name: pick(rng, others)})


def draw(
    goal: Goal, rng: np.random.Generator, split: Split, *, composed: bool = True
) -> Scene | None:
    """Return a scene that meets the goal, or None if none was found.

    Free attributes are uniform. Things that are bound to a place or in a relation get their cells
    first. Except in `Split.HELD_OUT`, nothing held out comes about by chance.

    Args:
      goal: what is asked for.
      rng: decides what it leaves open.
      split: the scene is of it.
      composed: as pictures of this world are: one thing after another, as named, takes the first
        cell of `places.ORDER` that it may have (any cells, where that leads nowhere). Otherwise
        things come in random order and take any cell: close to uniform over all scenes of the goal.
    """
    groups, slots = goal.groups, goal.slots
    links: dict[int, list] = {}
    for first, word, second in goal.relations:
        links.setdefault(first, []).append((second, _FROM[word]))
        links.setdefault(second, []).append((first, _TO[word]))
    free = [groups[g].place is None and g not in links for g in slots]
    kinds = [kind(rng, groups[g].shape, groups[g].colour, split) for g in slots]
    for attempt in range(_TRIES):
        by_order = composed and attempt == 0
        cells = _place(
            slots, groups, links, kinds, free, rng, by_order, split is not Split.HELD_OUT
        )
        if cells is not None:
            sizes = [groups[g].size or pick(rng, SIZES) for g in slots]
            return Scene(tuple(Thing(cells[s], *kinds[s], sizes[s]) for s in range(len(slots))))
    return None


def _place(slots, groups, links, kinds, free, rng, composed, clean) -> list[int] | None:
    """Return a cell for each slot, or None at a dead end."""
    keys = range(len(slots)) if composed else rng.random(len(slots)).tolist()
    left, cells, at = _ALL, [0] * len(slots), {}
    banned = dict.fromkeys(SHAPES, 0)
    for slot in sorted(range(len(slots)), key=lambda s: (free[s], keys[s])):
        group, shape = slots[slot], kinds[slot][0]
        options = left & _PLACE[groups[group].place] & ~banned[shape]
        for other, table in links.get(group, ()):
            if other in at:
                options &= table[at[other]]
        if not options:
            return None
        cell = first(_cells(options)) if composed else pick(rng, _cells(options))
        cells[slot] = at[group] = cell
        left &= ~(1 << cell)
        if clean:
            for other, mask in _BANS[shape][cell]:
                banned[other] |= mask
    return cells


def first(cells: Iterable[int]) -> int:
    """Return the first of some cells in `places.ORDER`."""
    return min(cells, key=ORDER.index)


def sample(rng: np.random.Generator, split: Split, count: int | None = None) -> Scene:
    """Return any scene of `count` things (1 to `MOST` at random where None), anywhere.

    In some, several things are of one kind, so that words must say where one of them is.

    Raises:
      ValueError: a scene does not hold so many.
    """
    count = int(rng.integers(1, MOST + 1)) if count is None else count
    while True:
        groups = [Group(count)] if count else []
        if count > 1 and rng.random() < _TWINS:
            twins = int(rng.integers(2, count + 1))
            size = pick(rng, (None, *SIZES))
            groups = [Group(twins, *kind(rng, None, None, split), size)]
            groups += [Group(count - twins)] if twins < count else []
        scene = draw(Goal(tuple(groups)), rng, split, composed=False)
        if scene is not None:
            return scene
