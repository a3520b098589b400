"""Trajectories without the steps that led nowhere, as training data are to be."""

import re
from collections.abc import Sequence

from clvr_jax.data.trajectory import Trajectory
from clvr_jax.data.turns import MARKER, marker

FORGOTTEN = "an earlier picture"  # what a step that is no more is called where a text names it


def needed(trajectory: Trajectory) -> tuple[int, ...]:
    """Return the numbers of the steps that the answer was made from, itself included.

    Raises:
      ValueError: the steps have no actions, so that nobody knows.
    """
    if not trajectory.has_actions:
        raise ValueError(
            f"trajectory {trajectory.id} has no actions; none of its steps can be left"
        )
    found: set[int] = set()
    left = [trajectory.final or len(trajectory.steps)]
    while left:
        number = left.pop()
        if number not in found:
            found.add(number)
            left += trajectory.steps[number - 1].action.references
    return tuple(sorted(found))


def prune(
    trajectory: Trajectory, told: Sequence[str] = (), right: Sequence[bool] = ()
) -> Trajectory:
    """Return the trajectory with the steps that are `needed` alone, numbered anew.

    Args:
      trajectory: with actions.
      told: the story of what is left, a narrative for each step and one for the end, which names
        images by their new numbers. Without it the narratives stay; where they name a step that is
        no more, they call it `FORGOTTEN`.
      right: of each step that is left, whether its picture is what its action asked for. Those that
        are not become rejected ones: still seen, but no example for an image model. Without it all
        are accepted.

    Raises:
      ValueError: there are no actions, or there are more or fewer narratives or verdicts.
    """
    kept = needed(trajectory)
    new = {old: number for number, old in enumerate(kept, 1)}

    def renamed(text: str) -> str:
        def call(match: re.Match) -> str:
            number = new.get(int(match[1]))
            return FORGOTTEN if number is None else marker(number)

        return MARKER.sub(call, text)

    if told and len(told) != len(kept) + 1:
        raise ValueError(
            f"{len(told)} narratives for {len(kept)} steps; give one for each and one for the end"
        )
    if right and len(right) != len(kept):
        raise ValueError(f"{len(right)} verdicts for {len(kept)} steps; give one for each")
    steps = []
    for index, old in enumerate(kept):
        step = trajectory.steps[old - 1]
        action = step.action.model_copy(
            update={
                "prompt": renamed(step.action.prompt),
                "references": tuple(new[number] for number in step.action.references),
            }
        )
        reasoning = told[index] if told else renamed(step.reasoning)
        verdict = "accepted" if not right or right[index] else "rejected"
        update = {"reasoning": reasoning, "action": action, "verdict": verdict}
        if told:
            update["critique"] = None
        elif step.critique:
            update["critique"] = renamed(step.critique)
        steps.append(step.model_copy(update=update))
    return Trajectory.model_validate(
        trajectory.model_copy(
            update={
                "steps": tuple(steps),
                "closing": told[-1] if told else renamed(trajectory.closing),
                "final": None,
            }
        ).model_dump()
    )
