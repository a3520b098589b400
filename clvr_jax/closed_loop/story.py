"""The story of a drawing told anew, once it is known which of its steps led to the answer."""

from collections.abc import Sequence

from PIL import Image

from clvr_jax.backends import requests
from clvr_jax.backends.protocol import Options, Vlm
from clvr_jax.data.trajectory import Trajectory


def narrate(
    vlm: Vlm, trajectory: Trajectory, pictures: Sequence[Image.Image], options: Options
) -> list[str]:
    """Return a narrative for each step and one for the end, as a model tells them.

    Args:
      vlm: tells.
      trajectory: with actions; its own narratives are not shown.
      pictures: of its steps.
      options: of the answer.

    Raises:
      ValueError: the answer has more or fewer lines.
    """
    steps = "\n".join(step.action.line() for step in trajectory.steps)
    asked = requests.NARRATE.message(*pictures, goal=trajectory.goal, steps=steps)
    session = vlm.start()
    try:
        reply = session.submit([asked], options).result()
    finally:
        session.close()
    told = [line.strip() for line in reply.text.splitlines() if line.strip()]
    if len(told) != len(trajectory.steps) + 1:
        raise ValueError(
            f"{trajectory.id}: a story of {len(trajectory.steps)} steps needs a line each and one "
            f"for the end, got {len(told)}: {reply.text[:200]!r}"
        )
    return told
