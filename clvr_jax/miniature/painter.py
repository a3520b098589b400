"""An image model by rules, which may err: for what is learnt before there is a trained one."""

from collections.abc import Sequence

import numpy as np

from clvr_jax.data.turns import Action
from clvr_jax.miniature.held_out import is_clean
from clvr_jax.miniature.orders import by_place
from clvr_jax.miniature.parse import parse_edit, parse_prompt
from clvr_jax.miniature.scene import CELLS, KINDS, MOST, Scene, thing
from clvr_jax.miniature.teacher.layout import layout


class Painter:
    """Reads what actions ask for, and draws it; what they leave open is drawn at random.

    Attributes:
      rng: decides what is open, and the mistakes.
      mistakes: chance that something in a picture comes out wrong.
    """

    def __init__(self, rng: np.random.Generator, mistakes: float = 0.0):
        self.rng, self.mistakes = rng, mistakes

    def draw(self, action: Action, earlier: Sequence[Scene]) -> Scene:
        """Return the next scene, from an action and all earlier scenes."""
        if action.kind == "generate":
            scene = layout(parse_prompt(action.prompt), self.rng)
        else:
            *sources, base = (earlier[number - 1] for number in action.references)
            scene = parse_edit(by_place(action)).apply(base, *sources, rng=self.rng)
        while self.rng.random() < self.mistakes:
            spoilt = self._spoil(scene)
            if is_clean(spoilt) or not is_clean(scene):
                return spoilt
        return scene

    def _spoil(self, scene: Scene) -> Scene:
        """Put any kind of thing, or nothing, into one cell, mostly one that holds a thing."""
        taken = [thing.cell for thing in scene.things]
        full = len(taken) == MOST or self.rng.random() < 0.8
        cell = int(self.rng.choice(taken if taken and full else CELLS))
        code = int(self.rng.integers(KINDS + 1)) * (self.rng.random() < 0.8)
        return scene.put(thing(cell, code)) if code else scene.without(cell)
