"""An image model by rules, which may err: for what is learnt before there is a trained one."""

from collections.abc import Sequence

import numpy as np

from clvr_jax.data.turns import Action
from clvr_jax.miniature.chance import pick
from clvr_jax.miniature.goal import Goal
from clvr_jax.miniature.held_out import is_clean
from clvr_jax.miniature.orders import by_place
from clvr_jax.miniature.parse import parse_edit, parse_prompt
from clvr_jax.miniature.scene import LOOKS, MOST, Scene, Thing
from clvr_jax.miniature.scenes import changed
from clvr_jax.miniature.teacher.layout import layout

_MISTAKES = (*LOOKS, "missing", "extra", "moved")
_UNDONE = 0.3  # of the chance of a mistake: an edit changes nothing at all
_ANYWHERE = 0.5  # of that chance: in a drawing from nothing, things stand anywhere
_CROWD = 4  # things from which on each is as likely to come out wrong as it may be


class Painter:
    """Reads what actions ask for, and draws it; what they leave open is drawn at random.

    As image models do, it errs more the more it is asked for, and seldom in a single edit.

    Attributes:
      rng: decides what is open, and the mistakes.
      mistakes: chance that a thing of a crowded picture comes out wrong, of smaller pictures less;
        of an edit, that something is wrong besides.
    """

    def __init__(self, rng: np.random.Generator, mistakes: float = 0.0):
        self.rng, self.mistakes = rng, mistakes

    def draw(self, action: Action, earlier: Sequence[Scene]) -> Scene:
        """Return the next scene, from an action and all earlier scenes."""
        if action.kind == "generate":
            goal = parse_prompt(action.prompt)
            chance, chances = self.mistakes * min(1.0, goal.count / _CROWD), goal.count
            if self.rng.random() < chance * _ANYWHERE:
                goal = Goal(tuple(group._replace(place=None) for group in goal.groups))
            scene = layout(goal, self.rng)
        else:
            chance, chances = self.mistakes / 2, 1
            *sources, base = (earlier[number - 1] for number in action.references)
            scene = parse_edit(by_place(action)).apply(base, *sources, rng=self.rng)
            if self.rng.random() < chance * _UNDONE:
                return base
        for _ in range(self.rng.binomial(chances, chance)):
            spoilt = self._spoil(scene)
            if is_clean(spoilt) or not is_clean(scene):
                scene = spoilt
        return scene

    def _spoil(self, scene: Scene) -> Scene:
        """Make one mistake: a thing too few, too many, elsewhere, or of another look."""
        kind = pick(self.rng, _MISTAKES)
        if not scene.things or (kind == "extra" and len(scene.things) < MOST):
            look = (pick(self.rng, values) for values in LOOKS.values())
            return scene.put(Thing(pick(self.rng, scene.free()), *look))
        thing = pick(self.rng, scene.things)
        left = scene.without(thing.cell)
        if kind in LOOKS:
            return left.put(changed(self.rng, thing, kind))
        if kind == "moved":
            return left.put(thing._replace(cell=pick(self.rng, scene.free())))
        return left
