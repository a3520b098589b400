"""The two steps of a check by themselves: finding what is asked for, and comparing it.

In drawings nearly all is as it should be, and most of what is wrong is missing: too few examples to
learn from that a red circle is no red square. Here every line differs in one point or in none.
"""

from typing import NamedTuple

from clvr_jax.miniature import held_out, scenes
from clvr_jax.miniature.chance import Rng, pick
from clvr_jax.miniature.goal import Goal, Group, Relation
from clvr_jax.miniature.held_out import Split
from clvr_jax.miniature.places import PLACES, RELATIONS, related
from clvr_jax.miniature.scene import CELLS, LOOKS, MOST, SHAPES, SIZES, Scene, Thing
from clvr_jax.miniature.teacher import language

_RELATED = 0.3  # share of lines of a relation
_SEVERAL = 0.3  # share of several things among the others
_ASTRAY = 0.6  # share of wrong places among wrong lines that say one
# chance that a line says each of these
_SAID = {"shape": 0.9, "colour": 0.6, "size": 0.4, "place": 0.55}
_VALUES = {**LOOKS, "place": tuple(PLACES)}
# shares of what is looked for that is not quite what is there, and of one more than is there
_OTHER, _MORE = 0.4, 0.25


class Line(NamedTuple):
    """One line.

    Attributes:
      asked: what is asked for, and what is there if that is given: "a red star at b2: a small
        blue star".
      checked: the same with where it is, or as `language.checked` has it, point by point.
    """

    asked: str
    checked: str


def line(rng: Rng) -> Line:
    """Return a line, right or wrong."""
    right = bool(rng.random() < 0.5)
    return _relation(rng, right) if rng.random() < _RELATED else _things(rng, right)


def found(rng: Rng, scene: Scene, used: set[Thing]) -> Line:
    """Return something to look for in a scene, and what `language.sought` says of it.

    It is asked for by some of the looks of a thing of the scene, or its place. Some lines ask for
    one more than there is, some for what differs from that thing in one point.

    Args:
      rng: decides what is asked for.
      scene: what there is.
      used: what serves already; what serves for this line is added.
    """
    thing = pick(rng, scene.things)
    while True:
        said = [rng.random() < share for share in _SAID.values()]
        place = pick(rng, [name for name, cells in PLACES.items() if thing.cell in cells])
        looks = (thing.shape, thing.colour, thing.size, place)
        group = Group(1, *(v if s else None for v, s in zip(looks, said, strict=True)))
        if not any(said):
            continue
        if rng.random() < _OTHER:
            name = pick(rng, [name for name in _SAID if getattr(group, name)])
            others = [v for v in _VALUES[name] if v != getattr(group, name)]
            group = group._replace(**{name: pick(rng, others)})
        if (group.shape, group.colour) not in held_out.PAIRS:
            break
    fitting = [other for other in scene.things if group.allows(other) and other not in used]
    count = max(len(fitting) + (rng.random() < _MORE), 1)
    group = group._replace(count=min(count, MOST))
    used.update(fitting)
    return Line(language.usual(group), language.sought(group, fitting, scene, used))


def _relation(rng: Rng, right: bool) -> Line:
    word = pick(rng, RELATIONS)
    while True:
        cells = int(rng.integers(CELLS)), int(rng.integers(CELLS))
        shapes = pick(rng, SHAPES), pick(rng, SHAPES)
        fits = cells[0] != cells[1] and related(cells[0], word, cells[1]) == right
        if fits and shapes[0] != shapes[1] and not held_out.is_held(shapes[0], word, shapes[1]):
            break
    relation = Relation(0, word, 1)
    goal = Goal(tuple(Group(1, s) for s in shapes), (relation,))
    asked = language.usual_relation(goal, relation, *cells)
    return Line(asked, f"{asked}: {language.stand(word, *cells)}")


def _things(rng: Rng, right: bool) -> Line:
    while True:
        group = _group(rng)
        things = [_fitting(rng, group) for _ in range(group.count)]
        if not right:
            said = [name for name in _SAID if getattr(group, name)]
            wrong = "place" if group.place and rng.random() < _ASTRAY else pick(rng, said)
            things[0] = _unfitting(rng, group, wrong)
            if group.count > 1 and rng.random() < 0.5:
                things = things[1:]  # one too few
        apart = len({thing.cell for thing in things}) == len(things)
        if apart and not any((thing.shape, thing.colour) in held_out.PAIRS for thing in things):
            break
    shown = sorted(things, key=lambda thing: thing.cell)
    there = [language.found(thing) for thing in shown]
    asked = f"{language.usual(group)} at {' and at '.join(there)}"
    return Line(asked, language.compared(group, shown))


def _group(rng: Rng) -> Group:
    """Something asked for, of which at least one thing is said."""
    count = int(rng.integers(2, 5)) if rng.random() < _SEVERAL else 1
    shape, colour = scenes.kind(rng, None, None, Split.TRAIN)
    looks = (shape, colour, pick(rng, SIZES), pick(rng, tuple(PLACES)))
    while True:
        said = [rng.random() < share for share in _SAID.values()]
        group = Group(count, *(v if s else None for v, s in zip(looks, said, strict=True)))
        if any(said) and (group.place is None or count <= len(PLACES[group.place])):
            return group


def _fitting(rng: Rng, group: Group) -> Thing:
    cells = sorted(PLACES[group.place]) if group.place else range(CELLS)
    looks = (getattr(group, name) or pick(rng, values) for name, values in LOOKS.items())
    return Thing(pick(rng, cells), *looks)


def _unfitting(rng: Rng, group: Group, wrong: str) -> Thing:
    """A thing that would fit but for one point."""
    thing = _fitting(rng, group)
    if wrong == "place":
        return thing._replace(cell=pick(rng, sorted({*range(CELLS)} - PLACES[group.place])))
    return scenes.changed(rng, thing, wrong)
