"""Scenes: up to eight coloured shapes on a grid of four by four places.

A scene is what a picture of this world holds, as data. A place holds at most one thing. Cells are
counted row by row from the top left, so cell = 4 row + column.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "black")
SIZES = ("small", "large")
LOOKS = {"shape": SHAPES, "colour": COLOURS, "size": SIZES}  # of a thing, wherever it is
ROWS, COLUMNS = 4, 4
CELLS = ROWS * COLUMNS
MOST = 8  # things of a scene
KINDS = len(SHAPES) * len(COLOURS) * len(SIZES)


class Thing(NamedTuple):
    """One shape at its place.

    Attributes:
      cell: 0 to 15, row by row from the top left.
      shape: of `SHAPES`.
      colour: of `COLOURS`.
      size: of `SIZES`.
    """

    cell: int
    shape: str
    colour: str
    size: str

    @property
    def row(self) -> int:
        """Row of the cell, 0 at the top."""
        return self.cell // COLUMNS

    @property
    def column(self) -> int:
        """Column of the cell, 0 at the left."""
        return self.cell % COLUMNS

    @property
    def code(self) -> int:
        """Its kind as a number from 1 to `KINDS`; 0 is an empty cell."""
        indices = SHAPES.index(self.shape), COLOURS.index(self.colour), SIZES.index(self.size)
        return code_of(*indices)


@dataclasses.dataclass(frozen=True)
class Scene:
    """What a picture holds.

    Attributes:
      things: sorted by cell, each in a cell of its own; may be none.

    Raises:
      ValueError: two things share a cell, there are more than `MOST`, or a value is unknown.
    """

    things: tuple[Thing, ...] = ()

    def __post_init__(self):
        things = tuple(sorted(self.things))
        object.__setattr__(self, "things", things)
        if len(things) > MOST:
            raise ValueError(f"a scene holds at most {MOST} things, got {len(things)}")
        if len({thing.cell for thing in things}) != len(things):
            raise ValueError(f"two things share a cell, which holds one at most: {things}")
        for thing in things:
            known = thing.shape in SHAPES and thing.colour in COLOURS and thing.size in SIZES
            if not known or not 0 <= thing.cell < CELLS:
                raise ValueError(
                    f"{thing} is no thing of this world; cells are 0 to {CELLS - 1}, shapes "
                    f"{SHAPES}, colours {COLOURS}, sizes {SIZES}"
                )

    def codes(self) -> np.ndarray:
        """Return (16,) int32: the kind in each cell, 0 where it is empty."""
        codes = np.zeros(CELLS, np.int32)
        for thing in self.things:
            codes[thing.cell] = thing.code
        return codes

    def at(self, cell: int) -> Thing | None:
        """Return the thing in a cell, or None."""
        return next((thing for thing in self.things if thing.cell == cell), None)

    def free(self) -> tuple[int, ...]:
        """Return the empty cells."""
        taken = {thing.cell for thing in self.things}
        return tuple(cell for cell in range(CELLS) if cell not in taken)

    def without(self, *cells: int) -> "Scene":
        """Return the scene with the given cells emptied."""
        return Scene(tuple(thing for thing in self.things if thing.cell not in cells))

    def put(self, *things: Thing) -> "Scene":
        """Return the scene with things put in, in the place of what was in their cells."""
        return Scene((*self.without(*(thing.cell for thing in things)).things, *things))


def code_of(shape, colour, size):
    """Return the code of indices into `SHAPES`, `COLOURS` and `SIZES`; numbers or arrays."""
    return 1 + (shape * len(COLOURS) + colour) * len(SIZES) + size


def indices_of(code):
    """Return the indices of shape, colour and size; the inverse of `code_of`."""
    kind = code - 1
    return kind // (len(SIZES) * len(COLOURS)), kind // len(SIZES) % len(COLOURS), kind % len(SIZES)


def thing(cell: int, code: int) -> Thing:
    """Return the thing of a kind; the inverse of `Thing.code`."""
    shape, colour, size = indices_of(int(code))
    return Thing(int(cell), SHAPES[shape], COLOURS[colour], SIZES[size])


def from_codes(codes: np.ndarray) -> Scene:
    """Return the scene of (16,) codes; the inverse of `Scene.codes`."""
    return Scene(tuple(thing(cell, code) for cell, code in enumerate(codes.tolist()) if code))
