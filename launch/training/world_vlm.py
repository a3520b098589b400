"""The stage that makes the miniature's Qwen3-VL from nothing, on lessons drawn on the fly."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from clvr_jax.data.packing import Shape
from clvr_jax.data.plan import Epochs, Step, rows_of_process
from clvr_jax.miniature.chance import Rng
from clvr_jax.miniature.lessons import STORY, lesson
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

Drawn = tuple[Example, list[Picture]]
_TRIES = 1000  # for a story that is short enough
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
    """Plan what every step draws: rows that begin with a story and are filled with short lessons.

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

    def draw(rng: Rng, task: str | None) -> Drawn:
        said = lesson(rng, task)
        return encode(said.messages, reads, cfg), said.pictures

    def make(step: Step) -> Arrays:
        own = rows_of_process(step.rows, *process)
        of = lambda number: row_generator(config.seed, step.epoch, int(number), Stream.LESSONS)
        rows = [fill(of(number), shape, draw) for number in own.flat]
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


def fill(rng: Rng, room: Shape, draw: Callable[[Rng, str | None], Drawn]) -> list[Drawn]:
    """Return a story, and short lessons behind it until one does not fit.

    Short lessons are about as long as one another, stories are not: were all drawn alike, most that
    do not fit were long stories, and those would hardly be learnt.

    Args:
      rng: decides everything.
      room: of a row.
      draw: makes a lesson of a task.

    Raises:
      ValueError: hardly any story is short enough.
    """
    fits = lambda taken: (
        sum(len(example.ids) for example, _ in taken) <= room.tokens
        and sum(len(pictures) for _, pictures in taken) <= room.images
    )
    for _ in range(_TRIES):
        taken = [draw(rng, STORY)]
        if fits(taken):
            break
    else:
        raise ValueError(
            f"of {_TRIES} stories none has at most {room.tokens} tokens and {room.images} "
            "pictures; give a larger --config.data.tokens or --config.data.images"
        )
    while fits(longer := [*taken, draw(rng, None)]):
        taken = longer
    return taken


def _with(example: Example, images: Iterator[Any], reads: Any) -> Example:
    """An example with the next pictures in the places of its blank ones."""
    pictures = tuple((at, reads.picture(next(images))) for at, _ in example.pictures)
    return dataclasses.replace(example, pictures=pictures)
