"""Pictures as what they are rendered from, many at a time."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8, UInt32

from clvr_jax.miniature.chance import Rng
from clvr_jax.miniature.render import SIDE, keys, render
from clvr_jax.miniature.scene import Scene


class Picture(NamedTuple):
    """A picture before it is rendered.

    Attributes:
      codes: kinds by cell (16,) int32.
      seed: of jitter and texture, below 2^32.
      blend: codes of a picture that it is partly like, None where it is clean: what differs in them
        is neither the one nor the other, as models draw that are not sure. May hold more things
        than a scene.
      share: of that picture in it, from 0 to 1.
      unclear: cells of things that one cannot be sure of.
    """

    codes: np.ndarray
    seed: int
    blend: np.ndarray | None = None
    share: float = 0.0
    unclear: tuple[int, ...] = ()

    @property
    def beside(self) -> np.ndarray:
        """Codes (16,) of the things of the blend where there are none otherwise."""
        return np.zeros_like(self.codes) if self.blend is None else self.blend * (self.codes == 0)


def new_seed(rng: Rng) -> int:
    """Return a seed for a picture."""
    return int(rng.integers(2**32))


def picture_of(scene: Scene, rng: Rng) -> Picture:
    """Return a picture of a scene with a seed of its own."""
    return Picture(scene.codes(), new_seed(rng))


def stacked(
    pictures: Sequence[Picture],
) -> tuple[Int[np.ndarray, "b cell"], UInt32[np.ndarray, "b"]]:
    """Return the codes and the seeds of one picture or more, as `render` takes them."""
    codes = np.stack([picture.codes for picture in pictures])
    return codes, np.array([picture.seed for picture in pictures], np.uint32)


def rendered(pictures: Sequence[Picture], size: int) -> UInt8[np.ndarray, "b y x 3"]:
    """Return the pixels of pictures, blends among them.

    Args:
      pictures: any number of them.
      size: how many are rendered together, the last ones filled up: another size is compiled anew.
    """
    pixels = _clean(pictures, size)
    blends = [i for i, picture in enumerate(pictures) if picture.blend is not None]
    likes = _clean([pictures[i]._replace(codes=pictures[i].blend) for i in blends], size)
    for i, like in zip(blends, likes, strict=True):
        mixed = (1 - pictures[i].share) * pixels[i] + pictures[i].share * like
        pixels[i] = np.round(mixed).astype(np.uint8)
    return pixels


def _clean(pictures: Sequence[Picture], size: int) -> np.ndarray:
    """The pixels of pictures without their blends."""
    parts = [np.zeros((0, SIDE, SIDE, 3), np.uint8)]
    for start in range(0, len(pictures), size):
        codes, seeds = stacked(pictures[start : start + size])
        full = np.resize(codes, (size, codes.shape[1])), np.resize(seeds, size)
        parts.append(np.asarray(render(full[0], keys(full[1])))[: len(codes)])
    return np.concatenate(parts)
