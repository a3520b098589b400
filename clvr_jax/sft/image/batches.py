"""Steps of samples as arrays, from pictures or from features made before.

Every leaf is (accumulation, rows, ...), the rows of this process. `weights` is 1, or 0 for filling.
Then either `ids` (s,) and `lengths` (), `pixels` (height, width, 3) and the list
`reference_pixels`, uint8; or `text` (s, features), `latents` (rows, cols, c) and the list
`reference_latents`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from clvr_jax.data.loader import naming, stack
from clvr_jax.data.plan import FILLING, Step, rows_of_process
from clvr_jax.generate.prompt import tokenize
from clvr_jax.models.flux2.layout import Layout
from clvr_jax.sft.image.features import Features
from clvr_jax.sft.image.pictures import read_pixels
from clvr_jax.sft.image.samples import Inputs, Rules, Sample

Arrays = dict[str, Any]
_DROPOUT = 2  # apart from the draws of the plan


@dataclasses.dataclass(frozen=True)
class Batches:
    """Makes the batch of a step.

    Attributes:
      source: trajectories with absolute image paths, by index.
      samples: from `samples.index`, which the plan's rows count.
      tokenizer: the text encoder's.
      rules: those of the index.
      seed: of the run.
      dropout: share of rows whose text is empty instead, drawn anew for every sample and epoch:
        for base weights, which are sampled with guidance against the empty text.
      features: where text features and latents lie, or None to give ids and pixels.
      process: number of this process, and how many there are.
    """

    source: Any
    samples: Sequence[Sample]
    tokenizer: Any
    rules: Rules
    seed: int = 0
    dropout: float | int = 0.0
    features: Features | None = None
    process: tuple[int, int] = (0, 1)

    def __post_init__(self):
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it is a share of the rows, below 1")

    def __call__(self, step: Step) -> Arrays:
        """Return this process's rows of a step.

        Raises:
          LoadError: a sample cannot be read, or is not what was planned; names it.
        """
        rows = rows_of_process(step.rows, *self.process)
        made = [self._row(int(i), step) for i in rows.flat]
        lead, layout = rows.shape, step.static
        weights = (rows != FILLING).astype(np.float32)
        column = lambda i: [None if row is None else row[i] for row in made]
        if self.features is not None:
            specs = enumerate(self.features.specs(layout))
            text, latents, *references = [stack(column(i), lead, spec) for i, spec in specs]
            return {
                "weights": weights,
                "text": text,
                "latents": latents,
                "reference_latents": references,
            }
        ids, lengths = tokenize(self.tokenizer, [""], layout.text)
        # filling has the empty text: a text without tokens has no attention
        words = [(ids[0], lengths[0]) if row is None else row[0] for row in made]
        pixels = [
            stack(column(i), lead, ((*size, 3), np.uint8))
            for i, size in enumerate(self._sizes(layout), 1)
        ]
        return {
            "weights": weights,
            "ids": np.stack([ids for ids, _ in words]).reshape(*lead, -1),
            "lengths": np.array([length for _, length in words], np.int32).reshape(lead),
            "pixels": pixels[0],
            "reference_pixels": pixels[1:],
        }

    def _row(self, index: int, step: Step) -> list[Any] | None:
        """What a row holds: text, target, references."""
        if index == FILLING:
            return None
        sample = self.samples[index]
        trajectory = self.source[sample.trajectory]
        with naming(f"trajectory {trajectory.id}, image {sample.step + 1}"):
            inputs = self.rules.inputs(trajectory, sample.step)
            if self.dropped(index, step.epoch):
                inputs = inputs._replace(text="")
            return self._read(inputs, step.static)

    def _read(self, inputs: Inputs, layout: Layout) -> list[Any]:
        pictures = [inputs.target, *inputs.references]
        sizes, planned = [picture.size for picture in pictures], self._sizes(layout)
        if sizes != planned:
            raise ValueError(
                f"its picture and references have sizes {sizes}, {planned} were planned; the data "
                "changed since"
            )
        ids, lengths = tokenize(self.tokenizer, [inputs.text], layout.text)
        if self.features is not None:
            keys = [self.features.text_key(ids[0], int(lengths[0]))]
            keys += [self.features.picture_key(picture) for picture in pictures]
            return [self.features.read(key) for key in keys]
        factor = self.rules.buckets.factor
        return [(ids[0], lengths[0]), *(read_pixels(picture, factor) for picture in pictures)]

    def _sizes(self, layout: Layout) -> list[tuple[int, int]]:
        """Heights and widths in pixels of target and references."""
        factor = self.rules.buckets.factor
        return [(y * factor, x * factor) for y, x in (layout.noise, *layout.references)]

    def dropped(self, index: int, epoch: int) -> bool:
        """Return whether a sample goes without its text in an epoch."""
        draw = np.random.PCG64([self.seed, epoch, _DROPOUT, index]).random_raw()
        return draw / 2**64 < self.dropout
