"""The stage that makes the miniature's Qwen3-VL from nothing, on lessons drawn on the fly."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from clvr_jax.data.packing import Shape
from clvr_jax.data.plan import Epochs, Step, rows_of_process
from clvr_jax.miniature.lessons import lesson
from clvr_jax.miniature.pictures import Picture, rendered
from clvr_jax.miniature.render import SIDE
from clvr_jax.miniature.samples import Stream, row_generator
from clvr_jax.sft.vlm.batches import Arrays, Filling
from clvr_jax.sft.vlm.examples import Example, encode
from clvr_jax.sft.vlm.loss import Networks
from conversion.components import Component
from launch.bench import flops
from launch.training import vlm, world
from launch.training.stage import Data
from launch.training.vlm import find, networks, stage

__all__ = ["data", "find", "networks", "stage"]

_VERSION = 3  # of what the lessons are; another one is other data


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
    """Plan what every step draws: rows filled with lessons, one behind the other.

    Args:
      split: of the world; lessons are drawn for training only.
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
        raise ValueError(
            f"data is {split!r}; lessons are for train; give --config.data.train=train "
            "and no --config.data.validation"
        )
    world.require_steps(steps)
    reads, cfg = vlm.reader(config, weights), weights.config
    size = config.batch.accumulation * rows
    shape = Shape(config.data.tokens, config.data.images, (SIDE // cfg.vision.patch) ** 2)
    numbers = np.arange(size).reshape(config.batch.accumulation, rows)

    def row(epoch: int, number: int) -> list[tuple[Example, list[Picture]]]:
        """What comes, as long as it fits."""
        rng, taken = row_generator(config.seed, epoch, number, Stream.LESSONS), []
        tokens = images = 0
        while True:
            said = lesson(rng)
            example = encode(said.messages, reads, cfg)
            tokens, images = tokens + len(example.ids), images + len(said.pictures)
            if taken and (tokens > shape.tokens or images > shape.images):
                return taken
            taken.append((example, said.pictures))

    def make(step: Step) -> Arrays:
        own = rows_of_process(step.rows, *process)
        rows = [row(step.epoch, int(number)) for number in own.flat]
        shown = [picture for taken in rows for _, pictures in taken for picture in pictures]
        pixels = rendered(shown, own.size * shape.images)  # of one size, so that it compiles once
        images = map(Image.fromarray, pixels)
        filling = Filling(own.shape, step.static, cfg.vision)
        for at, taken in zip(np.ndindex(own.shape), rows, strict=True):
            for example, _ in taken:
                filling.add(at, _with(example, images, reads))
        return filling.arrays

    each = flops.train_vlm(cfg.text, cfg.vision, [shape.tokens], [shape.patches] * shape.images)
    return world.endless(
        split,
        fingerprint=f"conversations {_VERSION} {split} seed {config.seed}",
        steps=Epochs(lambda epoch: [Step(shape, numbers)], steps=steps),
        make=make,
        unit="rows",
        row_flops=lambda step: each,
    )


def _with(example: Example, images: Iterator[Any], reads: Any) -> Example:
    """An example with the next pictures in the places of its blank ones."""
    pictures = tuple((at, reads.picture(next(images))) for at, _ in example.pictures)
    return dataclasses.replace(example, pictures=pictures)
