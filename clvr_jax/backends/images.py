"""What an image model is to everything above it: orders go in, pictures come out, in any number."""

import dataclasses
from concurrent.futures import Future
from typing import Protocol, runtime_checkable

from PIL import Image


class NotFinite(ArithmeticError):
    """A picture came out with values that are no numbers; another seed may do better."""


@dataclasses.dataclass(frozen=True)
class Order:
    """One picture to be drawn.

    Attributes:
      text: what the image model reads, as `clvr_jax.data.conditioning` makes it.
      references: pictures that it sees, in order; none for drawing from nothing.
      seed: of the noise, below 2**32.
    """

    text: str
    references: tuple[Image.Image, ...] = ()
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A picture and what it cost.

    Attributes:
      picture: RGB.
      evaluations: passes through the network, two a step with guidance.
      seconds: of the computation that it was part of.
      together: pictures drawn in that computation.
    """

    picture: Image.Image
    evaluations: int
    seconds: float
    together: int = 1


@runtime_checkable
class ImageGenerator(Protocol):
    """An image model that draws and edits.

    Attributes:
      name: what it is called in records.
      evaluations: passes through the network that one picture takes.
    """

    name: str
    evaluations: int

    def check(self, order: Order) -> None:
        """Do nothing but raise what `submit` would.

        Raises:
          InvalidRequest: see `submit`.
        """
        ...

    def submit(self, order: Order) -> Future[Drawn]:
        """Begin to draw; orders that wait are drawn together where their shapes are equal.

        The future raises `NotFinite`, or whatever broke. A picture depends on its order alone, not
        on what is drawn beside it.

        Raises:
          InvalidRequest: the order can never be drawn: its text is too long, a picture is none of
            the sizes that the model takes.
          Closed: this was closed.
        """
        ...

    def close(self) -> None:
        """Refuse new orders and cancel those that wait; may be called twice."""
        ...
