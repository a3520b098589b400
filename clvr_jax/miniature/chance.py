"""What is drawn at random everywhere: one of several things, an order."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")
Rng = np.random.Generator


def pick(rng: Rng, options: Sequence[T]) -> T:
    """Return one of a sequence; `rng.choice` takes thirty times as long."""
    return options[int(rng.random() * len(options))]


def shuffle(rng: Rng, items: Sequence[T]) -> list[T]:
    """Return the items in random order."""
    keys = rng.random(len(items)).tolist()
    return [items[k] for k in sorted(range(len(items)), key=keys.__getitem__)]
