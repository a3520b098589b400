"""The things of a scene given to what a goal asks for, so that most of it is satisfied."""

from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import linear_sum_assignment

from clvr_jax.miniature.places import related
from clvr_jax.miniature.scene import Thing

if TYPE_CHECKING:
    from clvr_jax.miniature.goal import Goal

POINTS = {"shape": 6, "colour": 4, "size": 2, "place": 2, "relation": 2}
EXACT = 1  # for a thing that is all as asked: of equals, the one that leaves more as they are
_FULL = sum(POINTS.values())


def best(goal: "Goal", things: tuple[Thing, ...]) -> list[int | None]:
    """Return the index of the thing for each slot with the most points, None where none is left.

    Linear assignment is exact for all but relations. So the slots in relations are searched, and
    a branch is left when linear assignment of the rest, all open relations granted, gives no more
    than what is found already.
    """
    slots = goal.slots
    points = np.zeros((len(slots), max(len(slots), len(things))), int)  # past things: none left
    for s, g in enumerate(slots):
        for k, thing in enumerate(things):
            wrong = goal.groups[g].wrong(thing)
            points[s, k] = _FULL - sum(POINTS[name] for name in wrong) + EXACT * (not wrong)
    slot_of = {g: s for s, g in enumerate(slots)}
    ties = [(slot_of[r.first], r.word, slot_of[r.second]) for r in goal.relations]
    bound = sorted({s for first, _, second in ties for s in (first, second)})

    def kept(first: int, word: str, second: int) -> bool:
        there = max(first, second) < len(things)
        return there and related(things[first].cell, word, things[second].cell)

    value, found = -1, []

    def search(fixed: dict[int, int]):
        """Fix things for one bound slot after another."""
        nonlocal value, found
        rows = [s for s in range(len(slots)) if s not in fixed]
        columns = [k for k in range(points.shape[1]) if k not in fixed.values()]
        r, c = linear_sum_assignment(points[np.ix_(rows, columns)], maximize=True)
        chosen = fixed | {rows[i]: columns[j] for i, j in zip(r, c)}
        total = sum(int(points[s, k]) for s, k in chosen.items())
        now = sum(kept(chosen[a], word, chosen[b]) for a, word, b in ties)
        if total + POINTS["relation"] * now > value:
            value = total + POINTS["relation"] * now
            found = [chosen[s] for s in range(len(slots))]
        hope = sum(
            a not in fixed or b not in fixed or kept(fixed[a], word, fixed[b])
            for a, word, b in ties
        )
        if len(fixed) < len(bound) and total + POINTS["relation"] * hope > value:
            slot = bound[len(fixed)]
            for k in np.argsort(-points[slot], kind="stable").tolist():
                if k not in fixed.values():
                    search({**fixed, slot: k})

    search({})
    return [k if k < len(things) else None for k in found]
