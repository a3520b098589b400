"""How one thing of a scene is named: by what it is and, where that is not enough, where it is."""

from typing import NamedTuple, Optional

import numpy as np

from clvr_jax.miniature import words
from clvr_jax.miniature.chance import pick, shuffle
from clvr_jax.miniature.places import AREAS, CELL_NAMES, PLACES, RELATIONS, SO_TO
from clvr_jax.miniature.scene import COLOURS, SHAPES, SIZES, Scene, Thing


class Description(NamedTuple):
    """What is said of one thing; None is not said.

    Attributes:
      shape: of `SHAPES`.
      colour: of `COLOURS`.
      size: of `SIZES`.
      place: of `PLACES`.
      word: of `RELATIONS`; the thing stands so to `other`.
      other: another thing, named.
    """

    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    place: str | None = None
    word: str | None = None
    other: Optional["Description"] = None

    def cells(self, scene: Scene) -> frozenset[int]:
        """Return the cells that place and relation allow; what is in them does not matter.

        Raises:
          ValueError: the other thing is not exactly one of the scene.
        """
        cells = PLACES[self.place] if self.place else _EVERYWHERE
        if self.word:
            cells &= SO_TO[self.word][self.other.find(scene).cell]
        return cells

    def find_all(self, scene: Scene) -> tuple[Thing, ...]:
        """Return the things of a scene that are as described."""
        cells = self.cells(scene)
        return tuple(t for t in scene.things if t.cell in cells and self.fits(t))

    def find(self, scene: Scene) -> Thing:
        """Return the thing meant.

        Raises:
          ValueError: none or several are as described.
        """
        found = self.find_all(scene)
        if len(found) != 1:
            raise ValueError(f"{self} means {len(found)} things of {scene}, not one")
        return found[0]

    def fits(self, thing: Thing) -> bool:
        """Say if shape, colour and size are as described."""
        return (
            self.shape in (None, thing.shape)
            and self.colour in (None, thing.colour)
            and self.size in (None, thing.size)
        )


_EVERYWHERE = frozenset(CELL_NAMES)
# what of shape, colour and size is said, in the order in which it is tried
_SAID = ((1, 0, 0), (1, 1, 0), (0, 1, 0), (1, 0, 1), (0, 0, 1), (0, 1, 1), (1, 1, 1))


def by_kind(scene: Scene, thing: Thing, among: frozenset[int] = _EVERYWHERE) -> list[Description]:
    """Return descriptions by shape, colour and size that mean it alone among things in cells."""
    others = [t for t in scene.things if t.cell in among and t.cell != thing.cell]
    found = [
        Description(*(value if said else None for value, said in zip(thing[1:], mask)))
        for mask in _SAID
    ]
    return [name for name in found if not any(name.fits(other) for other in others)]


def refer(rng: np.random.Generator, scene: Scene, thing: Thing) -> Description:
    """Return a description that means one thing of the scene alone, often a shortest one.

    Things that have a twin are told apart by an area, by a relation to a thing that can be named
    by its kind, or at last by the cell's own name, which always does.
    """
    names = by_kind(scene, thing)
    if names and rng.random() < 0.8:
        named = [name for name in names if name.shape] or names
        way = rng.random()
        return named[0] if way < 0.6 else pick(rng, named if way < 0.95 else names)
    way = rng.random()
    if way < 0.4:
        for place in shuffle(rng, [p for p in AREAS if thing.cell in PLACES[p]]):
            names = by_kind(scene, thing, PLACES[place])
            if names:
                return names[0]._replace(place=place)
    elif way < 0.7:
        for other in shuffle(rng, [t for t in scene.things if t != thing]):
            marks = by_kind(scene, other)
            true = [word for word in RELATIONS if thing.cell in SO_TO[word][other.cell]]
            for word in shuffle(rng, true) if marks else ():
                names = by_kind(scene, thing, SO_TO[word][other.cell])
                if names:
                    return names[0]._replace(word=word, other=marks[0])
    names = by_kind(scene, thing, frozenset({thing.cell}))
    return names[0]._replace(place=CELL_NAMES[thing.cell])


def say(rng: np.random.Generator, name: Description, article: str = "the") -> str:
    """Return "the red star in the top row", or with article "a" "a red star"."""
    if article == "the":
        text = f"the {words.kind_words(rng, *name[:3])}"
    else:
        text = words.noun_phrase(rng, 1, *name[:3])
    where = say_where(rng, name)
    return f"{text} {where}" if where else text


def say_where(rng: np.random.Generator, name: Description, to: bool = False) -> str:
    """Return the place or relation in words ("in the top row", "above the ring"), or ""."""
    parts = [words.place_phrase(rng, name.place, to)] if name.place else []
    if name.word:
        parts.append(f"{words.relation_phrase(rng, name.word)} {say(rng, name.other)}")
    return " ".join(parts)


def somewhere(rng: np.random.Generator, scene: Scene, but: Thing | None = None) -> Description:
    """Return a place or a relation to a thing of the scene, nothing said of what is to be there.

    Args:
      rng: decides.
      scene: the things that a relation may be to, those of a unique kind.
      but: a thing that it is not to be.
    """
    others = [t for t in scene.things if t != but]
    if others and rng.random() < 0.5:
        other = pick(rng, others)
        names = by_kind(scene, other)
        if names:
            name = names[0] if rng.random() < 0.7 else pick(rng, names)
            return Description(word=pick(rng, RELATIONS), other=name)
    return Description(place=pick(rng, AREAS if rng.random() < 0.85 else tuple(PLACES)))


_VALUES = (SHAPES, COLOURS, SIZES)


def open_values(name: Description) -> list[tuple[str, ...]]:
    """Return the shapes, colours and sizes that a description leaves open."""
    return [(said,) if said else values for said, values in zip(name[:3], _VALUES)]
