"""Reading image files: pixels for training, sizes for planning, faults for validation.

An image is named by its path, or by its place inside a dataset file (`FILE#record/image`).
"""

import contextlib
import dataclasses
import io
import struct
from collections.abc import Iterator

from PIL import Image, ImageOps

from clvr_jax.data.containers import embedded
from clvr_jax.data.index import RecordError

_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_EXIF_ORIENTATION = 0x0112


@dataclasses.dataclass(frozen=True)
class Limits:
    """What an image may be.

    Attributes:
      min_side: pixels; klein's processors refuse references of fewer than 64.
      max_side: pixels.
      max_area: pixels; decoded, one takes three bytes.
      max_aspect: the longer side over the shorter; klein's processors refuse more than 8.
    """

    min_side: int = 64
    max_side: int = 8192
    max_area: int = 2**25
    max_aspect: float = 8.0

    def fault(self, width: int, height: int) -> str | None:
        """Return what is wrong with a size, in words."""
        small, large = sorted((width, height))
        size = f"is {width}x{height} pixels"
        if small < self.min_side:
            return f"{size}; both sides must have at least {self.min_side}"
        if large > self.max_side:
            return f"{size}; a side may have at most {self.max_side}"
        if width * height > self.max_area:
            return f"{size}; it may have at most {self.max_area} in all"
        if large > self.max_aspect * small:
            return f"{size}; the longer side may be at most {self.max_aspect:g} times the shorter"
        return None


LIMITS = Limits()


def read_bytes(image: str) -> bytes:
    """Return an image's file.

    Raises:
      OSError, RecordError: it cannot be read.
    """
    inside = embedded(image)
    if inside is not None:
        return inside
    with open(image, "rb") as file:
        return file.read()


def read_image(image: str) -> Image.Image:
    """Return an image as RGB, turned as its EXIF says, on white where it is transparent.

    Raises:
      ValueError: it cannot be read; the message names it.
    """
    try:
        with _opened(image) as (picture, _):
            _check_mode(picture)
            if _orientation(picture) != 1:
                picture = ImageOps.exif_transpose(picture)
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                white = Image.new("RGBA", picture.size, "white")
                return Image.alpha_composite(white, picture).convert("RGB")
            return picture.convert("RGB")
    except _ERRORS as error:
        raise ValueError(f"the image {image} {_words(error)}") from error


def image_size(image: str) -> tuple[int, int]:
    """Return (width, height) of what `read_image` returns, from the file's header alone.

    Raises:
      ValueError: it cannot be read; the message names it.
    """
    try:
        with _opened(image) as (picture, _):
            return _size(picture)
    except _ERRORS as error:
        raise ValueError(f"the image {image} {_words(error)}") from error


def image_fault(image: str, limits: Limits, full: bool = False) -> str | None:
    """Return what is wrong with an image, in words; None if nothing is.

    The header is read, and the end of the file looked at: only if that is not what its format ends
    with, or with `full`, is the picture decoded.
    """
    try:
        with _opened(image) as (picture, file):
            fault = limits.fault(*_size(picture))
            if fault:
                return fault
            # an MPO is a camera's JPEG with a preview as its second frame
            if getattr(picture, "is_animated", False) and picture.format != "MPO":
                return f"is animated, {picture.n_frames} frames; it must be one picture"
            _check_mode(picture)
            if full or not _ends_well(picture.format, file):
                picture.load()
    except _ERRORS as error:
        return _words(error)
    return None


_ERRORS = (OSError, ValueError, SyntaxError, struct.error, EOFError, Image.DecompressionBombError)


@contextlib.contextmanager
def _opened(image: str) -> Iterator[tuple[Image.Image, io.BufferedIOBase]]:
    inside = embedded(image)
    with (
        open(image, "rb") if inside is None else io.BytesIO(inside) as file,
        Image.open(file) as picture,
    ):
        yield picture, file


def _size(picture: Image.Image) -> tuple[int, int]:
    width, height = picture.size
    return (height, width) if _orientation(picture) in _TURNED else (width, height)


def _orientation(picture: Image.Image) -> int:
    if picture.format == "PNG" and "exif" not in picture.info:
        return 1  # PIL would decode the picture to look behind its pixels
    return picture.getexif().get(_EXIF_ORIENTATION, 1)


def _check_mode(picture: Image.Image) -> None:
    if picture.mode not in _MODES:
        # PIL would clip more than 8 bits to white
        raise RecordError(f"has pixels of type {picture.mode}; save it with 8 bits a channel")


def _ends_well(form: str | None, file: io.BufferedIOBase) -> bool:
    """Whether a file ends as its format does, so that it is probably not cut off."""
    position = file.tell()
    size = file.seek(0, io.SEEK_END)
    file.seek(max(size - 1024, 0))
    tail = file.read()
    file.seek(0)
    head = file.read(12)
    file.seek(position)
    if form == "PNG":
        return b"IEND" in tail
    if form == "JPEG":
        return b"\xff\xd9" in tail
    if form == "WEBP":
        return struct.unpack("<I", head[4:8])[0] + 8 <= size
    return False


def _words(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "does not exist"
    if isinstance(error, (IsADirectoryError, PermissionError)):
        return f"cannot be read: {error.strerror}"
    if isinstance(error, RecordError):
        return str(error)
    if isinstance(error, Image.UnidentifiedImageError):
        return "is no picture that can be read"
    if isinstance(error, Image.DecompressionBombError):
        return f"is too large: {error}"
    return f"cannot be decoded: {error}"
