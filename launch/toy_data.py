"""Toy datasets: trajectories whose small pictures add one coloured shape a step."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from clvr_jax.data.trajectory import Action, Step, Trajectory

COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "black", "cyan")
SHAPES = ("circle", "square", "triangle")
SIZES = ((64, 64), (96, 64), (64, 96))


def make(
    folder: str | Path,
    count: int = 4,
    steps: int | Sequence[int] = 2,
    size: tuple[int, int] | Sequence[tuple[int, int]] = SIZES,
    seed: int = 0,
    actions: bool = True,
) -> Path:
    """Write a dataset and return its JSONL file.

    Args:
      folder: is created; pictures lie in folders of their trajectories below it.
      count: trajectories, with the ids toy-0, toy-1, ...
      steps: pictures of each; several numbers take turns.
      size: (width, height) of pictures; several sizes take turns, one for each trajectory.
      seed: the same seed writes the same files.
      actions: whether the steps have actions.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lengths = [steps] if isinstance(steps, int) else list(steps)
    sizes = [size] if isinstance(size[0], int) else list(size)
    rng = np.random.default_rng(seed)
    file = folder / "trajectories.jsonl"
    with file.open("w", encoding="utf-8") as out:
        for index in range(count):
            made = trajectory(
                folder,
                f"toy-{index}",
                lengths[index % len(lengths)],
                sizes[index % len(sizes)],
                rng,
                actions,
            )
            out.write(json.dumps(made.record(), ensure_ascii=False) + "\n")
    return file


def trajectory(folder, name, steps, size, rng, actions=True) -> Trajectory:
    """Draw the pictures of one trajectory below `folder` and return it."""
    picture = Image.new("RGB", size, "white")
    taken, things = [], []
    for number in range(1, steps + 1):
        colour, shape = rng.choice(COLOURS), rng.choice(SHAPES)
        _draw(picture, str(colour), str(shape), rng)
        thing = f"a {colour} {shape}"
        things.append(thing)
        path = Path(name) / f"{number}.png"
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        picture.save(folder / path)
        if number == 1:
            reasoning = f"The canvas is empty. I begin with {thing}."
            action = Action(kind="generate", prompt=f"{thing} on white")
        else:
            earlier = number - 1
            reasoning = f"I see <IMG_GEN_{earlier}>. It lacks {thing}, so I add it."
            action = Action(
                kind="edit", prompt=f"add {thing} to <IMG_GEN_{earlier}>", references=[earlier]
            )
        action = action if actions else None
        taken.append(Step(reasoning=reasoning, action=action, image=str(path)))
    return Trajectory(
        id=name,
        goal=" and ".join(things) + " on white",
        steps=taken,
        closing=f"Final verification: {', '.join(things)} are there.",
    )


def _draw(picture: Image.Image, colour: str, shape: str, rng) -> None:
    width, height = picture.size
    radius = int(rng.integers(8, 16))
    x = int(rng.integers(radius, width - radius))
    y = int(rng.integers(radius, height - radius))
    pen, box = ImageDraw.Draw(picture), (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "square":
        pen.rectangle(box, fill=colour)
    else:
        pen.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], colour)
