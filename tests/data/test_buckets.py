"""Buckets: what has their size is left as it is, what does not fit is cut or refused."""

import numpy as np
import pytest
from PIL import Image

from clvr_jax.data.buckets import Buckets, fit

LARGE = Buckets()
BOTH = Buckets(areas=(512 * 512, 1024 * 1024))


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_sizes_have_about_the_area_and_are_multiples():
    assert (1024, 1024) in LARGE.all and (768, 1360) in LARGE.all and (1360, 768) in LARGE.all
    assert len(LARGE.all) == 13
    for height, width in LARGE.all:
        assert height % 16 == width % 16 == 0
        assert abs(height * width / 1024**2 - 1) < 0.03
    toy = Buckets(areas=(32 * 32,), aspects=(1.0, 2.0), factor=4)
    assert toy.all == ((32, 32), (24, 44), (44, 24))


@pytest.mark.parametrize("size", [*BOTH.all, (1024, 1024)])
def test_a_picture_of_a_bucket_passes_through_unchanged(size):
    assert BOTH.choose(*size) == size
    image = noise(*size)
    np.testing.assert_array_equal(fit(Image.fromarray(image), size), image)


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((2000, 2000), (1024, 1024)),
        ((1080, 1920), (768, 1360)),
        ((1000, 1000), (1024, 1024)),  # enlarged by less than a tenth
        ((900, 900), (512, 512)),  # 1024 would blow it up
        ((1344, 768), (1360, 768)),
        ((480, 480), (512, 512)),
    ],
)
def test_others_go_to_the_largest_that_they_fill(size, bucket):
    assert BOTH.choose(*size) == bucket


def test_small_and_long_pictures_are_refused():
    with pytest.raises(ValueError, match=r"512x500, too small for every bucket.*smaller area"):
        LARGE.choose(500, 512)
    with pytest.raises(ValueError, match=r"6000x1000, and every bucket would leave less than 0.75"):
        LARGE.choose(1000, 6000)
    extra = Buckets(sizes=((512, 3072),))
    assert extra.choose(1000, 6000) == (512, 3072)


def test_what_is_larger_is_cut_around_the_centre():
    image = noise(70, 100)
    cut = fit(Image.fromarray(image), (70, 80))  # scale 1: cut without resampling
    np.testing.assert_array_equal(cut, image[:, 10:90])
    # halved: a linear ramp stays the ramp of the centre
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (80, 200, 3))
    half = np.asarray(fit(Image.fromarray(np.ascontiguousarray(ramp)), (40, 60)))
    np.testing.assert_allclose(half[20, 4:-4, 0], 40.5 + 2 * np.arange(4, 56), atol=1)


def test_reduction_is_antialiased():
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    small = np.asarray(fit(Image.fromarray(stripes), (64, 64)))
    assert np.abs(small[8:-8, 8:-8].astype(int) - 127).max() <= 2


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"sizes": ((100, 96),)}, "height 100, width 96 must have sides that are positive"),
        ({"areas": (), "sizes": ()}, "none is given"),
        ({"aspects": (0.5,)}, "longer over shorter side"),
        ({"enlarge": 0.5}, "enlarge 0.5 must be at least 1"),
    ],
)
def test_bad_buckets_are_refused(fields, text):
    with pytest.raises(ValueError, match=text):
        Buckets(**fields)
