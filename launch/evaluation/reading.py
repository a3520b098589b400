"""How well a vision-language model sees the miniature's world: what is there, and what is wrong."""

import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from clvr_jax.backends import requests
from clvr_jax.backends.protocol import Message, Options, Vlm
from clvr_jax.data.turns import Action
from clvr_jax.miniature.painter import Painter
from clvr_jax.miniature.pictures import picture_of, rendered
from clvr_jax.miniature.prompts import Prompt
from clvr_jax.miniature.readings import Readings
from clvr_jax.miniature.scene import Scene
from clvr_jax.miniature.scores import Verdict
from clvr_jax.miniature.teacher.looks import read_inventory
from clvr_jax.statistics import Rate, rate, rate_of

MISTAKES = 0.4  # of a render's painter, see `Painter`
_SEED = 20_260_300  # of the renders
_GREEDY = Options(max_tokens=1024, temperature=0.0)


class Seen(NamedTuple):
    """A picture of which is known what it shows, beside what it was drawn for.

    Attributes:
      picture: the pixels.
      scene: what it holds; None if that is not clear.
      text: the prompt.
      faults: kinds of what is wrong; none if it is right.
    """

    picture: Image.Image
    scene: Scene | None
    text: str
    faults: frozenset[str]


def of_renders(asked: Sequence[Prompt]) -> list[Seen]:
    """Return renders for prompts, by a painter who errs at `MISTAKES`; always the same ones."""
    scenes, drawn = [], []
    for number, prompt in enumerate(asked):
        rng = np.random.default_rng((_SEED, number))
        scenes.append(Painter(rng, MISTAKES).draw(Action(kind="generate", prompt=prompt.text), ()))
        drawn.append(picture_of(scenes[-1], rng))
    pixels = rendered(drawn, 64)
    return [
        Seen(
            Image.fromarray(picture),
            scene,
            prompt.text,
            frozenset(fault.kind for fault in prompt.goal.faults(scene)),
        )
        for picture, scene, prompt in zip(pixels, scenes, asked, strict=True)
    ]


def of_drawn(
    pictures: np.ndarray,
    readings: Readings,
    asked: Sequence[Prompt],
    verdicts: Sequence[Verdict],
) -> list[Seen]:
    """Return generated pictures, as a detector sees them.

    Args:
      pictures: (b, 64, 64, 3) uint8.
      readings: of them.
      asked: the prompt of each.
      verdicts: on each.
    """
    return [
        Seen(
            Image.fromarray(picture),
            readings.scene(i) if readings.clean[i] else None,
            prompt.text,
            frozenset(kind for kind, _ in verdict.faults),
        )
        for i, (picture, prompt, verdict) in enumerate(zip(pictures, asked, verdicts, strict=True))
    ]


def measure(vlm: Vlm, cases: Sequence[Seen], what: str) -> dict[str, Any]:
    """Return how a model reads pictures.

    Args:
      vlm: the model.
      cases: at least one.
      what: said in lines of progress.

    Returns:
      Rates. inventory: of clear pictures whose inventory is exactly right; things: precision and
      recall of the things in it. wrong: precision, recall and accuracy of "something is wrong";
      faults: the same for each kind of fault that occurs. An answer that cannot be understood says
      nothing is there, or nothing is wrong, and is never accurate; `unreadable` counts them.
    """
    clear = [case for case in cases if case.scene is not None]
    listed = _answers(vlm, [requests.INVENTORY.message(case.picture) for case in clear], what)
    scenes = [_understood(read_inventory, text) for text in listed]
    asked = [requests.CRITIQUE.message(case.picture, goal=case.text) for case in cases]
    said = [_understood(requests.faults, text) for text in _answers(vlm, asked, what)]
    there = [frozenset(case.scene.things) for case in clear]
    seen = [frozenset(scene.things) if scene else frozenset() for scene in scenes]
    occur = [kind for kind in requests.FAULTS if any(kind in case.faults for case in cases)]
    both = sum(len(a & b) for a, b in zip(there, seen, strict=True))
    named = lambda kind: _detection(
        [kind in case.faults for case in cases],
        [None if kinds is None else kind in kinds for kinds in said],
    )
    return {
        "pictures": len(cases),
        "inventory": rate(a == b.scene for a, b in zip(scenes, clear, strict=True)),
        "things": {
            "precision": rate_of(both, sum(map(len, seen))),
            "recall": rate_of(both, sum(map(len, there))),
        },
        "wrong": _detection(
            [bool(case.faults) for case in cases],
            [None if kinds is None else bool(kinds) for kinds in said],
        ),
        "faults": {kind: named(kind) for kind in occur},
        "unreadable": {
            "inventory": sum(scene is None for scene in scenes),
            "critique": sum(kinds is None for kinds in said),
        },
    }


def _answers(vlm: Vlm, messages: Sequence[Message], what: str) -> list[str]:
    """Every message in a conversation of its own."""
    began = time.perf_counter()
    sessions = [vlm.start() for _ in messages]
    try:
        waiting = [s.submit([m], _GREEDY) for s, m in zip(sessions, messages, strict=True)]
        texts = [pending.result().text for pending in waiting]
    finally:
        for session in sessions:
            session.close()
    seconds = time.perf_counter() - began
    print(f"{what}: {len(texts)} answers in {seconds:.0f} s", file=sys.stderr, flush=True)
    return texts


def _understood(read: Any, text: str) -> Any:
    """What an answer says; None if that cannot be told."""
    try:
        return read(text)
    except ValueError:
        return None


def _detection(true: Sequence[bool], said: Sequence[bool | None]) -> dict[str, Rate]:
    """Precision, recall and accuracy of what is said."""
    pairs = list(zip(true, said, strict=True))
    hits = sum(a and bool(b) for a, b in pairs)
    return {
        "precision": rate_of(hits, sum(map(bool, said))),
        "recall": rate_of(hits, sum(true)),
        "accuracy": rate(a == b for a, b in pairs),
    }
