"""What the teacher makes of a detector's reading, beside a goal."""

import functools
from typing import NamedTuple

import numpy as np

from clvr_jax.miniature.goal import Fault, Goal
from clvr_jax.miniature.readings import SURE, Readings
from clvr_jax.miniature.scene import MOST, Scene, from_codes

# A step that is needed must be a gain: what is missing comes, if only to a wrong place at first;
# an unclear thing goes, even if it is wanted and missing then. No edit tidies a picture up.
_WEIGHTS = {"missing": 1.5, "unclear": 2.0}
_UNTIDY = 100.0


class Sight(NamedTuple):
    """A picture as the teacher sees it.

    Attributes:
      scene: what is there; unclear things as what they are most like.
      unclear: cells of things that are not clean.
      tidy: nothing else is in the picture, and not more things than `MOST`.
      overlooked: cells of things that are not found at first when they are looked for.
    """

    scene: Scene
    unclear: tuple[int, ...] = ()
    tidy: bool = True
    overlooked: tuple[int, ...] = ()

    @property
    def clear(self) -> Scene:
        """The scene without what is unclear."""
        return self.scene.without(*self.unclear)

    def shows(self, goal: Goal) -> bool:
        """Say if this is what was asked for, cleanly."""
        return self.tidy and not self.unclear and goal.holds(self.scene)

    def faults(self, goal: Goal) -> tuple[Fault, ...]:
        """Return what is wrong; faults of the kind "unclear" come last."""
        unclear = (Fault("unclear", None, self.scene.at(cell)) for cell in self.unclear)
        return (*_faults(goal, self.scene), *unclear)

    def badness(self, goal: Goal) -> float:
        """Return how far it is from the goal: its faults, weighted."""
        faults = sum(_WEIGHTS.get(fault.kind, 1.0) for fault in self.faults(goal))
        return faults + _UNTIDY * (not self.tidy)


@functools.lru_cache(4096)
def _faults(goal: Goal, scene: Scene) -> tuple[Fault, ...]:
    """The same pictures are judged again in every turn of a trajectory."""
    return goal.faults(scene)


def see(readings: Readings) -> Sight:
    """Return the sight of one picture's readings."""
    codes, confidence = readings.codes[0], readings.confidence[0]
    unclear = (codes > 0) & (confidence < SURE)
    likely = np.argsort(-confidence * (codes > 0), kind="stable")[:MOST]
    kept = np.zeros_like(codes)
    kept[likely] = codes[likely]
    return Sight(
        from_codes(kept),
        tuple(int(cell) for cell in np.flatnonzero(unclear & (kept > 0))),
        bool(readings.clean[0] or (unclear.any() and (codes > 0).sum() <= MOST)),
    )
