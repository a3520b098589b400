"""The stage that makes the miniature's Qwen3-VL from nothing, on lessons drawn on the fly."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from clvr_jax.data.packing import Shape
from clvr_jax.data.plan import Epochs, Step, rows_of_process, shuffled
from clvr_jax.miniature.chance import Rng
from clvr_jax.miniature.lessons import lesson, shares, some_task
from clvr_jax.miniature.pictures import Picture, rendered
from clvr_jax.miniature.render import SIDE
from clvr_jax.miniature.samples import Stream, row_generator
from clvr_jax.sft.vlm.batches import Arrays, Filling
from clvr_jax.sft.vlm.examples import Example, encode, spread
from clvr_jax.sft.vlm.loss import Networks
from conversion.components import Component
from launch.bench import flops
from launch.training import vlm, world
from launch.training.stage import Data
from launch.training.vlm import find, stage

__all__ = ["data", "find", "networks", "stage"]

Drawn = tuple[Example, list[Picture]]
_PARTS = 3  # rows of short lessons alone that are as long as one with a long one
_LEAST = 600  # tokens of the longest short lesson, about
_TRIES = 1000  # for a lesson that is short enough
_VERSION = 28  # of what the lessons are; another one is other data


def networks(config: Any, weights: Component | None) -> Networks:
    """Return the networks as they train; see `vlm.networks`."""
    nets = vlm.networks(config, weights)
    return dataclasses.replace(
        nets,
        language=nets.language.clone(scan=world.LAYERS),
        vision=nets.vision.clone(scan=world.LAYERS),
    )


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
    """Plan what every step draws: rows of short lessons, or rows that begin with a long one.

    Short lessons alone come in more and shorter rows, whose attention costs less.

    Args:
      split: of the world; lessons are drawn for training only.
      config: of the stage.
      nets, weights: from `launch.training.vlm`.
      rows: of a micro-batch, over all devices.
      process: which rows this process draws.
      steps: length of the run.
      epochs, validation: not for this stage.

    Raises:
      ValueError: another split, validation, no number of steps, rows too short, shares of lessons
        that are no shares, or positions as in `vlm.positions`.
    """
    if split != "train" or validation:
        raise ValueError(
            f"data is {split!r}; lessons are for train; give --config.data.train=train "
            "and no --config.data.validation"
        )
    world.require_steps(steps)
    short, long = shares(config.lessons)
    for name, tasks in (("short", short), ("long", long)):
        if not tasks and (name == "short" or config.tasks.long):
            raise ValueError(f"no share of {name} lessons is above 0; give one of --config.lessons")
    reads, cfg, room = vlm.reader(config, weights), weights.config, vlm.positions(config, weights)
    patches = (SIDE // cfg.vision.patch) ** 2
    row = Shape(config.data.tokens, config.data.images, patches)
    part = Shape(row.tokens // _PARTS, row.images // _PARTS, patches)
    kinds = [(part, rows * _PARTS)] * config.tasks.short + [(row, rows)] * config.tasks.long
    if not kinds or part.tokens < _LEAST or not part.images:
        raise ValueError(
            f"a round of {len(kinds)} steps, a row of {row.tokens} tokens and {row.images} "
            f"pictures: give one step at least, {_LEAST * _PARTS} tokens and {_PARTS} pictures"
        )

    def plan(epoch: int) -> list[Step]:
        """The steps of a round, in an order of its own."""
        ends = np.cumsum([config.batch.accumulation * each for _, each in kinds])
        parts = np.split(np.arange(ends[-1]), ends[:-1])
        order = shuffled(len(kinds), config.seed, epoch, Stream.ORDER)
        shaped = lambda i: parts[i].reshape(config.batch.accumulation, -1)
        return [Step(kinds[i][0], shaped(i)) for i in order]

    def draw(rng: Rng, begins: bool) -> Drawn:
        said = lesson(rng, some_task(rng, long if begins else short))
        example = encode(said.messages, reads, cfg)
        return spread(example, rng, room), said.pictures

    def make(step: Step) -> Arrays:
        own = rows_of_process(step.rows, *process)
        of = lambda number: row_generator(config.seed, step.epoch, int(number), Stream.LESSONS)
        rows = [fill(of(number), step.static, draw, step.static == row) for number in own.flat]
        shown = [picture for taken in rows for _, pictures in taken for picture in pictures]
        most = own.size * step.static.images  # of one size, so that it compiles once
        pixels = rendered(shown, most)
        images = map(Image.fromarray, pixels)
        filling = Filling(own.shape, step.static, cfg.vision)
        for at, taken in zip(np.ndindex(own.shape), rows, strict=True):
            for example, _ in taken:
                filling.add(at, _with(example, images, reads))
        return filling.arrays

    def row_flops(step: Step) -> float:
        tokens, images, patches = step.static
        return flops.train_vlm(cfg.text, cfg.vision, [tokens], [patches] * images)

    return world.endless(
        split,
        fingerprint=f"conversations {_VERSION} {split} seed {config.seed} {short | long} "
        f"positions {room}",
        steps=Epochs(plan, steps=steps),
        make=make,
        unit="rows",
        row_flops=row_flops,
    )


def fill(
    rng: Rng,
    room: Shape,
    draw: Callable[[Rng, bool], Drawn],
    begins_long: bool = False,
) -> list[Drawn]:
    """Return a row's lessons: short ones until the next does not fit, perhaps a long one first.

    Short lessons are about as long as one another, long ones are not: were all drawn alike, most
    that do not fit were the longest, and those would hardly be learnt.

    Args:
      rng: decides everything.
      room: of a row.
      draw: makes a lesson, long or short.
      begins_long: whether the first is a long one.

    Raises:
      ValueError: hardly any such lesson is short enough.
    """
    fits = lambda taken: (
        sum(len(example.ids) for example, _ in taken) <= room.tokens
        and sum(len(pictures) for _, pictures in taken) <= room.images
    )
    for _ in range(_TRIES):
        taken = [draw(rng, begins_long)]
        if fits(taken):
            break
    else:
        raise ValueError(
            f"of {_TRIES} lessons none has at most {room.tokens} tokens and {room.images} "
            "pictures; give a larger --config.data.tokens or --config.data.images"
        )
    while fits(longer := [*taken, draw(rng, False)]):
        taken = longer
    return taken


def _with(example: Example, images: Iterator[Any], reads: Any) -> Example:
    """An example with the next pictures in the places of its blank ones."""
    pictures = tuple((at, reads.picture(next(images))) for at, _ in example.pictures)
    return dataclasses.replace(example, pictures=pictures)
