"""Pictures arrive as they look, and bad ones are refused before they cost anything."""

import base64
import io
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from clvr_jax.serving import images
from clvr_jax.serving.errors import ApiError
from clvr_jax.serving.limits import Limits
from tests.serving.conftest import serving

LIMITS = Limits(max_images=2, max_pixels=64 * 64)
PATH = "messages[0].content[0].image_url.url"


@pytest.fixture(scope="module")
def narrow():
    with serving(LIMITS) as running:
        yield running


def url_of(data: bytes, kind="png") -> str:
    return f"data:image/{kind};base64," + base64.b64encode(data).decode()


def encoded(image, kind="PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def gradient(width=8, height=6) -> Image.Image:
    ys, xs = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([xs * 30, ys * 40, xs * 0], axis=-1).astype(np.uint8))


def decode(url, max_pixels=64 * 64):
    return images.decode(url, PATH, max_pixels)


def picture(url):
    return {"type": "image_url", "image_url": {"url": url}}


def png_that_claims(width, height) -> bytes:
    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 1000)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("kind,options", [("png", {}), ("webp", {"lossless": True})])
def test_lossless_pictures_keep_their_pixels(kind, options):
    image = decode(url_of(encoded(gradient(), kind.upper(), **options), kind))
    assert image.mode == "RGB" and image.tobytes() == gradient().tobytes()


def test_jpeg_under_either_name_and_a_wrong_name():
    data = encoded(gradient(), "JPEG", quality=100)
    for kind in ("jpeg", "JPG", "png"):
        image = np.asarray(decode(url_of(data, kind)), int)
        assert np.abs(image - np.asarray(gradient(), int)).max() < 40


def test_line_breaks_in_base64_and_parameters_of_the_type_are_taken():
    text = base64.encodebytes(encoded(gradient(40, 40))).decode()
    assert "\n" in text.strip()
    assert decode(f"data:image/png;charset=utf-8;base64,{text}").size == (40, 40)


def test_transparency_is_seen_on_white():
    image = Image.new("RGBA", (2, 1), (10, 20, 30, 255))
    image.putpixel((1, 0), (10, 20, 30, 0))
    seen = decode(url_of(encoded(image)))
    assert [seen.getpixel((x, 0)) for x in (0, 1)] == [(10, 20, 30), (255, 255, 255)]


def test_grey_of_16_bits_keeps_its_shades():
    image = Image.fromarray(np.array([[0, 0x8000, 0xFFFF]], np.uint16))
    seen = decode(url_of(encoded(image)))
    assert [seen.getpixel((x, 0))[0] for x in range(3)] == [0, 0x80, 0xFF]


def test_a_photo_is_turned_as_its_camera_was():
    exif = Image.Exif()
    exif[0x0112] = 6  # the top of the scene is at the right
    seen = decode(url_of(encoded(gradient(8, 6), "PNG", exif=exif)))
    assert seen.size == (6, 8)
    assert seen.tobytes() == gradient(8, 6).transpose(Image.Transpose.ROTATE_270).tobytes()


@pytest.mark.parametrize(
    "url,code,message",
    [
        ("https://example.com/a.png", "invalid_image_url", "this server fetches nothing"),
        ("http://127.0.0.1:22/", "invalid_image_url", "data:image/png;base64"),
        ("file:///etc/passwd", "invalid_image_url", "data URL"),
        ("data:image/png,abc", "invalid_image_url", "data URL"),
        ("", "invalid_image_url", "''"),
        ("data:image/gif;base64,R0lGODlh", "invalid_image", "send png, jpeg or webp"),
        ("data:image/png;base64,!!!!", "invalid_base64", "bad base64"),
        ("data:image/png;base64,abc", "invalid_base64", "bad base64"),
        ("data:image/png;base64,äää", "invalid_base64", "bad base64"),
        ("data:image/png;base64,", "invalid_image", "no picture"),
        (url_of(b"no picture at all"), "invalid_image", "no picture"),
        (url_of(encoded(gradient(), "GIF")), "invalid_image", "no picture"),
        (url_of(encoded(gradient(40, 40))[:-40]), "invalid_image", "no picture"),
        (url_of(encoded(gradient(40, 40), "JPEG")[:300], "jpeg"), "invalid_image", "no picture"),
        (url_of(encoded(gradient(65, 64))), "image_too_large", "more than 4096 pixels"),
        (url_of(png_that_claims(100_000, 100_000)), "image_too_large", "more than 4096 pixels"),
    ],
    ids=lambda value: value[:34] if isinstance(value, str) else "",
)
def test_bad_pictures_are_refused_by_name(narrow, url, code, message):
    answer = narrow.say([picture(url)])
    assert answer.status == 400, answer.raw
    assert (answer.error["param"], answer.error["code"]) == (PATH, code)
    assert message in answer.error["message"] and PATH in answer.error["message"]
    assert len(answer.raw) < 1000, "an error does not repeat megabytes"


def test_size_is_read_before_pixels(monkeypatch):
    def load(self):
        raise AssertionError("decoded")

    large, small = (url_of(encoded(gradient(width, 64))) for width in (65, 64))

    monkeypatch.setattr(Image.Image, "load", load)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(ApiError, match="more than 4096 pixels"):
        decode(large)
    with pytest.raises(ApiError, match="decoded"):
        decode(small)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_picture_that_claims_to_be_huge_costs_nothing():
    start = time.perf_counter()
    with pytest.raises(ApiError, match="pixels"):
        decode(url_of(png_that_claims(13_000, 13_000)), 4096**2)  # below Pillow's own bound
    assert time.perf_counter() - start < 0.5


def test_pictures_are_counted_over_all_messages(narrow):
    one = [picture(url_of(encoded(gradient())))]
    assert narrow.say(one, "seen", one).status == 200
    answer = narrow.say(one, "seen", one + one)
    assert answer.status == 400 and answer.error["code"] == "too_many_images"
    assert answer.error["param"] == "messages[2].content[1].image_url"
    assert "at most 2" in answer.error["message"]
