"""Steps of samples as arrays, for the networks that draw.

Every leaf is (accumulation, rows, ...), the rows of this process; `weights` is 1.
"""

import dataclasses
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from clvr_jax.data.plan import Step, rows_of_process, shuffled
from clvr_jax.generate.prompt import render as templated
from clvr_jax.generate.prompt import tokenize
from clvr_jax.miniature.held_out import Split
from clvr_jax.miniature.pictures import Picture, stacked
from clvr_jax.miniature.samples import (
    ROUND,
    Drawing,
    Stream,
    crowded_picture,
    drawing,
    row_generator,
)
from clvr_jax.miniature.scene import COLUMNS, ROWS
from clvr_jax.models.flux2.layout import Layout

Arrays = dict[str, Any]
_TRIES = 1000  # for a text that is short enough
# parts of a round's prompts, from the shortest, and the text length that they take by its rank
_LENGTHS = (0.625, 0.25, 0.125)


def crowds(step: Step, seed: int, process: tuple[int, int] = (0, 1)) -> Arrays:
    """Return crowded pictures for the VAE, this process's rows of a step.

    They are `codes` (16,) int32 and `seeds` () uint32, which the device renders.
    """
    rows = rows_of_process(step.rows, *process)
    of = lambda row: row_generator(seed, step.epoch, int(row), Stream.CROWDS)
    drawn = [crowded_picture(of(row)) for row in rows.flat]
    return {"weights": np.ones(rows.shape, np.float32), **_shown(drawn, rows.shape)}


