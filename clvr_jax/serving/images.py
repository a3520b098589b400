"""Pictures out of data URLs, without trusting what they say they are."""

import base64
import binascii
import io
import re

import numpy as np
from PIL import Image, ImageOps

from clvr_jax.serving.errors import invalid

_FORMATS = {"png": "PNG", "jpeg": "JPEG", "jpg": "JPEG", "webp": "WEBP"}
_HEAD = re.compile(r"data:image/([a-z0-9.+-]+)(;[^,;]*)*;base64,", re.IGNORECASE)
# a MIME type is near the front; the rest may be megabytes
_HEAD_LENGTH = 256


def decode(url: str, path: str, max_pixels: int) -> Image.Image:
    """Return the picture of a data URL as it is seen: upright, RGB, on white where transparent.

    Of an animation it is the first frame.

    Args:
      url: `data:image/png;base64,...`, or jpeg or webp.
      path: where the URL stands in the request, for errors.
      max_pixels: most width times height.

    Raises:
      ApiError: 400; it is no such URL, no base64, no picture, or too large a one.
    """
    head = _HEAD.match(url[:_HEAD_LENGTH])
    if head is None:
        raise invalid(
            f"{path} starts with {url[:30]!r}; send the picture in the request, as a data URL "
            "(data:image/png;base64,...): this server fetches nothing",
            path,
            "invalid_image_url",
        )
    kind = _FORMATS.get(head[1].lower())
    if kind is None:
        raise invalid(f"{path} is image/{head[1]}; send png, jpeg or webp", path, "invalid_image")
    try:
        text = url[head.end() :].encode("ascii").translate(None, b" \t\r\n")
        data = base64.b64decode(text, validate=True)
    except (UnicodeEncodeError, binascii.Error) as error:
        raise invalid(f"{path} holds bad base64: {error}", path, "invalid_base64") from None
    too_large = invalid(
        f"{path}: the picture has more than {max_pixels} pixels; send a smaller one",
        path,
        "image_too_large",
    )
    try:
        # what a file is called is often wrong, so any of the three may be inside
        image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
        if image.width * image.height > max_pixels:
            raise too_large
        image.load()
        return _as_seen(image)
    except Image.DecompressionBombError:
        raise too_large from None
    except Exception as error:  # decoders fail in many ways on bytes that somebody else wrote
        if error is too_large:
            raise
        raise invalid(
            f"{path} holds no picture that can be read: {error or type(error).__name__}",
            path,
            "invalid_image",
        ) from None


def _as_seen(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits of grey, which `convert` would clip
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")
