"""Many pictures from one model: jobs in any order into batches of few shapes, with their times."""

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from launch.runtime import compile_seconds

Pictures = Any  # uint8 (b, y, x, 3) arrays on the host
# texts, references of each, seeds, text length -> pictures
Draw = Callable[[Sequence[str], Sequence[Sequence[np.ndarray]], Sequence[int], int], Pictures]
_EVERY = 5.0  # seconds between lines of progress


class Job(NamedTuple):
    """A picture to draw.

    Attributes:
      text: prompt or instruction.
      seed: of its noise.
      references: pictures given, uint8 (y, x, 3).
    """

    text: str
    seed: int
    references: tuple[np.ndarray, ...] = ()


class Group(NamedTuple):
    """Jobs of one shape, drawn one after another in batches of one size.

    Attributes:
      references: of each job.
      text_tokens: to which texts are padded.
      batch: pictures of a call.
      jobs: their numbers.
    """

    references: int
    text_tokens: int
    batch: int
    jobs: np.ndarray


def groups(
    jobs: Sequence[Job], tokens: Sequence[int], bucket: Callable[[int], int], most: int
) -> list[Group]:
    """Return the groups of jobs, so that each text is in the smallest bucket that it fits into.

    Args:
      jobs: all of them.
      tokens: length of each text.
      bucket: the text length for a number of tokens.
      most: pictures of a batch; a group takes fewer where that leaves less of its last one empty.
    """
    shapes: dict[tuple[int, int], list[int]] = {}
    for number, (job, length) in enumerate(zip(jobs, tokens, strict=True)):
        shapes.setdefault((len(job.references), bucket(length)), []).append(number)
    found = []
    for (references, text), numbers in sorted(shapes.items()):
        calls = -(-len(numbers) // most)
        found.append(Group(references, text, -(-len(numbers) // calls), np.array(numbers)))
    return found


def draw_all(
    draw: Draw, jobs: Sequence[Job], found: Sequence[Group], what: str
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Return the picture of every job, in their order, and what each group took.

    Args:
      draw: draws a batch.
      jobs: all of them; at least one.
      found: their groups.
      what: said in lines of progress.
    """
    pictures: list[Any] = [None] * len(jobs)
    speed, began, said, done = [], time.perf_counter(), time.perf_counter(), 0
    for group in found:
        start = time.perf_counter()
        with compile_seconds() as compiled:
            for i in range(0, len(group.jobs), group.batch):
                numbers = group.jobs[i : i + group.batch]
                full = np.resize(numbers, group.batch)  # the last batch repeats what it has
                batch = [jobs[number] for number in full]
                texts, seeds, references = zip(*batch, strict=True)
                drawn = draw(texts, references, seeds, group.text_tokens)
                for number, picture in zip(numbers, drawn):
                    pictures[number] = picture
                done += len(numbers)
                now = time.perf_counter()
                if now - said > _EVERY or done == len(jobs):
                    left = (now - began) / done * (len(jobs) - done)
                    progress = f"{what}: {done}/{len(jobs)}, {now - began:.0f} s"
                    print(f"{progress}, about {left:.0f} s left", file=sys.stderr, flush=True)
                    said = now
        seconds = time.perf_counter() - start
        speed.append(
            {
                "references": group.references,
                "text_tokens": group.text_tokens,
                "batch": group.batch,
                "pictures": len(group.jobs),
                "seconds": round(seconds, 3),
                "compile_s": round(compiled(), 3),
                "pictures_per_s": _per_second(len(group.jobs), seconds - compiled()),
            }
        )
    return np.stack(pictures), speed


def total_speed(speed: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return seconds and pictures per second of some groups together, compiling apart."""
    pictures, seconds, compiling = (
        sum(group[name] for group in speed) for name in ("pictures", "seconds", "compile_s")
    )
    drawing = max(seconds - compiling, 0.0)
    return {
        "pictures": pictures,
        "drawing_s": round(drawing, 3),
        "compile_s": round(compiling, 3),
        "pictures_per_s": _per_second(pictures, drawing),
    }


def _per_second(pictures: int, seconds: float) -> float:
    return round(pictures / max(seconds, 1e-9), 3)