@dataclasses.dataclass(frozen=True)
class DrawingBatches:
    """Makes the batch of a step of prompts or edits, and plans such steps.

    A round is some steps of each task. All prompts of a round are drawn together and put into steps
    by their length, so that most steps have short texts and none is chosen by its length. A batch
    has `weights`, `ids` (s,), `lengths` (), `latents` (rows, cols, c) and the list
    `reference_latents`.

    Attributes:
      tokenizer: the text encoder's.
      encode: from pictures, codes (b, 16) and seeds (b,), to their latents (b, rows, cols, c).
      split: of the world.
      texts: three text lengths, increasing.
      tasks: steps of a round with prompts, a multiple of 8; with edits; with a second reference,
        in turn of the first and of the second text length. A text that is longer than its step's is
        drawn anew, prompts too; few are.
      accumulation: micro-batches of a step.
      rows: of a micro-batch, over all processes.
      seed: of the run.
      dropout: share of rows whose text is empty instead.
      process: number of this process, and how many there are.

    Raises:
      ValueError: a number is not as said.
    """

    tokenizer: Any
    encode: Callable[[np.ndarray, np.ndarray], Any]
    split: Split
    texts: tuple[int, int, int]
    tasks: tuple[int, int, int]
    accumulation: int
    rows: int
    seed: int
    dropout: float | int = 0.0
    process: tuple[int, int] = (0, 1)

    def __post_init__(self):
        if len(self.texts) != 3 or sorted(set(self.texts)) != list(self.texts):
            raise ValueError(f"texts are three lengths, increasing; given {self.texts}")
        if min(self.tasks) < 0 or self.tasks[0] % 8 or not sum(self.tasks):
            raise ValueError(
                f"tasks are {self.tasks}; prompts must be a multiple of 8, none may be negative"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it is a share of the rows, below 1")
        if self._size * sum(self.tasks) > ROUND:
            raise ValueError(
                f"a round of tasks {self.tasks} with {self._size} samples a step has more than "
                f"{ROUND} samples; give fewer"
            )
        # the object is frozen for its users; what follows is a cache
        object.__setattr__(self, "_sorted", functools.lru_cache(maxsize=3)(self._draw_prompts))
        object.__setattr__(self, "_lock", threading.Lock())

    @property
    def _size(self) -> int:
        return self.accumulation * self.rows

    @property
    def _prompt_texts(self) -> list[int]:
        """Text lengths of a round's steps with prompts, from the shortest."""
        shares = zip(self.texts, _LENGTHS, strict=True)
        return [text for text, share in shares for _ in range(round(share * self.tasks[0]))]

    def plan(self, epoch: int) -> list[Step]:
        """Return the steps of a round, in an order of its own."""
        _, edits, brings = self.tasks
        grid = (ROWS, COLUMNS)  # of a picture
        shapes = [Layout(text, grid) for text in self._prompt_texts]
        shapes += [Layout(self.texts[0], grid, (grid,))] * edits
        shapes += [Layout(self.texts[i % 2], grid, (grid, grid)) for i in range(brings)]
        numbers = np.arange(len(shapes) * self._size).reshape(-1, self.accumulation, self.rows)
        order = shuffled(len(shapes), self.seed, epoch, Stream.ORDER)
        return [Step(shapes[i], numbers[i]) for i in order]

    def __call__(self, step: Step) -> Arrays:
        """Return this process's rows of a step.

        Raises:
          ValueError: hardly any text is as short as the step's.
        """
        rows = rows_of_process(step.rows, *self.process)
        drawn = [self._row(int(row), step) for row in rows.flat]
        texts = [
            "" if self._dropped(int(row), step) else each.text
            for row, each in zip(rows.flat, drawn)
        ]
        ids, lengths = tokenize(self.tokenizer, texts, step.static.text)
        references = zip(*(each.references for each in drawn), strict=True)
        latents, *others = [
            self._encoded(pictures, rows.shape)
            for pictures in ([each.target for each in drawn], *references)
        ]
        return {
            "weights": np.ones(rows.shape, np.float32),
            "ids": ids.reshape(*rows.shape, -1),
            "lengths": lengths.reshape(rows.shape),
            "latents": latents,
            "reference_latents": others,
        }

    def _encoded(self, pictures: Sequence[Picture], lead: tuple[int, ...]) -> np.ndarray:
        latents = np.asarray(self.encode(*stacked(pictures)))
        return latents.reshape(*lead, *latents.shape[1:])

    def _row(self, row: int, step: Step) -> Drawing:
        if not step.static.references:
            with self._lock:  # one thread draws a round, the others wait for it
                return self._sorted(step.epoch)[row]
        references = len(step.static.references)
        return self._fitting(row, step.epoch, references, step.static.text)[0]

    def _fitting(self, row: int, epoch: int, references: int, longest: int) -> tuple[Drawing, int]:
        """The first of a row's drawings whose text is not too long, and its length."""
        rng = row_generator(self.seed, epoch, row, Stream.DRAWINGS)
        for _ in range(_TRIES):
            drawn = drawing(rng, references, self.split)
            length = len(self.tokenizer.encode(templated(drawn.text), add_special_tokens=False))
            if length <= longest:
                return drawn, length
        raise ValueError(
            f"of {_TRIES} texts with {references} references none has at most {longest} tokens; "
            f"texts are {self.texts}, give longer ones"
        )

    def _draw_prompts(self, epoch: int) -> list[Drawing]:
        """The prompts of a round by their length, each no longer than the step of its place takes.

        In few rounds more prompts than usual are long: what its place does not take is drawn anew.
        """
        limits = np.repeat(self._prompt_texts, self._size).tolist()
        drawn = [self._fitting(row, epoch, 0, self.texts[-1]) for row in range(len(limits))]
        order = np.argsort([length for _, length in drawn], kind="stable").tolist()
        return [
            drawn[row][0] if drawn[row][1] <= limit else self._fitting(row, epoch, 0, limit)[0]
            for row, limit in zip(order, limits, strict=True)
        ]

    def _dropped(self, row: int, step: Step) -> bool:
        rng = row_generator(self.seed, step.epoch, row, Stream.DROPOUT)
        return rng.random() < self.dropout


def _shown(pictures: Sequence[Picture], lead: tuple[int, ...]) -> Arrays:
    """What the device renders pictures from."""
    codes, seeds = stacked(pictures)
    return {"codes": codes.reshape(*lead, -1), "seeds": seeds.reshape(lead)}
