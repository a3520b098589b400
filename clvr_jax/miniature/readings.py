"""What a detector reads from pictures, and how far two detectors agree.

`detect` and `detect_eval` share this type and the world's constants, and nothing else: the one
gives rewards, the other judges, so an error of the one must not be an error of the other.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int

from clvr_jax.miniature.scene import MOST, Scene, from_codes

SURE = 0.5  # confidence from which a reading of a cell counts as clean


@dataclasses.dataclass(frozen=True)
class Readings:
    """Scenes read from pictures.

    Attributes:
      codes: kind in each cell, 0 where it is empty. A guess where the cell is unsure: something
        stands there, and this is what it is most like.
      confidence: of each cell, 0 to 1; below `SURE` it holds no clean thing and is not empty.
      clean: the picture holds nothing but clean things, `MOST` at most, on clean paper.
    """

    codes: Int[np.ndarray, "b cell"]
    confidence: Float[np.ndarray, "b cell"]
    clean: Bool[np.ndarray, "b"]

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def counts(self) -> Int[np.ndarray, "b"]:
        """Things in each picture; may be more than `MOST`, and such pictures are not clean."""
        return (self.codes > 0).sum(1)

    def scene(self, i: int) -> Scene:
        """Return the scene of picture i, clean or not.

        Raises:
          ValueError: it holds more than `MOST` things; ask `counts` first, or use `scenes`.
        """
        return from_codes(self.codes[i])

    def scenes(self) -> list[Scene | None]:
        """Return all scenes, None where a picture holds more than `MOST` things."""
        crowded = self.counts > MOST
        return [None if crowded[i] else self.scene(i) for i in range(len(self))]


def read(codes: np.ndarray, confidence: np.ndarray, tidy: np.ndarray) -> Readings:
    """Return readings, clean where a picture is tidy, every cell sure and the things few enough.

    Args:
      codes: (b, 16).
      confidence: (b, 16); clipped to [0, 1].
      tidy: (b,) nothing is left in the picture beside what the cells say.
    """
    confidence = np.clip(confidence, 0, 1).astype(np.float32)
    few = (codes > 0).sum(1) <= MOST
    clean = tidy & few & (confidence >= SURE).all(1)
    return Readings(codes.astype(np.int32), confidence, clean)


def certain(codes: np.ndarray, unclear: np.ndarray | None = None) -> Readings:
    """Return the readings of pictures that are known, by one who never errs.

    Args:
      codes: (b, 16).
      unclear: (b, 16) bool, cells of things that are not clean; None for none.
    """
    confidence = np.ones(codes.shape) if unclear is None else np.where(unclear, SURE / 2, 1.0)
    return read(codes, confidence, np.ones(len(codes), bool))


def agreement(a: Readings, b: Readings) -> dict[str, float]:
    """Return how far two readings of the same pictures agree, each share from 0 to 1.

    Returns:
      pictures: all 16 cells equal. cells: single cells equal. clean: both say clean or both say
      not. clean_pictures: equal among the pictures that both call clean, 1 where there are none.
    """
    if len(a) != len(b):
        raise ValueError(f"readings of {len(a)} and of {len(b)} pictures do not compare")
    same = a.codes == b.codes
    both = a.clean & b.clean
    share = lambda x: float(np.mean(x)) if np.size(x) else 1.0
    return {
        "pictures": share(same.all(1)),
        "cells": share(same),
        "clean": share(a.clean == b.clean),
        "clean_pictures": share(same.all(1)[both]),
    }
