"""What could be done next to a picture: single changes that bring it nearer to the goal."""

from collections.abc import Iterator

from clvr_jax.miniature import held_out, scenes
from clvr_jax.miniature.chance import Rng, shuffle
from clvr_jax.miniature.edits import Edit
from clvr_jax.miniature.goal import Goal
from clvr_jax.miniature.held_out import Split
from clvr_jax.miniature.places import CELL_NAMES, OPPOSITE, PLACES, related
from clvr_jax.miniature.references import Description, by_kind
from clvr_jax.miniature.scene import SIZES, Scene, Thing
from clvr_jax.miniature.teacher.sight import Sight

ORDER = ("remove", "replace", "recolour", "resize", "move", "add")  # among equal gains
_LOOSE = 0.75  # share of places of new things that are named as loosely as the goal allows
_SINGLE = {"colour": "recolour", "size": "resize"}


def mark(scene: Scene, thing: Thing) -> Description:
    """Return a description that means a thing alone: size and place only where they are needed."""
    names = by_kind(scene, thing)
    for size in (None, thing.size):
        name = Description(thing.shape, thing.colour, size)
        if name in names:
            return name
    return Description(thing.shape, thing.colour, place=CELL_NAMES[thing.cell])


def changes(goal: Goal, sight: Sight, rng: Rng) -> list[Edit]:
    """Return the edits that bring a picture nearer to the goal, the best first.

    Colours, sizes and, mostly, places that the goal leaves open are left open in what comes anew.

    Args:
      goal: what is wanted.
      sight: the picture.
      rng: decides between equals.
    """
    return _Bench(goal, sight, rng).changes()


class _Bench:
    """One picture under work."""

    def __init__(self, goal: Goal, sight: Sight, rng: Rng):
        self.goal, self.sight, self.rng = goal, sight, rng
        self.scene, self.badness = sight.scene, sight.badness(goal)
        self.slots, self.things, self.extra = goal.assign(sight.scene)
        self.served = dict(zip(self.slots, self.things, strict=True))
        self.faults = sight.faults(goal)
        self.broken = [fault.relation for fault in self.faults if fault.relation]
        self._cells = {slot: thing.cell for slot, thing in self.served.items() if thing}

    def changes(self) -> list[Edit]:
        found = (*self._removals(), *self._repairs(), *self._moves(), *self._additions())
        useful = [(gain, edit) for edit in found if (gain := self._gain(edit)) > 0]
        named = lambda slot: mark(self.scene, self.served[slot])
        told = [  # what asks for a relation in the words in which its fault is told
            Edit("move", named(r.first), Description(word=r.word, other=named(r.second)))
            for r in self.broken
        ]
        order = lambda one: (-one[0], ORDER.index(one[1].kind), one[1] not in told)
        return [edit for _, edit in sorted(shuffle(self.rng, useful), key=order)]

    def _gain(self, edit: Edit) -> float:
        """By how much the badness falls; what the edit leaves open makes no difference to it."""
        gone = edit.outcome(self.scene).gone
        unclear = tuple(cell for cell in self.sight.unclear if not gone or cell != gone.cell)
        after = self.sight._replace(scene=edit.apply(self.scene), unclear=unclear)
        return self.badness - after.badness(self.goal)

    def _removals(self) -> Iterator[Edit]:
        unclear = tuple(self.scene.at(cell) for cell in self.sight.unclear)
        for thing in dict.fromkeys((*self.extra, *unclear)):
            yield Edit("remove", mark(self.scene, thing))

    def _repairs(self) -> Iterator[Edit]:
        for slot, thing in zip(self.slots, self.things, strict=True):
            if thing is None:
                continue
            group = self.goal.groups[slot]
            wrong = [name for name in group.wrong(thing) if name != "place"]
            shape = group.shape or thing.shape
            held = group.shape is None and (shape, group.colour) in held_out.PAIRS
            if len(wrong) == 1 and wrong[0] in _SINGLE and not held:
                becomes = Description(**{wrong[0]: getattr(group, wrong[0])})
                yield Edit(_SINGLE[wrong[0]], mark(self.scene, thing), becomes)
            elif wrong:
                if held:
                    shape = scenes.kind(self.rng, None, group.colour, Split.TRAIN)[0]
                becomes = Description(shape, group.colour, group.size)
                yield Edit("replace", mark(self.scene, thing), becomes)

    def _moves(self) -> Iterator[Edit]:
        astray = {(f.group, f.thing) for f in self.faults if f.kind in ("place", "relation")}
        astray |= {(relation.second, self.served[relation.second]) for relation in self.broken}
        for slot, thing in sorted(astray):
            yield Edit("move", mark(self.scene, thing), self._where(slot, thing))

    def _additions(self) -> Iterator[Edit]:
        missing = [s for s, t in zip(self.slots, self.things, strict=True) if t is None]
        for slot in dict.fromkeys(missing):
            group = self.goal.groups[slot]
            shape, colour = scenes.kind(self.rng, group.shape, group.colour, Split.TRAIN)
            where = self._where(slot, Thing(0, shape, colour, group.size or SIZES[0]))
            yield Edit(
                "add", None, where._replace(shape=shape, colour=group.colour, size=group.size)
            )

    def _where(self, slot: int, thing: Thing) -> Description:
        """A place to put a thing that serves a slot: as good as there is for place and relations.

        It is said as the goal has it, by area or relation, if all that this allows is as good, and
        left open if the goal leaves it open; of new things mostly. Of equal cells, those in a
        held-out relation come last.
        """
        others = tuple(other for other in self.scene.things if other != thing)
        free = shuffle(self.rng, list(self.scene.free()))
        free.sort(key=lambda c: held_out.taints(thing._replace(cell=c), others))
        kept = {cell: self._kept(slot, cell) for cell in free}
        most = max(kept.values())
        moves = thing in self.scene.things
        loose = self._loose(slot) if moves or self.rng.random() < _LOOSE else []
        for where in loose:
            cells = where.cells(self.scene)
            good = [kept[cell] == most for cell in cells.intersection(free)]
            if good and all(good) and not (moves and thing.cell in cells):
                return where
        return Description(place=CELL_NAMES[next(c for c in free if kept[c] == most)])

    def _kept(self, slot: int, cell: int) -> int:
        """How much of a slot's place and relations a thing in a cell would satisfy."""
        place = self.goal.groups[slot].place
        ends = {**self._cells, slot: cell}
        return (place is None or cell in PLACES[place]) + sum(
            related(ends[first], word, ends[second])
            for first, word, second in self.goal.relations
            if slot in (first, second) and first in ends and second in ends
        )

    def _loose(self, slot: int) -> list[Description]:
        """A slot's place as the goal has it: its area, its relations, or anywhere."""
        place = self.goal.groups[slot].place
        found = [Description(place=place)] if place else []
        for first, word, second in self.goal.relations:
            other, so = (second, word) if first == slot else (first, OPPOSITE[word])
            if slot in (first, second) and self.served[other]:
                found.append(Description(word=so, other=mark(self.scene, self.served[other])))
        return found or [Description()]
