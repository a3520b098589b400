"""Examples of different lengths packed into rows of one length, and rows into steps.

Nothing is cut and nothing is dropped. As every plan, a packing is a pure function of sizes, seed
and epoch; examples meet others in every epoch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from clvr_jax.data.plan import FILLING, Step, shuffled

WINDOW = 1024  # examples that are packed with one another; more only cost time
_PATCHES = 64  # rooms for patches are multiples of this


class Size(NamedTuple):
    """What an example needs.

    Attributes:
      tokens: of the whole conversation.
      images: in it.
      patches: of its largest image, 0 without one.
    """

    tokens: int
    images: int = 0
    patches: int = 0


class Shape(NamedTuple):
    """The room that every row of a step has: what a program is specialised to.

    Attributes:
      tokens: of a row.
      images: places for images, 0 or a power of two.
      patches: of one image.
    """

    tokens: int
    images: int
    patches: int


class Utilisation(NamedTuple):
    """Which share of the room of some steps is used, each from 0 to 1.

    Attributes:
      rows: that hold an example.
      tokens: of all rows.
      images: places for images that hold one; 1 where there are none.
    """

    rows: float
    tokens: float
    images: float


def pack(
    sizes: Sequence[Size],
    capacity: int,
    seed: int,
    epoch: int,
    *,
    most_images: int | None = None,
    names: Sequence[str] | None = None,
) -> list[list[int]]:
    """Return rows of indices of examples, every example in one row.

    The examples are shuffled; of every `WINDOW` of them the longest comes first and each goes into
    the first row that has room (first-fit decreasing, at most 11/9 of the fewest rows possible).

    Args:
      sizes: of every example.
      capacity: tokens of a row.
      seed: of the run.
      epoch: from 0; each has its own packing.
      most_images: of a row; None for no limit.
      names: of every example, for errors.

    Raises:
      ValueError: there are no examples, or some do not fit into a row; names the largest.
    """
    table = np.array(sizes, np.int64).reshape(-1, 3)
    if not len(table):
        raise ValueError("there are no examples to pack")
    _check(table, capacity, most_images, names)
    limit = table[:, 1].sum() if most_images is None else most_images
    order = shuffled(len(table), seed, epoch, 2)
    rows: list[list[int]] = []
    for start in range(0, len(order), WINDOW):
        window = order[start : start + WINDOW]
        longest_first = window[np.argsort(-table[window, 0], kind="stable")]
        rows += _first_fit(longest_first, table, np.array([capacity, limit]))
    return rows


def plan_packed(
    sizes: Sequence[Size],
    capacity: int,
    accumulation: int,
    rows: int,
    seed: int,
    epoch: int,
    *,
    most_images: int | None = None,
    names: Sequence[str] | None = None,
) -> list[Step]:
    """Return the steps of one epoch; `Step.static` is a `Shape`.

    `Step.rows` is (accumulation, rows, examples of a row), filled up with `FILLING`. Rows that need
    room for equally many images meet in a step, as far as there are enough of them: there are as
    few steps as the rows allow, and what does not fill them is spread evenly. Their rooms are few:
    powers of two, and what the largest image of all examples needs.

    Args:
      sizes, capacity, seed, epoch, most_images, names: as in `pack`.
      accumulation: micro-batches of a step.
      rows: of a micro-batch over all processes.

    Raises:
      ValueError: a batch size is not positive, or see `pack`.
    """
    if accumulation < 1 or rows < 1:
        raise ValueError(
            f"batch sizes must be positive; given accumulation {accumulation}, rows {rows}"
        )
    packed = pack(sizes, capacity, seed, epoch, most_images=most_images, names=names)
    largest = -(-max(size.patches for size in sizes) // _PATCHES) * _PATCHES
    shapes = []
    for row in packed:
        images = sum(sizes[i].images for i in row)
        patches = _power(max(sizes[i].patches for i in row), _PATCHES)
        shapes.append(Shape(capacity, _power(images), min(patches, largest)))
    # stable: rows of one shape stay shuffled
    order = sorted(shuffled(len(packed), seed, epoch, 3).tolist(), key=lambda i: shapes[i])
    steps = []
    for chosen in np.array_split(order, -(-len(order) // (accumulation * rows))):
        shape = Shape(*np.max([shapes[i] for i in chosen], axis=0).tolist())
        table = np.full((accumulation * rows, max(len(packed[i]) for i in chosen)), FILLING)
        for place, i in zip(table, chosen):
            place[: len(packed[i])] = packed[i]
        steps.append(Step(shape, table.reshape(accumulation, rows, -1)))
    return [steps[i] for i in shuffled(len(steps), seed, epoch, 1)]


def utilisation(steps: Sequence[Step], sizes: Sequence[Size]) -> Utilisation:
    """Return which share of the room of some steps is used."""
    rows = used = tokens = room = images = places = 0
    for step in steps:
        table = step.rows.reshape(-1, step.rows.shape[-1])
        rows += len(table)
        used += int((table != FILLING).any(axis=1).sum())
        room += len(table) * step.static.tokens
        places += len(table) * step.static.images
        for i in table[table != FILLING]:
            tokens += sizes[i].tokens
            images += sizes[i].images
    return Utilisation(used / rows, tokens / room, images / places if places else 1.0)


def _check(
    table: np.ndarray, capacity: int, most_images: int | None, names: Sequence[str] | None
) -> None:
    for what, column, limit in (("tokens", 0, capacity), ("images", 1, most_images)):
        if limit is None:
            continue
        over = np.flatnonzero(table[:, column] > limit)
        if len(over):
            worst = int(over[np.argmax(table[over, column])])
            name = worst if names is None else repr(names[worst])
            raise ValueError(
                f"example {name} has {table[worst, column]} {what}, a row holds {limit} "
                f"({len(over)} of {len(table)} examples do not fit); examples are never cut: give "
                f"rows more {what}, or leave these examples out"
            )


def _first_fit(order: np.ndarray, table: np.ndarray, limits: np.ndarray) -> list[list[int]]:
    rows: list[list[int]] = []
    left = np.tile(limits, (len(order), 1))  # of rows that there are, and of those to come
    for item in order.tolist():
        need = table[item, :2]
        row = int(np.argmax((left[: len(rows) + 1] >= need).all(axis=1)))
        if row == len(rows):
            rows.append([])
        rows[row].append(item)
        left[row] -= need
    return rows


def _power(count: int, least: int = 1) -> int:
    """The smallest power of two that is at least both; 0 for nothing."""
    return max(least, 1 << (count - 1).bit_length()) if count else 0
