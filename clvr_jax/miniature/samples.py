"""What the miniature's networks learn from, drawn on the fly: a sample is a pure function of its
random generator, so that a row of a training step is its number and the run's seed.
"""

from typing import NamedTuple

import numpy as np

from clvr_jax.miniature import edits, prompts, scenes
from clvr_jax.miniature.held_out import Split
from clvr_jax.miniature.scene import CELLS, SIZES, Scene, Thing

FULLEST = 0.8  # largest share of cells with a thing where only pictures are learnt


class Picture(NamedTuple):
    """A picture before it is rendered.

    Attributes:
      codes: kinds by cell (16,) int32.
      seed: of jitter and texture, below 2^32.
    """

    codes: np.ndarray
    seed: int


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


def picture(rng: np.random.Generator) -> Picture:
    """Return a picture for the VAE, often crowded: any kind that may be trained, in any cell."""
    codes, fill = np.zeros(CELLS, np.int32), FULLEST * rng.random()
    for cell in np.flatnonzero(rng.random(CELLS) < fill):
        kind = scenes.kind(rng, None, None, Split.TRAIN)
        codes[cell] = Thing(int(cell), *kind, scenes.pick(rng, SIZES)).code
    return Picture(codes, _seed(rng))


def drawing(rng: np.random.Generator, references: int, split: Split = Split.TRAIN) -> Drawing:
    """Return a prompt without references, an edit with one, or one that brings something with two.

    Pictures before and after share their seed: what an edit does not name stays as it is.
    """
    if references == 0:
        prompt, scene = prompts.sample(rng, None, split)
        return Drawing(prompt.text, _rendered(rng, scene))
    if references == 2:
        _, text, (first, second), after = edits.sample_pair(rng, split)
        shown = _rendered(rng, first), _rendered(rng, second)
        return Drawing(text, Picture(after.codes(), shown[1].seed), shown)
    while True:
        before = scenes.sample(rng, split)
        kind = scenes.pick(rng, edits.KINDS)
        try:
            _, text, after = edits.sample(rng, before, kind, split)
        except ValueError:  # a full scene takes no more, and one thing may have nowhere to go
            continue
        shown = _rendered(rng, before)
        return Drawing(text, Picture(after.codes(), shown.seed), (shown,))


def _rendered(rng: np.random.Generator, scene: Scene) -> Picture:
    return Picture(scene.codes(), _seed(rng))


def _seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**32))
