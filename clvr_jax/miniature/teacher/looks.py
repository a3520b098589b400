"""What pictures show, in words: inventories, captions, differences; also for pretraining."""

from clvr_jax.miniature.chance import Rng, shuffle
from clvr_jax.miniature.goal import ATTRIBUTES
from clvr_jax.miniature.places import CELL_NAMES
from clvr_jax.miniature.scene import Scene, Thing
from clvr_jax.miniature.teacher import language
from clvr_jax.miniature.words import enumerate_words, kind_name, vary

EMPTY = "nothing"
_CELLS = {name: cell for cell, name in CELL_NAMES.items()}


def inventory(scene: Scene) -> str:
    """Return the things in the order of their cells, one a line, always in the same words."""
    lines = (f"{CELL_NAMES[thing.cell]}: {kind_name(*thing[1:])}" for thing in scene.things)
    return "\n".join(lines) or EMPTY


def read_inventory(text: str) -> Scene:
    """Return the scene of an inventory; the inverse of `inventory`.

    Raises:
      ValueError: a line has another form.
    """
    things = []
    for line in text.strip().splitlines() if text.strip() != EMPTY else ():
        place, _, kind = line.partition(": ")
        if place not in _CELLS or len(kind.split()) != 3:
            raise ValueError(f"{line!r} is no line of an inventory: place, colon, three words")
        size, colour, shape = kind.split()
        things.append(Thing(_CELLS[place], shape, colour, size))
    return Scene(tuple(things))


def caption(scene: Scene, rng: Rng) -> str:
    """Return a sentence about all things, with some of their sizes and places."""
    items = [language.a(rng, thing, sized=rng.random() < 0.5) for thing in scene.things]
    placed = [
        f"{item} {language.spot(rng, thing.cell)}" if rng.random() < 0.5 else item
        for item, thing in zip(items, scene.things, strict=True)
    ]
    shown = enumerate_words(shuffle(rng, placed)) if placed else EMPTY
    return language.sentence(f"{vary(rng, language.SHOWS)} {shown}")


def difference(before: Scene, after: Scene, rng: Rng) -> list[str]:
    """Return what has changed, one clause each: things that changed, moved, went and came."""
    gone = [thing for thing in before.things if thing not in after.things]
    come = [thing for thing in after.things if thing not in before.things]
    said = []
    for old in tuple(gone):
        new = next((t for t in come if t[1:] == old[1:]), None) or after.at(old.cell)
        if new in come:
            gone.remove(old)
            come.remove(new)
            said.append(_changed(old, new, before, rng))
    said += [
        vary(rng, language.GONE).format(thing=language.the(rng, thing, before)) for thing in gone
    ]
    said += [vary(rng, language.NEW).format(thing=language.placed(rng, thing)) for thing in come]
    return said or [language.SAME_PICTURE]


def _changed(old: Thing, new: Thing, before: Scene, rng: Rng) -> str:
    thing = language.the(rng, old, before)
    if old.cell != new.cell:
        return vary(rng, language.MOVED).format(thing=thing, place=language.spot(rng, new.cell))
    differs = [name for name in ATTRIBUTES if getattr(old, name) != getattr(new, name)]
    single = differs[0] if len(differs) == 1 else "shape"
    other = language.a(rng, new) if single == "shape" else getattr(new, single)
    return vary(rng, language.BECAME).format(thing=thing, other=other)
