"""Trajectories of renders, that the miniature's klein is fine-tuned on."""

from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from clvr_jax.data.trajectory import Action, Step, Trajectory
from clvr_jax.data.writers import write_jsonl
from clvr_jax.miniature.orders import by_number
from clvr_jax.miniature.pictures import rendered
from clvr_jax.miniature.samples import Drawing, Stream, drawing, row_generator

_TOGETHER = 64  # edits whose pictures are rendered at once
_BRING = 8  # every so many edits, one takes something from a second picture


def edits(path: Path, count: int, seed: int = 0) -> None:
    """Write edits of renders, of all kinds, as trajectories of two or three pictures.

    The pictures that are given stand there as steps that their trajectory rejects: they are no
    example of anything. Nothing held out is in them, and no edit of another split.

    Args:
      path: JSONL file to write; pictures come to the folder NAME beside it.
      count: of edits; one of eight takes something from a second picture.
      seed: of edits and pictures.
    """
    path.with_suffix("").mkdir()
    write_jsonl(path, _edits(path.with_suffix(""), count, seed))


def _edits(folder: Path, count: int, seed: int) -> Iterator[Trajectory]:
    for start in range(0, count, _TOGETHER):
        rows = range(start, min(start + _TOGETHER, count))
        drawn = [
            drawing(row_generator(seed, 0, row, Stream.EDITS), 1 if row % _BRING else 2)
            for row in rows
        ]
        shown = [(*each.references, each.target) for each in drawn]
        pixels = iter(rendered([picture for each in shown for picture in each], 3 * _TOGETHER))
        for row, each, pictures in zip(rows, drawn, shown, strict=True):
            files = [folder / f"{row}-{i}.png" for i, _ in enumerate(pictures, 1)]
            for file in files:
                Image.fromarray(next(pixels)).save(file)
            yield _edit(f"edit-{row}", each, [str(file) for file in files])


def _edit(name: str, drawn: Drawing, images: list[str]) -> Trajectory:
    """A trajectory whose last step edits what the steps before it show."""
    *given, made = images
    numbers = tuple(range(1, len(given) + 1))
    steps = [
        Step(
            reasoning="This picture is given.",
            action=Action(kind="generate", prompt="a picture"),
            image=image,
            verdict="rejected",
        )
        for image in given
    ]
    action = Action(kind="edit", prompt=by_number(drawn.text, numbers), references=numbers)
    steps.append(Step(reasoning="I change it.", action=action, image=made, verdict="accepted"))
    return Trajectory(id=name, goal=drawn.text, steps=tuple(steps))
