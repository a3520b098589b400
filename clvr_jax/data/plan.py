"""Which items every step of a run reads, decided before training from sizes alone.

A plan is a pure function of (sizes, seed, epoch, batch sizes): the number of steps is known, a step
is found by its index on every host, and nothing is dropped.
"""

import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

FILLING = -1  # the index of a row that holds no item


class Step(NamedTuple):
    """What one optimiser step reads.

    Attributes:
      static: shapes that the step's program is specialised to.
      rows: (accumulation, rows) indices of items over all processes, `FILLING` where there is none.
      epoch: from 0, set by `Epochs`.
    """

    static: Hashable
    rows: np.ndarray
    epoch: int = 0


def plan_groups(
    keys: Sequence[Hashable], accumulation: int, rows: int, seed: int, epoch: int
) -> list[Step]:
    """Return the steps of one epoch; a step's items share their key, and each item comes once.

    Items are shuffled within their key and steps among all keys. What does not fill a whole number
    of steps is spread evenly over the steps of its key, so that none follows the gradient of a few
    items alone; the rows left over are `FILLING`, at the end of a step.

    Args:
      keys: shapes of every item.
      accumulation: micro-batches of a step.
      rows: items of a micro-batch over all processes.
      seed: of the run.
      epoch: from 0; each has its own order.

    Raises:
      ValueError: there are no items, or a batch size is not positive.
    """
    if not keys or accumulation < 1 or rows < 1:
        raise ValueError(
            "a plan needs items and positive batch sizes; given "
            f"{len(keys)} items, accumulation {accumulation}, rows {rows}"
        )
    groups: dict[Hashable, list[int]] = {}
    for item in shuffled(len(keys), seed, epoch, 0):
        groups.setdefault(keys[item], []).append(int(item))
    steps = []
    for key in dict.fromkeys(keys):  # in the order of the data, whatever the shuffle
        count = -(-len(groups[key]) // (accumulation * rows))
        for items in np.array_split(groups[key], count):
            steps.append(Step(key, filled(items, accumulation, rows)))
    return [steps[i] for i in shuffled(len(steps), seed, epoch, 1)]


def filled(items: Sequence[int] | np.ndarray, accumulation: int, rows: int) -> np.ndarray:
    """Return items as (accumulation, rows), in order, with `FILLING` at the end.

    Raises:
      ValueError: there are more items than rows.
    """
    size = accumulation * rows
    if len(items) > size:
        raise ValueError(f"{len(items)} items do not fit into {accumulation} x {rows} rows")
    out = np.full(size, FILLING, np.int64)
    out[: len(items)] = items
    return out.reshape(accumulation, rows)


def shuffled(count: int, *seed: int) -> np.ndarray:
    """Return a permutation of `range(count)`, the same in every version of numpy.

    numpy keeps the bits of its generators from version to version, but not its shuffles.
    """
    return np.argsort(np.random.PCG64(list(seed)).random_raw(count), kind="stable")


def rows_of_process(rows: np.ndarray, index: int, count: int) -> np.ndarray:
    """Return the part of (accumulation, rows) that one of `count` processes loads.

    Processes that hold the same rows of the mesh count as one.

    Raises:
      ValueError: the rows cannot be shared out evenly.
    """
    total = rows.shape[1]
    if total % count or not 0 <= index < count:
        raise ValueError(
            f"{total} rows of a micro-batch over {count} processes (this one is {index}): choose "
            "a batch size that the number of processes divides"
        )
    share = total // count
    return rows[:, index * share : (index + 1) * share]


class Epochs(Sequence[Step]):
    """The steps of a whole run, epoch after epoch, of which only two epochs are held at a time.

    Args:
      plan: returns the steps of an epoch, given its number from 0; the same every time.
      epochs: how many to go through; or else
      steps: how many steps to make, through as many epochs as it takes.

    Raises:
      ValueError: not exactly one of `epochs` and `steps` is given, it is not positive, or an epoch
        has no steps.
    """

    def __init__(
        self,
        plan: Callable[[int], list[Step]],
        *,
        epochs: int | None = None,
        steps: int | None = None,
    ):
        if (epochs is None) == (steps is None) or (epochs or steps or 0) < 1:
            raise ValueError(f"give epochs or steps, at least 1: epochs {epochs}, steps {steps}")
        self._plan = functools.lru_cache(maxsize=2)(plan)  # prefetching crosses into the next one
        ends = [0]
        while len(ends) <= epochs if epochs else ends[-1] < steps:
            count = len(self._plan(len(ends) - 1))
            if count == 0:
                raise ValueError(f"epoch {len(ends) - 1} has no steps; the data is empty")
            ends.append(ends[-1] + count)
        self._ends = np.array(ends)
        self._length = int(steps or ends[-1])

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Step:
        """Return a step; negative indices count from the end, slices are not taken."""
        at = range(self._length)[index]
        epoch, within = self.place(at)
        return self._plan(epoch)[within]._replace(epoch=epoch)

    def __iter__(self) -> Iterator[Step]:
        return (self[i] for i in range(self._length))

    def place(self, index: int) -> tuple[int, int]:
        """Return the epoch of a step and its number within the epoch, both from 0."""
        epoch = int(np.searchsorted(self._ends, index, side="right")) - 1
        return epoch, int(index - self._ends[epoch])

    def epoch_ends(self) -> list[int]:
        """Return the number of steps made when each epoch ends, the last perhaps cut short."""
        return [min(int(end), self._length) for end in self._ends[1:]]

    def statics(self) -> list[Hashable]:
        """Return every distinct static, in the order of first use: the programs to compile."""
        return list(dict.fromkeys(step.static for step in self))
