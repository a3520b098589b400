"""Layouts: where everything that a goal asks for could stand."""

from clvr_jax.miniature import scenes
from clvr_jax.miniature.chance import Rng
from clvr_jax.miniature.goal import Goal
from clvr_jax.miniature.held_out import Split
from clvr_jax.miniature.scene import Scene

_TRIES = 50  # drawing is by chance; of goals with many relations it often finds nothing


def layout(goal: Goal, rng: Rng) -> Scene:
    """Return a scene that satisfies the goal, without held-out combinations where it can be.

    Raises:
      ValueError: none was found; the goal contradicts itself.
    """
    for split in (Split.TRAIN, *(Split.HELD_OUT,) * _TRIES):
        scene = scenes.draw(goal, rng, split)
        if scene is not None:
            return scene
    raise ValueError("no picture can show all of this at once")
