"""Steps of a plan made into batches by background threads, in the order of the plan, with Grain."""

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from clvr_jax.data.plan import Step

Arrays = dict[str, Any]  # numpy arrays by name, or a list of them


class LoadError(RuntimeError):
    """A batch could not be made; says which step, and which item where that is known."""


class Loaded(NamedTuple):
    """A batch, ready.

    Attributes:
      index: of the step in the run.
      static: shapes that the step's program is specialised to.
      arrays: what `make` returned.
    """

    index: int
    static: Hashable
    arrays: Arrays


def load(
    steps: Sequence[Step],
    make: Callable[[Step], Arrays],
    start: int = 0,
    *,
    threads: int = 4,
    prefetch: int = 4,
) -> "Loader":
    """Return an iterator over the batches of `steps[start:]`.

    Args:
      steps: the plan of the whole run.
      make: reads this process's rows of a step; called from several threads at once, so its result
        must depend on the step alone.
      start: first step, such as the number of steps made before a restart.
      threads: steps that are made at the same time.
      prefetch: batches made or being made beyond the one in use; more threads than that idle. With
        0 of either, a batch is made when it is asked for.

    Raises:
      ValueError: `start` lies beyond the plan.
    """
    if not 0 <= start <= len(steps):
        raise ValueError(f"step {start} lies outside of a plan of {len(steps)} steps")
    if 0 in (threads, prefetch):
        threads = prefetch = 0
    return Loader(steps, make, start, threads, prefetch)


class Loader(Iterator[Loaded]):
    """See `load`. `close()`, or leaving the `with` block, ends the threads."""

    def __init__(self, steps, make, start: int, threads: int, prefetch: int):
        import grain  # brings jax with it

        def loaded(index: int) -> Loaded:
            step = steps[index]
            with naming(f"step {index}"):
                return Loaded(index, step.static, make(step))

        # a failure is handed over as a value: Grain would bury it among its own notes
        def attempt(index: int) -> Loaded | Exception:
            try:
                return loaded(index)
            except Exception as error:
                return error

        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
        rest = grain.MapDataset.source(range(start, len(steps))).map(attempt)
        self._batches = iter(rest.to_iter_dataset(options))
        self._batches.start_prefetch()  # the first batches are made while the program compiles
        self._open = True

    def __next__(self) -> Loaded:
        if not self._open:
            raise StopIteration
        batch = next(self._batches)
        if isinstance(batch, Exception):
            self.close()
            raise batch
        return batch

    def close(self) -> None:
        """Stop reading; what is being made is finished in the background and dropped."""
        if self._open:
            self._open = False
            self._batches.close()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Have what fails inside the block say which item it was.

    Raises:
      LoadError: with the name and the cause.
    """
    try:
        yield
    except LoadError as error:
        raise LoadError(f"{name}: {error}") from error.__cause__
    except Exception as error:
        what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise LoadError(f"{name}: {what}") from error


def stack(items: Sequence[np.ndarray | None], rows: tuple[int, ...], like: Any) -> np.ndarray:
    """Return items stacked and shaped (*rows, ...), zeros where an item is None.

    Args:
      items: arrays of one shape and type, as many as `rows` multiply to.
      rows: leading axes, (accumulation, rows).
      like: (shape, dtype) of an item.

    Raises:
      ValueError: an item has another shape.
    """
    shape, dtype = like
    out = np.zeros((len(items), *shape), dtype)
    for row, item in zip(out, items, strict=True):
        if item is not None:
            if item.shape != tuple(shape):
                raise ValueError(f"an item of shape {item.shape}, {tuple(shape)} was planned")
            row[...] = item
    return out.reshape(*rows, *shape)
