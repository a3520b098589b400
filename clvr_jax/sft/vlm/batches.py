"""Steps of packed examples as arrays.

Every leaf is (accumulation, rows, ...); l tokens of a row, f its images, p patches of an image.

- `ids`, `targets`, `segments` (l,) and `positions` (l, 3) int32, `weights` (l,) float32: the target
  of a token is the next one of its segment. Segments count from 1, 0 is padding.
- Where there is room for images, `places` (l,) int32: the cell that a token stands for, counted
  through all images of the row, padding included, -1 for text; `pixels` (f, p, channel y x) uint8;
  and `taps`, `blend` (f, p, 4), `grid` (f, p, 2), `patches` (f,), the fields of `vision.Places`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from clvr_jax.data.loader import naming
from clvr_jax.data.packing import Shape
from clvr_jax.data.plan import FILLING, Step, rows_of_process
from clvr_jax.models.qwen3_vl import vision
from clvr_jax.models.qwen3_vl.config import VisionConfig
from clvr_jax.sft.vlm.examples import Example

Arrays = dict[str, Any]
PLACES = ("taps", "blend", "grid", "patches")  # what `vision.Places` calls otherwise


def make(
    step: Step,
    read: Callable[[int], Example],
    cfg: VisionConfig,
    process: tuple[int, int] = (0, 1),
) -> Arrays:
    """Return this process's rows of a step, whose static is a `Shape`.

    Args:
      step: from `packing.plan_packed`.
      read: returns an example by its index.
      cfg: sizes of the vision tower.
      process: number of this process, and how many there are.

    Raises:
      LoadError: an example cannot be read, or needs more room than was planned; names it.
    """
    rows = rows_of_process(step.rows, *process)
    filling = Filling(rows.shape[:2], step.static, cfg)
    for at in np.ndindex(rows.shape[:2]):
        for index in rows[at][rows[at] != FILLING].tolist():
            with naming(f"example {index}"):
                filling.add(at, read(index))
    return filling.arrays


class Filling:
    """Rows that examples are put into, one behind the other.

    Attributes:
      arrays: the batch.

    Args:
      lead: leading axes, (accumulation, rows).
      shape: room of a row.
      cfg: sizes of the vision tower.
    """

    def __init__(self, lead: Sequence[int], shape: Shape, cfg: VisionConfig):
        self._shape, self._cfg = shape, cfg
        self.arrays = empty(lead, shape, cfg)
        # tokens, images and examples that a row holds
        self._used = np.zeros((*lead, 3), np.int64)

    def add(self, at: tuple[int, ...], example: Example) -> None:
        """Put an example into a row.

        Raises:
          ValueError: there is no room.
        """
        start, image, before = self._used[at].tolist()
        (tokens, images, patches), room = example.size, self._shape
        inside = start + tokens <= room.tokens and image + images <= room.images
        if not inside or patches > room.patches:
            raise ValueError(
                f"its {tokens} tokens and {images} images of up to {patches} patches do not fit "
                f"behind {start} tokens and {image} images into {room}; it changed since "
                "the run was planned"
            )
        row = {name: leaf[at] for name, leaf in self.arrays.items()}
        _lay(row, example, start, image, before + 1, self._cfg)
        self._used[at] += (tokens, images, 1)


def empty(lead: Sequence[int], shape: Shape, cfg: VisionConfig) -> Arrays:
    """Return rows of padding alone, of weight 0, with the leading axes `lead`."""
    make = lambda dtype, *axes, fill=0: np.full((*lead, *axes), fill, dtype)
    tokens, images, patches = shape
    batch = {name: make(np.int32, tokens) for name in ("ids", "targets", "segments")}
    batch["positions"] = make(np.int32, tokens, 3)
    batch["weights"] = make(np.float32, tokens)
    if images:
        batch["places"] = make(np.int32, tokens, fill=-1)
        width = cfg.patch_width // cfg.temporal_patch
        batch["pixels"] = make(np.uint8, images, patches, width)
        # the smallest image stands in where there is none: attention needs a key
        known = vision.places([(cfg.merge, cfg.merge)], cfg, patches)
        for name, leaf in zip(PLACES, (known.taps, known.weights, known.rows, known.lengths)):
            batch[name] = np.broadcast_to(leaf, (*lead, images, *leaf.shape[1:])).copy()
    return batch


def _lay(row: Arrays, example: Example, start: int, image: int, segment: int, cfg) -> None:
    """Write an example into a row, from a token and an image on."""
    stop = start + len(example.ids)
    row["ids"][start:stop] = example.ids
    row["positions"][start:stop] = example.positions
    row["segments"][start:stop] = segment
    row["targets"][start : stop - 1] = example.ids[1:]
    row["weights"][start : stop - 1] = example.trained[1:]
    for i, (at, picture) in enumerate(example.pictures, image):
        count, room = len(picture.patches), row["pixels"].shape[1]
        cells = np.arange(count // cfg.cell)
        row["places"][start + at + cells] = i * (room // cfg.cell) + cells
        row["pixels"][i, :count] = picture.patches
        known = vision.places([picture.grid], cfg, room)
        for name, leaf in zip(PLACES, (known.taps, known.weights, known.rows, known.lengths)):
            row[name][i] = leaf[0]
