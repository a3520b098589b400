"""What a prompt asks for, as data whose truth on a scene can be computed.

A goal is groups of things ("two small red stars in the top row") and relations between single
things. A scene meets it if it holds just as many things and some way of giving things to groups
satisfies everything said; nothing else may be in the picture.
"""

import dataclasses
from typing import NamedTuple

from clvr_jax.miniature import assignment
from clvr_jax.miniature.places import OPPOSITE, PLACES, RELATIONS, related
from clvr_jax.miniature.scene import COLOURS, LOOKS, MOST, SHAPES, SIZES, Scene, Thing

ATTRIBUTES = tuple(LOOKS)


class Group(NamedTuple):
    """Things alike. What is None is not said, and any value is right.

    Attributes:
      count: how many, at least 1.
      shape: of `SHAPES`.
      colour: of `COLOURS`.
      size: of `SIZES`.
      place: of `PLACES`; all of the group are there.
    """

    count: int = 1
    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    place: str | None = None

    def wrong(self, thing: Thing) -> tuple[str, ...]:
        """Return what a thing differs in: of shape, colour, size, place."""
        wrong = tuple(
            name for name in ATTRIBUTES if getattr(self, name) not in (None, getattr(thing, name))
        )
        misplaced = self.place is not None and thing.cell not in PLACES[self.place]
        return (*wrong, "place") if misplaced else wrong

    def allows(self, thing: Thing) -> bool:
        """Say if a thing can be of this group."""
        return not self.wrong(thing)

    def may_be(self, shape: str | None, colour: str | None, size: str | None) -> bool:
        """Say if "the (size) (colour) (shape)" could mean one of this group, unsaid things free."""
        pairs = ((self.shape, shape), (self.colour, colour), (self.size, size))
        return all(ours is None or theirs is None or ours == theirs for ours, theirs in pairs)


class Relation(NamedTuple):
    """The thing of one group is, e.g., left of the thing of another; both groups count 1."""

    first: int
    word: str
    second: int


class Fault(NamedTuple):
    """One way in which a scene misses a goal.

    Attributes:
      kind: missing, extra, colour, shape, size, place or relation.
      group: index of the group that it is about; None for an extra thing.
      thing: the thing that is wrong or extra; None for a missing one.
      relation: the one broken, if that is the fault; then `thing` is its first.
    """

    kind: str
    group: int | None
    thing: Thing | None
    relation: Relation | None = None


class Assignment(NamedTuple):
    """Which thing serves which slot; a group of count n has n slots, in the order of groups.

    Attributes:
      slots: the group index of each slot.
      things: the thing serving each slot, None where one is missing.
      extra: things that serve none.
    """

    slots: tuple[int, ...]
    things: tuple[Thing | None, ...]
    extra: tuple[Thing, ...]


