"""Prompts of twelve kinds with their goals: GenEval's six task types and mixtures of them."""

import bisect
import math
from typing import NamedTuple

import numpy as np

from clvr_jax.miniature import draws, held_out, scenes
from clvr_jax.miniature.chance import pick
from clvr_jax.miniature.draws import HELD_OUT_KINDS, KINDS
from clvr_jax.miniature.goal import Goal, Group, Relation
from clvr_jax.miniature.held_out import Split
from clvr_jax.miniature.places import AREAS, CELL_NAMES, PLACES, RELATIONS, related
from clvr_jax.miniature.scene import Scene
from clvr_jax.miniature.sentences import write

__all__ = [
    "HELD_OUT_KINDS",
    "KINDS",
    "TIERS",
    "Prompt",
    "complexity",
    "describe",
    "sample",
    "tier",
    "write",
]

TIERS = (4.0, 8.0, 14.0, 22.0)  # complexities where tiers 1 to 4 begin


class Prompt(NamedTuple):
    """A prompt and what it asks for.

    Attributes:
      text: as a user would write it.
      goal: the same as data.
      kind: of `KINDS`, or "described" for those of `describe`.
      complexity: see the function of this name.
    """

    text: str
    goal: Goal
    kind: str
    complexity: float


def complexity(goal: Goal, text: str) -> float:
    """Return C_task = V ln V + E + 0.1 words (paper, A.7, in our reading).

    V counts the things, each of a group; E counts what binds: for each thing the colour, size and
    place said of it (the shape is its noun), and the relations. There are no further hard
    constraints in this world.
    """
    bound = sum(
        g.count * sum(v is not None for v in (g.colour, g.size, g.place)) for g in goal.groups
    )
    things = goal.count
    nodes = things * math.log(things) if things else 0.0
    return nodes + bound + len(goal.relations) + 0.1 * len(text.split())


def tier(value: float) -> int:
    """Return the tier of a complexity, 0 to 4."""
    return bisect.bisect_right(TIERS, value)


def sample(
    rng: np.random.Generator, kind: str | None = None, split: Split = Split.TRAIN
) -> tuple[Prompt, Scene]:
    """Return a prompt of a split and a scene that meets it; all that it leaves open is drawn.

    Args:
      rng: decides everything.
      kind: of `KINDS`, or None for any that the split has.
      split: the prompt is of it. Train, dev and test hold nothing held out, in prompt or scene;
        held-out prompts ask for something held out.

    Raises:
      ValueError: the kind is unknown, or names nothing that can be held out.
    """
    held = split is Split.HELD_OUT
    kinds = HELD_OUT_KINDS if held else KINDS
    if kind is not None and kind not in kinds:
        raise ValueError(
            f"no prompts of kind {kind} in {split.value}, which has {', '.join(kinds)}"
        )
    kind = kind or pick(rng, kinds)
    while True:
        goal = draws.draw(kind, rng, split)
        if goal is None:
            continue
        common = held_out.is_common(goal)
        if not common and held_out.split_of(goal) is not split:
            continue
        scene = scenes.draw(goal, rng, split)
        if scene is None:
            continue
        for _ in range(64 if common else 1):  # of a common goal, other words are of other splits
            text = write(goal, rng)
            if not common or held_out.split_of(goal, text) is split:
                return Prompt(text, goal, kind, complexity(goal, text)), scene


def describe(
    scene: Scene, rng: np.random.Generator, detail: float = 0.6, relations: int = 0
) -> Prompt:
    """Return a prompt that a scene meets.

    Args:
      scene: of any number of things.
      rng: decides what is said and how.
      detail: the chance to say each colour, size and place. With 1 everything is said and every
        place is a single cell, so that no other scene meets the prompt.
      relations: at most that many, where things can be told apart.
    """
    counts: dict[Group, int] = {}
    cells: dict[Group, int] = {}
    for thing in scene.things:
        said = [value if rng.random() < detail else None for value in thing[2:]]
        place = None
        if detail >= 1:
            place = CELL_NAMES[thing.cell]
        elif rng.random() < detail:
            place = pick(rng, [name for name in AREAS if thing.cell in PLACES[name]])
        group = Group(1, thing.shape, *said, place)
        counts[group] = counts.get(group, 0) + 1
        cells[group] = thing.cell
    groups = tuple(group._replace(count=count) for group, count in counts.items())
    at = list(cells.values())
    found = []
    for first, second in draws.pairs(groups, rng)[:relations]:
        words = [word for word in RELATIONS if related(at[first], word, at[second])]
        found.append(Relation(first, pick(rng, words), second))
    goal = Goal(groups, tuple(found))
    text = write(goal, rng)
    return Prompt(text, goal, "described", complexity(goal, text))
