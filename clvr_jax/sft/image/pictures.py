"""Pictures of trajectories as the pixels that the image model is trained on.

Every picture is first brought to its bucket, as if the image model had made it at that size. A
reference is then prepared from there as inference prepares it, so that what stays the same between
two pictures of a trajectory lies at the same place in both.
"""

import functools
from typing import NamedTuple

import numpy as np
from PIL import Image

from clvr_jax.data.buckets import Buckets, Size, fit
from clvr_jax.data.images import image_size, read_image
from clvr_jax.generate.references import prepare


class Picture(NamedTuple):
    """A picture and what is made of it.

    Attributes:
      image: what `clvr_jax.data.images` reads.
      bucket: size of the picture in the trajectory.
      size: size that the network sees: the bucket's, or that of a prepared reference.
    """

    image: str
    bucket: Size
    size: Size


def target(image: str, buckets: Buckets) -> Picture:
    """Return a picture to be learnt, looking at its header only.

    Raises:
      ValueError: it cannot be read, or no bucket takes it; names the picture.
    """
    width, height = image_size(image)
    try:
        bucket = buckets.choose(height, width)
    except ValueError as error:
        raise ValueError(f"{image}: {error}") from error
    return Picture(image, bucket, bucket)


def reference(image: str, buckets: Buckets) -> Picture:
    """Return a picture to be looked at, from its header only.

    Raises:
      ValueError: as `target`, or its bucket is too small or too long for a reference.
    """
    made = target(image, buckets)
    return made._replace(size=_prepared_size(made.bucket, buckets.factor))


def read_pixels(picture: Picture, factor: int) -> np.ndarray:
    """Return (height, width, 3) uint8.

    Raises:
      ValueError: it cannot be read, or its size is not the planned one any more.
    """
    image = fit(read_image(picture.image), picture.bucket)
    if picture.size == picture.bucket:
        return np.asarray(image, np.uint8)
    return np.rint((prepare(image, factor) + 1) * 127.5).astype(np.uint8)


@functools.cache
def _prepared_size(bucket: Size, factor: int) -> Size:
    height, width = bucket
    return prepare(Image.new("RGB", (width, height)), factor).shape[:2]