@dataclasses.dataclass(frozen=True)
class Goal:
    """What a picture must hold, and nothing beside.

    Attributes:
      groups: what there is.
      relations: between groups of count 1.

    Raises:
      ValueError: more than `MOST` things, or a value that is not of this world.
    """

    groups: tuple[Group, ...]
    relations: tuple[Relation, ...] = ()

    def __post_init__(self):
        known = ((None, *SHAPES), (None, *COLOURS), (None, *SIZES), (None, *PLACES))
        for group in self.groups:
            if group.count < 1 or any(v not in values for v, values in zip(group[1:], known)):
                raise ValueError(
                    f"{group} is no group of this world: it counts 1 or more; shapes are {SHAPES}, "
                    f"colours {COLOURS}, sizes {SIZES}, places {tuple(PLACES)}"
                )
        if self.count > MOST:
            raise ValueError(f"a picture holds at most {MOST} things, this asks for {self.count}")
        for first, word, second in self.relations:
            single = {i for i, group in enumerate(self.groups) if group.count == 1}
            if first == second or word not in RELATIONS or not {first, second} <= single:
                raise ValueError(
                    f"{first} {word} {second} is no relation ({', '.join(RELATIONS)}) of the "
                    f"numbers of two groups of one thing; those are {sorted(single)}"
                )

    @property
    def count(self) -> int:
        """Number of things."""
        return sum(group.count for group in self.groups)

    @property
    def slots(self) -> tuple[int, ...]:
        """The group index of each thing asked for."""
        return tuple(i for i, group in enumerate(self.groups) for _ in range(group.count))

    def holds(self, scene: Scene) -> bool:
        """Say if the scene is what is asked for, exactly, under some assignment."""
        return self.count == len(scene.things) and self._serve(scene.things) is not None

    def _serve(self, things: tuple[Thing, ...]) -> tuple[Thing, ...] | None:
        """Return things for all slots that satisfy everything, or None; as many as slots."""
        slots = self.slots
        fits = [[k for k, t in enumerate(things) if g.allows(t)] for g in self.groups]
        order = sorted(range(len(slots)), key=lambda s: (len(fits[slots[s]]), slots[s]))
        taken: dict[int, int] = {}  # slot -> thing

        def serve(depth: int) -> bool:
            if depth == len(order):
                return True
            slot = order[depth]
            for k in fits[slots[slot]]:
                if slots[order[depth - 1]] == slots[slot] and depth and k < taken[order[depth - 1]]:
                    continue  # things of one group in one order only
                if k in taken.values():
                    continue
                taken[slot] = k
                served = {slots[s]: things[t] for s, t in taken.items()}
                if self._kept(served, slots[slot]) and serve(depth + 1):
                    return True
                del taken[slot]
            return False

        return tuple(things[taken[s]] for s in range(len(slots))) if serve(0) else None

    def _kept(self, served: dict[int, Thing], group: int) -> bool:
        """Say if the relations of a group to those already served are kept."""
        return all(
            related(served[r.first].cell, r.word, served[r.second].cell)
            for r in self.relations
            if group in (r.first, r.second) and r.first in served and r.second in served
        )

    def assign(self, scene: Scene) -> Assignment:
        """Return the assignment that satisfies most, weighted by `assignment.POINTS`."""
        things, slots = scene.things, self.slots
        served: tuple[Thing | None, ...] | None = None
        if len(things) == len(slots):
            served = self._serve(things)
        if served is None:
            best = assignment.best(self, things)
            served = tuple(None if k is None else things[k] for k in best)
        return Assignment(slots, served, tuple(t for t in things if t not in served))

    def faults(self, scene: Scene) -> tuple[Fault, ...]:
        """Return what is wrong, under the best assignment; empty just if the goal holds."""
        slots, served, extra = self.assign(scene)
        faults = []
        for group, thing in zip(slots, served):
            if thing is None:
                faults.append(Fault("missing", group, None))
            else:
                faults += [Fault(kind, group, thing) for kind in self.groups[group].wrong(thing)]
        of = dict(zip(slots, served))
        for relation in self.relations:
            first, second = of[relation.first], of[relation.second]
            if first and second and not related(first.cell, relation.word, second.cell):
                faults.append(Fault("relation", relation.first, first, relation))
        return (*faults, *(Fault("extra", None, thing) for thing in extra))

    def canonical(self) -> "Goal":
        """Return the same goal, equal for all orders of groups and both ways to say a relation.

        Equal groups that stand in no relation become one. Relations are "left of" and "above".
        """
        groups, relations = self._sorted()
        groups = (Group(int(g[0]), *(value or None for value in g[1:])) for g in groups)
        return Goal(tuple(groups), tuple(Relation(*relation) for relation in relations))

    def key(self) -> str:
        """Return a text that goals share just if they are the same; the same in all versions."""
        return repr(self._sorted())

    def _sorted(self) -> tuple[list[tuple[str, ...]], list[tuple[int, str, int]]]:
        """Groups as texts ("" where None), and relations, in canonical order."""
        said = [(str(g.count), *(value or "" for value in g[1:])) for g in self.groups]
        relations = [
            (r.first, r.word, r.second)
            if r.word in ("left of", "above")
            else (r.second, OPPOSITE[r.word], r.first)
            for r in self.relations
        ]
        links: dict[int, list] = {}
        for first, word, second in relations:
            links.setdefault(first, []).append((word, "", said[second]))
            links.setdefault(second, []).append(("", word, said[first]))
        counts: dict[tuple, int] = {}
        for i, group in enumerate(self.groups):
            if i not in links:
                counts[said[i][1:]] = counts.get(said[i][1:], 0) + group.count
        keyed = [((str(n), *kind), [], -1) for kind, n in counts.items()]
        keyed = sorted(keyed + [(said[i], sorted(ends), i) for i, ends in links.items()])
        rank = {i: k for k, (_, _, i) in enumerate(keyed)}
        relations = {(rank[first], word, rank[second]) for first, word, second in relations}
        return [group for group, _, _ in keyed], sorted(relations)
