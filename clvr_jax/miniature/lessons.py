"""Lessons from which a vision-language model learns to see this world, drawn on the fly.

A lesson is a conversation of the teacher's about pictures whose scenes are known: what it says is
true. Its pictures are rendered later, many together: until then each is `BLANK`.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

from clvr_jax.backends import requests
from clvr_jax.backends.protocol import Message, assistant, system, user
from clvr_jax.data import turns
from clvr_jax.miniature import edits, prompts, scenes
from clvr_jax.miniature.chance import Rng
from clvr_jax.miniature.held_out import Split
from clvr_jax.miniature.painter import Painter
from clvr_jax.miniature.pictures import Picture, new_seed
from clvr_jax.miniature.readings import certain
from clvr_jax.miniature.render import SIDE
from clvr_jax.miniature.scene import Scene
from clvr_jax.miniature.teacher.answers import answer
from clvr_jax.miniature.teacher.policy import Policy

# share of each kind among short lessons, of a question and an answer
TASKS = {"inventory": 0.35, "caption": 0.1, "difference": 0.2, "critique": 0.35}
STORY = "story"  # the long one: turn after turn, as in the loop
RIGHT = 0.4  # share of criticised pictures that are right
MISTAKES = 0.25  # chance that the painter of a story errs
LONGEST = 5  # pictures of a story
BLANK = Image.new("RGB", (SIDE, SIDE))
_POLICY = Policy()


class Lesson(NamedTuple):
    """What is said about pictures.

    Attributes:
      messages: the last one, and every assistant's, is to be learnt; pictures are `BLANK`.
      pictures: what stands for each of them, in order.
    """

    messages: list[Message]
    pictures: list[Picture]


def lesson(rng: Rng, task: str | None = None) -> Lesson:
    """Return a lesson.

    Args:
      rng: decides everything.
      task: of `TASKS`, or `STORY`, or None for a short one.

    Raises:
      ValueError: the task is unknown.
    """
    if task is None:
        names, shares = zip(*TASKS.items(), strict=True)
        task = names[int(np.searchsorted(np.cumsum(shares), rng.random() * sum(shares)))]
    if task not in _LESSONS:
        raise ValueError(f"no lessons of task {task!r}; choose from {', '.join(_LESSONS)}")
    return _LESSONS[task](rng)


def _edited(rng: Rng, scene: Scene, times: int) -> Scene:
    """The scene after some random edits."""
    while times:
        try:
            scene = edits.sample(rng, scene, None, Split.TRAIN)[2]
            times -= 1
        except ValueError:  # a full scene takes no more, and one thing may have nowhere to go
            continue
    return scene


def _about(rng: Rng, request: requests.Request, shown: list[Scene], **fields: str) -> Lesson:
    """A request about pictures of one seed, and the teacher's answer."""
    seed = new_seed(rng)
    asked = request.message(*[BLANK] * len(shown), **fields)
    said = [asked, assistant(_answer(rng, [asked], shown))]
    return Lesson(said, [Picture(scene.codes(), seed) for scene in shown])


def _answer(rng: Rng, said: list[Message], shown: list[Scene]) -> str:
    readings = [certain(scene.codes()[None]) for scene in shown]
    return answer(said, readings, _POLICY, str(rng.integers(2**32)))


def _scene(rng: Rng) -> Scene:
    return scenes.sample(rng, Split.TRAIN)


def _inventory(rng: Rng) -> Lesson:
    return _about(rng, requests.INVENTORY, [_scene(rng)])


def _caption(rng: Rng) -> Lesson:
    return _about(rng, requests.CAPTION, [_scene(rng)])


def _difference(rng: Rng) -> Lesson:
    before = _scene(rng)
    return _about(rng, requests.DIFFERENCE, [before, _edited(rng, before, int(rng.integers(0, 3)))])


def _critique(rng: Rng) -> Lesson:
    prompt, scene = prompts.sample(rng, None, Split.TRAIN)
    if rng.random() >= RIGHT:
        scene = _edited(rng, scene, int(rng.integers(1, 3)))
    return _about(rng, requests.CRITIQUE, [scene], goal=prompt.text)


def _story(rng: Rng) -> Lesson:
    """A drawing from the first picture to the last, as the loop has it, by a painter who errs."""
    prompt, _ = prompts.sample(rng, None, Split.TRAIN)
    said, shown, pictures = [system(requests.CONTROL), user(prompt.text)], [], []
    painter, seed = Painter(rng, MISTAKES), 0
    while True:
        text = _answer(rng, said, shown)
        said.append(assistant(text))
        action = turns.parse(text, len(shown) + 1).action
        if action is None or len(shown) == LONGEST:
            return Lesson(said, pictures)
        shown.append(painter.draw(action, shown))
        if action.kind == "generate":
            seed = new_seed(rng)
        pictures.append(Picture(shown[-1].codes(), seed))
        said.append(user(BLANK))


_LESSONS: dict[str, Callable[[Rng], Lesson]] = {
    "inventory": _inventory,
    "caption": _caption,
    "difference": _difference,
    "critique": _critique,
    STORY: _story,
}
