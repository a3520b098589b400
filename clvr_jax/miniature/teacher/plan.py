"""Layouts: where everything that a goal asks for is going to stand."""

from clvr_jax.miniature import scenes
from clvr_jax.miniature.chance import Rng, shuffle
from clvr_jax.miniature.goal import Goal, Group
from clvr_jax.miniature.held_out import Split
from clvr_jax.miniature.places import CELL_NAMES
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
    raise ValueError(f"no picture can show all of this at once: {goal}")


def plan(goal: Goal, rng: Rng) -> tuple[Group, ...]:
    """Return a layout as single things with their cells, in the order of drawing.

    Shape, colour and place are fixed, a size is only where the goal says one.
    """
    slots, things, _ = goal.assign(layout(goal, rng))
    sizes = [goal.groups[slot].size for slot in slots]
    planned = [
        Group(1, thing.shape, thing.colour, size, CELL_NAMES[thing.cell])
        for thing, size in zip(things, sizes, strict=True)
    ]
    return tuple(shuffle(rng, planned))
