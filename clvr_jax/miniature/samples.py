"""What the miniature's image networks learn from, drawn on the fly.

A sample is a pure function of its random generator: a row of a training step is its number and the
run's seed, and nothing is stored.
"""

import enum
from typing import NamedTuple

import numpy as np

from clvr_jax.miniature import edits, held_out, prompts, scenes
from clvr_jax.miniature.chance import pick, shuffle
from clvr_jax.miniature.held_out import Split
from clvr_jax.miniature.pictures import Picture, new_seed, picture_of
from clvr_jax.miniature.scene import CELLS, SIZES, Scene, Thing

ROUND = 2**20  # rows of a round at most
FULLEST = 0.8  # largest share of cells with a thing where only pictures are learnt
DESCRIBED = 0.25  # share of prompts that say all there is to say
# kinds of edits, as often as drawn: what must keep a shape that no word names is learnt last
_EDITS = (*edits.KINDS, "recolour", "move", "resize")


class Stream(enum.IntEnum):
    """Streams of random numbers of a training run, by what they decide."""

    ORDER = 0
    DROPOUT = 1
    CROWDS = 2
    DRAWINGS = 3
    EDITS = 4
    LESSONS = 16


class Drawing(NamedTuple):
    """What the image model is given, and what it shall draw.

    Attributes:
      text: prompt or edit instruction.
      target: the picture.
      references: the pictures that the text speaks of; the last is the one that is changed.
    """

    text: str
    target: Picture
    references: tuple[Picture, ...] = ()


def generator(seed: int, number: int, stream: int = 0) -> np.random.Generator:
    """Return the generator of a sample.

    Args:
      seed: of the run.
      number: of the sample, never used twice in a run.
      stream: apart for what is drawn for different purposes.
    """
    return np.random.Generator(np.random.PCG64([seed, stream, number]))


def row_generator(seed: int, epoch: int, row: int, stream: Stream) -> np.random.Generator:
    """Return the generator of a row of a training step.

    Args:
      seed: of the run.
      epoch: the round of the step.
      row: number in the round, below `ROUND`.
      stream: apart for what is drawn for different purposes.

    Raises:
      ValueError: the row is not of a round.
    """
    if not 0 <= row < ROUND:
        raise ValueError(f"row {row} of a round; there are {ROUND} at most")
    return generator(seed, epoch * ROUND + row, stream)


def crowded_picture(rng: np.random.Generator) -> Picture:
    """Return a picture for the VAE, often crowded: any kind that may be trained, in any cell."""
    codes, fill = np.zeros(CELLS, np.int32), FULLEST * rng.random()
    for cell in np.flatnonzero(rng.random(CELLS) < fill):
        kind = scenes.kind(rng, None, None, Split.TRAIN)
        codes[cell] = Thing(int(cell), *kind, pick(rng, SIZES)).code
    return Picture(codes, new_seed(rng))


def drawing(rng: np.random.Generator, references: int, split: Split = Split.TRAIN) -> Drawing:
    """Return a prompt without references, an edit with one, or one that brings something with two.

    Pictures before and after share their seed: what an edit does not name stays as it is.

    Raises:
      ValueError: another number of references.
    """
    if references not in (0, 1, 2):
        raise ValueError(f"{references} references; drawings of this world have 0, 1 or 2")
    if references == 0:
        draw = _described if rng.random() < DESCRIBED else prompts.sample
        prompt, scene = draw(rng, split=split)
        return Drawing(prompt.text, picture_of(scene, rng))
    if references == 2:
        _, text, (first, second), after = edits.sample_pair(rng, split)
        shown = picture_of(first, rng), picture_of(second, rng)
        return Drawing(text, Picture(after.codes(), shown[1].seed), shown)
    while True:
        before = scenes.sample(rng, split)
        kind = pick(rng, _EDITS)
        try:
            _, text, after = edits.sample(rng, before, kind, split)
        except ValueError:  # a full scene takes no more, and one thing may have nowhere to go
            continue
        shown = picture_of(before, rng)
        return Drawing(text, Picture(after.codes(), shown.seed), (shown,))


def _described(rng: np.random.Generator, split: Split) -> tuple[prompts.Prompt, Scene]:
    """A prompt that says all of some things of a picture, and a scene of these alone."""
    while True:
        _, scene = prompts.sample(rng, split=split)
        count = int(rng.integers(1, len(scene.things) + 1))
        part = Scene(tuple(shuffle(rng, scene.things)[:count]))
        prompt = prompts.describe(part, rng, detail=1.0)
        if held_out.split_of(prompt.goal, prompt.text) is split:
            return prompt, part
