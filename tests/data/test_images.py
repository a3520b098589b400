"""Images as they are read, and what is wrong with them."""

import io

import numpy as np
import pytest
from PIL import Image

from clvr_jax.data.images import Limits, image_fault, image_size, read_image

LIMITS = Limits()


def saved(path, mode="RGB", size=(80, 64), colour="red", **options):
    Image.new(mode, size, colour).save(path, **options)
    return str(path)


def cut(path, share=0.6):
    with open(path, "rb") as file:
        data = file.read()
    with open(path, "wb") as file:
        file.write(data[: int(len(data) * share)])
    return str(path)


def noise(path, **options):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (64, 80, 3), np.uint8)).save(path, **options)
    return str(path)


def test_pictures_come_as_rgb_on_white(tmp_path):
    clear = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    clear.putpixel((3, 5), (0, 0, 255, 255))
    clear.save(tmp_path / "clear.png")
    picture = read_image(str(tmp_path / "clear.png"))
    assert picture.mode == "RGB"
    assert picture.getpixel((0, 0)) == (255, 255, 255)
    assert picture.getpixel((3, 5)) == (0, 0, 255)
    for mode in ("L", "P", "1", "CMYK"):
        assert read_image(saved(tmp_path / f"{mode}.tif", mode, colour=0)).mode == "RGB"


def test_orientation_is_applied_to_pixels_and_sizes(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("a.jpg", "a.png", "a.webp"):
        path = saved(tmp_path / name, exif=exif)
        assert image_size(path) == read_image(path).size == (64, 80)
    path = saved(tmp_path / "b.png")
    assert image_size(path) == read_image(path).size == (80, 64)


def test_good_images_have_no_fault(tmp_path):
    paths = [noise(tmp_path / name) for name in ("a.png", "a.jpg", "a.webp", "a.bmp", "a.gif")]
    paths += [saved(tmp_path / "p.png", "P"), saved(tmp_path / "rgba.png", "RGBA")]
    for path in paths:
        assert image_fault(path, LIMITS) is None and image_fault(path, LIMITS, full=True) is None


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.bmp", "a.gif"])
def test_a_file_that_is_cut_off_is_found_without_full(tmp_path, name):
    assert image_fault(cut(noise(tmp_path / name)), LIMITS).startswith("cannot be decoded")


def test_damage_inside_is_found_with_full(tmp_path):
    path = noise(tmp_path / "a.png")
    with open(path, "r+b") as file:
        file.seek(5000)
        file.write(b"\0" * 2000)
    assert image_fault(path, LIMITS) is None
    assert image_fault(path, LIMITS, full=True).startswith("cannot be decoded")


def test_faults(tmp_path):
    assert image_fault(str(tmp_path / "none.png"), LIMITS) == "does not exist"
    assert image_fault(str(tmp_path), LIMITS).startswith("cannot be read")
    (tmp_path / "text.png").write_text("not a picture")
    assert image_fault(str(tmp_path / "text.png"), LIMITS) == "is no picture that can be read"
    frames = [Image.new("RGB", (64, 64), c) for c in ("red", "blue", "green")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert image_fault(str(tmp_path / "moving.gif"), LIMITS) == (
        "is animated, 3 frames; it must be one picture"
    )
    deep = saved(tmp_path / "deep.png", "I;16", colour=3)
    assert image_fault(deep, LIMITS) == "has pixels of type I;16; save it with 8 bits a channel"
    with pytest.raises(ValueError, match=r"deep.png has pixels of type I;16"):
        read_image(deep)


@pytest.mark.parametrize(
    "size,fault",
    [
        ((1, 1), "is 1x1 pixels; both sides must have at least 64"),
        ((64, 63), "is 64x63 pixels; both sides must have at least 64"),
        ((20_000, 64), "is 20000x64 pixels; a side may have at most 8192"),
        ((8000, 8000), "is 8000x8000 pixels; it may have at most 33554432 in all"),
        ((64, 513), "is 64x513 pixels; the longer side may be at most 8 times the shorter"),
        ((64, 512), None),
    ],
)
def test_sizes(tmp_path, size, fault):
    path = saved(tmp_path / "a.png", "1", size, 0)
    assert image_fault(path, LIMITS) == fault


def test_sizes_that_pil_refuses_and_limits_of_ones_own(tmp_path):
    huge = io.BytesIO()
    Image.new("1", (64, 64)).save(huge, "PNG")
    data = bytearray(huge.getvalue())
    import struct
    import zlib

    data[16:24] = struct.pack(">II", 20_000, 20_000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    (tmp_path / "huge.png").write_bytes(data)
    assert image_fault(str(tmp_path / "huge.png"), LIMITS).startswith("is too large")
    path = saved(tmp_path / "a.png", size=(64, 32))
    assert image_fault(path, Limits(min_side=32)) is None
    assert image_fault(path, Limits(min_side=32, max_aspect=1.5)) is not None
