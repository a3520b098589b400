"""How well a vision-language model sees the miniature's world: what is there, and what is wrong."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from clvr_jax.backends import requests
from clvr_jax.backends.protocol import Message, Options, Vlm
from clvr_jax.miniature.goal import Goal
from clvr_jax.miniature.scene import Scene
from clvr_jax.miniature.teacher.looks import read_inventory
from clvr_jax.statistics import Rate, rate_of

_GREEDY = Options(max_tokens=256, temperature=0.0)


@dataclasses.dataclass(frozen=True)
class Seen:
    """A picture whose scene is known, beside what it was drawn for.

    Attributes:
      picture: the pixels.
      scene: what it holds.
      text: the prompt.
      goal: what the prompt asks for.
    """

    picture: Image.Image
    scene: Scene
    text: str
    goal: Goal

    @property
    def faults(self) -> frozenset[str]:
        """Kinds of what is wrong."""
        return frozenset(fault.kind for fault in self.goal.faults(self.scene))


def measure(vlm: Vlm, cases: Sequence[Seen]) -> dict[str, Any]:
    """Return how a model reads pictures.

    Returns:
      Rates. inventory: of pictures whose inventory is exactly right; things: of the things that
      are listed rightly, and of those listed that are there. wrong: precision and recall of
      "something is wrong", and accuracy; faults: the same for each kind of fault. An answer that
      cannot be understood is counted in `unreadable`, and is right about nothing.
    """
    pictures = [requests.INVENTORY.message(case.picture) for case in cases]
    listed = [_scene(text) for text in _answers(vlm, pictures)]
    asked = [requests.CRITIQUE.message(case.picture, goal=case.text) for case in cases]
    found = [_faults(text) for text in _answers(vlm, asked)]
    true = [set(case.scene.things) for case in cases]
    said = [set(scene.things) if scene else set() for scene in listed]
    both = sum(len(a & b) for a, b in zip(true, said, strict=True))
    exact = sum(scene == case.scene for scene, case in zip(listed, cases, strict=True))
    wrong = _detection(
        [bool(case.faults) for case in cases],
        [None if kinds is None else bool(kinds) for kinds in found],
    )
    kinds = {
        kind: _detection(
            [kind in case.faults for case in cases],
            [None if kinds is None else kind in kinds for kinds in found],
        )
        for kind in requests.FAULTS
        if any(kind in case.faults for case in cases)
    }
    return {
        "pictures": len(cases),
        "inventory": rate_of(exact, len(cases)),
        "things": {
            "precision": rate_of(both, sum(map(len, said))),
            "recall": rate_of(both, sum(map(len, true))),
        },
        "wrong": wrong,
        "faults": kinds,
        "unreadable": {
            "inventory": sum(scene is None for scene in listed),
            "critique": sum(kinds is None for kinds in found),
        },
    }


def _answers(vlm: Vlm, messages: Sequence[Message]) -> list[str]:
    """Every message in a conversation of its own."""
    sessions = [vlm.start() for _ in messages]
    try:
        waiting = [s.submit([m], _GREEDY) for s, m in zip(sessions, messages, strict=True)]
        return [pending.result().text for pending in waiting]
    finally:
        for session in sessions:
            session.close()


def _scene(text: str) -> Scene | None:
    try:
        return read_inventory(text)
    except ValueError:
        return None


def _faults(text: str) -> frozenset[str] | None:
    try:
        return frozenset(requests.faults(text))
    except ValueError:
        return None


def _detection(true: Sequence[bool], said: Sequence[bool | None]) -> dict[str, Rate]:
    """Precision, recall and accuracy of what is said; None is said wrongly of either."""
    counts = Counter(zip(true, said, strict=True))
    hits = counts[True, True]
    return {
        "precision": rate_of(hits, hits + counts[False, True]),
        "recall": rate_of(hits, sum(true)),
        "accuracy": rate_of(hits + counts[False, False], len(true)),
    }


def cases_of(
    pictures: np.ndarray, scenes: Sequence[Scene | None], prompts: Sequence[Any]
) -> list[Seen]:
    """Return cases of generated pictures, those whose scene a detector could tell.

    Args:
      pictures: (b, 64, 64, 3) uint8.
      scenes: of each, None where it is not clean.
      prompts: what each was drawn for.
    """
    return [
        Seen(Image.fromarray(pixels), scene, prompt.text, prompt.goal)
        for pixels, scene, prompt in zip(pictures, scenes, prompts, strict=True)
        if scene is not None
    ]
