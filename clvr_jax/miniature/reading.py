"""Conversations that a vision-language model learns to see this world from, drawn on the fly.

A conversation is one of the teacher's, about pictures whose scenes are known: what it says is true.
Its pictures are rendered later, many together: until then each is `BLANK`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from PIL import Image

from clvr_jax.backends import requests
from clvr_jax.backends.protocol import Message, assistant, system, user
from clvr_jax.data import turns
from clvr_jax.miniature import edits, prompts, scenes
from clvr_jax.miniature.held_out import Split
from clvr_jax.miniature.painter import Painter
from clvr_jax.miniature.readings import Readings, read
from clvr_jax.miniature.render import SIDE, keys, render
from clvr_jax.miniature.samples import Picture
from clvr_jax.miniature.scene import CELLS, Scene
from clvr_jax.miniature.teacher.answers import answer
from clvr_jax.miniature.teacher.policy import Policy

# share of each kind of conversation
TASKS = {"inventory": 0.25, "caption": 0.1, "difference": 0.15, "critique": 0.25, "story": 0.25}
RIGHT = 0.4  # share of criticised pictures that are right
MISTAKES = 0.25  # chance that the painter of a story errs
LONGEST = 5  # pictures of a story
BLANK = Image.new("RGB", (SIDE, SIDE))
_POLICY = Policy()


class Conversation(NamedTuple):
    """What is said about pictures.

    Attributes:
      messages: the last one, and every assistant's, is to be learnt; pictures are `BLANK`.
      pictures: what stands for each of them, in order.
    """

    messages: list[Message]
    pictures: list[Picture]


def conversation(rng: np.random.Generator, task: str | None = None) -> Conversation:
    """Return a conversation.

    Args:
      rng: decides everything.
      task: of `TASKS`, or None for any.
    """
    if task is None:
        names, shares = zip(*TASKS.items(), strict=True)
        task = names[int(np.searchsorted(np.cumsum(shares), rng.random() * sum(shares)))]
    return {
        "inventory": lambda: _about(rng, requests.INVENTORY, [_scene(rng)]),
        "caption": lambda: _about(rng, requests.CAPTION, [_scene(rng)]),
        "difference": lambda: _difference(rng),
        "critique": lambda: _critique(rng),
        "story": lambda: _story(rng),
    }[task]()


def truth(*shown: Scene) -> list[Readings]:
    """Return the readings of scenes that are known, one for each."""
    sure, tidy = np.ones((1, CELLS), np.float32), np.ones(1, bool)
    return [read(scene.codes()[None], sure, tidy) for scene in shown]


def rendered(pictures: Sequence[Picture], room: int | None = None) -> list[Image.Image]:
    """Return pictures, all rendered together.

    Args:
      pictures: codes and seeds.
      room: how many there are at most, so that another number compiles nothing; None for theirs.
    """
    size = room or len(pictures)
    codes, seeds = np.zeros((size, CELLS), np.int32), np.zeros(size, np.uint32)
    for i, each in enumerate(pictures):
        codes[i], seeds[i] = each.codes, each.seed
    pixels = np.asarray(render(jnp.asarray(codes), keys(seeds)))
    return [Image.fromarray(image) for image in pixels[: len(pictures)]]


def changed(rng: np.random.Generator, scene: Scene, times: int) -> Scene:
    """Return a scene after some random edits."""
    while times:
        try:
            scene = edits.sample(rng, scene, None, Split.TRAIN)[2]
            times -= 1
        except ValueError:  # a full scene takes no more, and one thing may have nowhere to go
            continue
    return scene


def _about(
    rng: np.random.Generator, request: requests.Request, shown: list[Scene], **fields: str
) -> Conversation:
    """A request about pictures of one seed, and the teacher's answer."""
    seed = int(rng.integers(2**32))
    asked = request.message(*[BLANK] * len(shown), **fields)
    said = [asked, assistant(_answer(rng, [asked], shown))]
    return Conversation(said, [Picture(scene.codes(), seed) for scene in shown])


def _answer(rng: np.random.Generator, said: list[Message], shown: list[Scene]) -> str:
    return answer(said, truth(*shown), _POLICY, str(rng.integers(2**32)))


def _scene(rng: np.random.Generator) -> Scene:
    return scenes.sample(rng, Split.TRAIN)


def _difference(rng: np.random.Generator) -> Conversation:
    before = _scene(rng)
    return _about(rng, requests.DIFFERENCE, [before, changed(rng, before, int(rng.integers(0, 3)))])


def _critique(rng: np.random.Generator) -> Conversation:
    prompt, scene = prompts.sample(rng, None, Split.TRAIN)
    if rng.random() >= RIGHT:
        scene = changed(rng, scene, int(rng.integers(1, 3)))
    return _about(rng, requests.CRITIQUE, [scene], goal=prompt.text)


def _story(rng: np.random.Generator) -> Conversation:
    """A drawing from the first picture to the last, as the loop has it, by a painter who errs."""
    prompt, _ = prompts.sample(rng, None, Split.TRAIN)
    said, shown, pictures = [system(requests.CONTROL), user(prompt.text)], [], []
    painter, seed = Painter(rng, MISTAKES), 0
    while True:
        text = _answer(rng, said, shown)
        said.append(assistant(text))
        action = turns.parse(text, len(shown) + 1).action
        if action is None or len(shown) == LONGEST:
            return Conversation(said, pictures)
        shown.append(painter.draw(action, shown))
        if action.kind == "generate":
            seed = int(rng.integers(2**32))
        pictures.append(Picture(shown[-1].codes(), seed))
        said.append(user(BLANK))
