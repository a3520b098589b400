"""Picture sizes that are trained on: few, because every size is a compiled program."""

import dataclasses
import functools
import math
from typing import Any

from PIL import Image

Size = tuple[int, int]  # height and width in pixels

ASPECTS = (1.0, 5 / 4, 4 / 3, 3 / 2, 16 / 9, 2.0, 21 / 9)  # longer side over shorter


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The sizes that pictures are brought to.

    A picture of one of these sizes is left as it is; so are all that an image model was asked for
    at these sizes. Any other goes to the largest area that it fills without being enlarged by more
    than `enlarge`, and there to the size of the nearest aspect: it is scaled to cover that size and
    cut around the centre. What would be blown up or lose much is refused: the one teaches blur, the
    other a text that tells of what is not there.

    Attributes:
      areas: areas in pixels, such as 1024 * 1024, and 512 * 512 to take small pictures as well.
      aspects: longer side over shorter; each is used in both orientations.
      sizes: further (height, width), such as one that the image model was asked for.
      factor: every side is a multiple of this, the VAE's factor.
      enlarge: largest scale of a picture.
      keep: smallest share of a picture that is left when it is cut.
    """

    areas: tuple[int, ...] = (1024 * 1024,)
    aspects: tuple[float | int, ...] = ASPECTS
    sizes: tuple[Size, ...] = ()
    factor: int = 16
    enlarge: float | int = 1.1
    keep: float | int = 0.75

    def __post_init__(self):
        if min((*self.areas, *self.aspects, 1)) < 1 or self.enlarge < 1 or self.keep > 1:
            raise ValueError(
                f"areas {self.areas}, aspects {self.aspects} (longer over shorter side) and "
                f"enlarge {self.enlarge} must be at least 1, keep {self.keep} at most 1"
            )
        if not self.all:
            raise ValueError("buckets need an area and an aspect, or a size; none is given")
        for height, width in self.all:
            if height % self.factor or width % self.factor or min(height, width) < self.factor:
                raise ValueError(
                    f"the bucket of height {height}, width {width} must have sides that are "
                    f"positive multiples of {self.factor}"
                )

    @functools.cached_property
    def groups(self) -> tuple[tuple[Size, ...], ...]:
        """The sizes of each area, the largest first, then the further sizes, each alone."""
        groups = [
            tuple(size for aspect in self.aspects for size in _sizes(area, aspect, self.factor))
            for area in sorted(self.areas, reverse=True)
        ]
        return (*groups, *((size,) for size in sorted(self.sizes, key=math.prod, reverse=True)))

    @functools.cached_property
    def all(self) -> tuple[Size, ...]:
        """Every size."""
        return tuple(dict.fromkeys(size for group in self.groups for size in group))

    def choose(self, height: int, width: int) -> Size:
        """Return the bucket of a picture.

        Raises:
          ValueError: it is too small for every bucket, or too long.
        """
        if (height, width) in self.all:
            return height, width
        aspect = math.log(width / height)
        distance = lambda size: abs(math.log(size[1] / size[0]) - aspect)
        small = True
        for group in self.groups:
            best = min(group, key=distance)
            if max(best[0] / height, best[1] / width) > self.enlarge:
                continue
            small = False
            if math.exp(-distance(best)) >= self.keep:  # what is left after cutting
                return best
        smallest = min(self.all, key=math.prod)
        raise ValueError(
            f"the picture is {width}x{height}, "
            + (
                f"too small for every bucket (the smallest is {smallest[1]}x{smallest[0]}, and "
                f"nothing is enlarged by more than {self.enlarge}); add a smaller area"
                if small
                else f"and every bucket would leave less than {self.keep} of it; add its aspect"
            )
            + ", or leave the picture out"
        )


def _sizes(area: int, aspect: float, factor: int) -> tuple[Size, ...]:
    """Both orientations of about this area and aspect."""
    side = lambda length: max(round(length / factor), 1) * factor
    long, short = side(math.sqrt(area * aspect)), side(math.sqrt(area / aspect))
    return ((short, long), (long, short)) if long != short else ((long, long),)


def fit(image: Any, size: Size) -> Any:
    """Return a PIL image scaled to cover `size` and cut around the centre.

    Resampled once (Lanczos, antialiased), or not at all where the picture has that size.
    """
    height, width = size
    if image.size == (width, height):
        return image
    scale = max(width / image.width, height / image.height)
    wide, high = min(width / scale, image.width), min(height / scale, image.height)
    left, top = (image.width - wide) / 2, (image.height - high) / 2
    box = (left, top, left + wide, top + high)  # what is kept, in the picture's own pixels
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)
