"""The stage that makes the miniature's Qwen3-VL from nothing, on conversations drawn on the fly."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from clvr_jax.data.packing import Shape
from clvr_jax.data.plan import Epochs, Step, rows_of_process
from clvr_jax.miniature.reading import conversation, rendered
from clvr_jax.miniature.render import SIDE
from clvr_jax.miniature.samples import Picture, generator
from clvr_jax.sft.vlm.batches import Arrays, Filling
from clvr_jax.sft.vlm.examples import Example, encode
from clvr_jax.sft.vlm.loss import Networks
from conversion.components import Component
from launch.bench import flops
from launch.training import vlm
from launch.training.stage import Data

_VERSION = 1  # of what the conversations are; another one is other data
_ROUND = 2**20  # numbers of rows that a round has at most
_CONVERSATIONS = 16  # stream of random numbers


def data(
    split: str,
    config: Any,
    nets: Networks,
    weights: Component,
    rows: int,
    process: tuple[int, int],
    *,
    steps: int | None = None,
    epochs: int | None = None,
    validation: bool = False,
) -> Data:
    """Plan what every step draws: rows filled with conversations, one behind the other.

    Args:
      split: of the world; conversations are drawn for training only.
      config: of the stage.
      nets, weights: from `launch.training.vlm`.
      rows: of a micro-batch, over all devices.
      process: which rows this process draws.
      steps: length of the run.
      epochs, validation: not for this stage.

    Raises:
      ValueError: another split, validation, or no number of steps.
    """
    if split != "train" or validation:
        raise ValueError(f"data is {split!r}; conversations are for train, without validation")
    if not steps:
        raise ValueError("data never repeat, so that there are no epochs; give --config.steps")
    reads, cfg = vlm.reader(config, weights), weights.config
    size = config.batch.accumulation * rows
    shape = Shape(config.data.tokens, config.data.images, (SIDE // cfg.vision.patch) ** 2)
    numbers = np.arange(size).reshape(config.batch.accumulation, rows)

    def row(number: int) -> list[tuple[Example, list[Picture]]]:
        """What comes, as long as it fits."""
        rng, taken, room = generator(config.seed, number, _CONVERSATIONS), [], [0, 0]
        while True:
            said = conversation(rng)
            example = encode(said.messages, reads, cfg)
            room = [room[0] + len(example.ids), room[1] + len(said.pictures)]
            if taken and (room[0] > shape.tokens or room[1] > shape.images):
                return taken
            taken.append((example, said.pictures))

    def make(step: Step) -> Arrays:
        own = rows_of_process(step.rows, *process)
        rows = [row(step.epoch * _ROUND + int(number)) for number in own.flat]
        shown = [picture for taken in rows for _, pictures in taken for picture in pictures]
        images = iter(rendered(shown, own.size * shape.images))
        filling = Filling(own.shape, step.static, cfg.vision)
        for at, taken in zip(np.ndindex(own.shape), rows, strict=True):
            for example, _ in taken:
                filling.add(at, _with(example, images, reads))
        return filling.arrays

    each = flops.train_vlm(cfg.text, cfg.vision, [shape.tokens], [shape.patches] * shape.images)
    return Data(
        path=f"world:{split}",
        records=0,
        fingerprint=f"conversations {_VERSION} {split} seed {config.seed}",
        steps=Epochs(lambda epoch: [Step(shape, numbers)], steps=steps),
        make=make,
        counts=lambda step: {"rows": float(step.rows.size)},
        flops=lambda step: float(each * step.rows.size),
        describe=lambda step: f"first row: number {step.rows.flat[0]} of round {step.epoch}",
    )


def _with(example: Example, images: Iterator[Any], reads: Any) -> Example:
    """An example with the next pictures in the places of its blank ones."""
    pictures = tuple((at, reads.picture(next(images))) for at, _ in example.pictures)
    return dataclasses.replace(example, pictures=pictures)
