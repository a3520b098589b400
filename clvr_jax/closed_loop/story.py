"""A drawing looked at once more, when it is known which of its steps led to the answer."""

import dataclasses
from collections.abc import Sequence

from PIL import Image

from clvr_jax.backends import requests
from clvr_jax.backends.protocol import Message, Options, Vlm
from clvr_jax.closed_loop.turn import whole
from clvr_jax.data.conditioning import Policy, condition
from clvr_jax.data.trajectory import Trajectory

_ASKED = Policy(text="instruction", references="chosen")


def narrate(
    vlm: Vlm, trajectory: Trajectory, pictures: Sequence[Image.Image], options: Options
) -> list[str]:
    """Return a narrative for each step and one for the end, as a model tells them.

    Args:
      vlm: tells.
      trajectory: with actions; its own narratives are not shown.
      pictures: of its steps.
      options: of a narrative; the story may take as many tokens as its narratives.

    Raises:
      ValueError: the answer is longer, or has more or fewer lines.
    """
    count = len(trajectory.steps) + 1
    options = dataclasses.replace(options, max_tokens=options.max_tokens * count)
    steps = "\n".join(step.action.line() for step in trajectory.steps)
    asked = requests.NARRATE.message(*pictures, goal=trajectory.goal, steps=steps)
    reply = _answer(vlm, asked, options)
    told = _lines(reply)
    if len(told) != count:
        raise ValueError(
            f"{trajectory.id}: a story of {count - 1} steps needs a line each and one for the end, "
            f"got {len(told)}: {reply[:200]!r}"
        )
    return told


def verify(
    vlm: Vlm, trajectory: Trajectory, pictures: Sequence[Image.Image], options: Options
) -> list[bool]:
    """Return whether each step's picture is what its action asked for, as a model sees it.

    The model writes a checklist of the action and answers it about the picture; the picture is
    right if every answer is yes (the paper's verification of a step).

    Args:
      vlm: writes and answers.
      trajectory: with actions.
      pictures: of its steps.
      options: of the answers.

    Raises:
      ValueError: a checklist is empty, or is not answered line by line, or an answer is too long.
    """
    found = []
    for index, step in enumerate(trajectory.steps):
        text, chosen = condition(trajectory, index, _ASKED)
        if step.action.kind == "edit":
            asked = requests.EDIT_CHECKLIST.message(edit=text)
        else:
            asked = requests.CHECKLIST.message(goal=text)
        questions = _lines(_answer(vlm, asked, options))
        if not questions:
            raise ValueError(f"{trajectory.id}, step {index + 1}: the checklist is empty")
        shown = [pictures[number] for number in (*chosen, index)]
        asked = requests.VERIFY.message(*shown, questions="\n".join(questions))
        found.append(all(requests.checks(_answer(vlm, asked, options), len(questions))))
    return found


def _lines(reply: str) -> list[str]:
    return [line.strip() for line in reply.splitlines() if line.strip()]


def _answer(vlm: Vlm, asked: Message, options: Options) -> str:
    session = vlm.start()
    try:
        return whole(session.submit([asked], options).result())
    finally:
        session.close()
