"""Two detectors on renders they were not tuned on, damaged ones, and things that are not clean."""

import ast
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from clvr_jax.miniature import detect, detect_eval
from clvr_jax.miniature.readings import SURE, Readings, agreement
from clvr_jax.miniature.scene import CELLS, KINDS, MOST, Scene, from_codes
from tests.miniature.perfect import renders

DETECTORS = pytest.mark.parametrize("detector", (detect, detect_eval), ids=("one", "two"))


def _codes(rng, count, least=0, most=MOST):
    codes = np.zeros((count, CELLS), np.int32)
    for row in codes:
        cells = rng.permutation(CELLS)[: rng.integers(least, most + 1)]
        row[cells] = rng.integers(1, KINDS + 1, len(cells))
    return codes


def _render(codes, seed=0):
    return renders(codes, seed + np.arange(len(codes)))


def _bytes(values):
    return np.clip(np.round(values), 0, 255).astype(np.uint8)


def _noisy(pictures, sigma):
    return _bytes(pictures + np.random.default_rng(0).normal(0, sigma * 255, pictures.shape))


def _blurred(pictures, sigma):
    return _bytes(ndimage.gaussian_filter(pictures.astype(float), (0, sigma, sigma, 0)))


def _exact(readings, codes):
    return np.mean((readings.codes == codes).all(1) & readings.clean)


@pytest.fixture(scope="module")
def pictures():
    codes = _codes(np.random.default_rng(7), 131)
    return codes, _render(codes, 700)


@pytest.fixture(scope="module")
def altered():
    """Codes with at least one thing, pictures, the same without the first thing, and which cell."""
    codes = _codes(np.random.default_rng(8), 32, least=1)
    rows, cells = np.arange(32), (codes > 0).argmax(1)
    without = codes.copy()
    without[rows, cells] = 0
    return codes, _render(codes).astype(float), _render(without).astype(float), cells


@DETECTORS
def test_renders_are_read_exactly(detector, pictures):
    codes, pixels = pictures
    readings = detector.detect(pixels)
    assert _exact(readings, codes) >= 0.995
    assert readings.scene(3) == from_codes(codes[3])


@DETECTORS
def test_mild_damage_does_no_harm(detector, pictures):
    codes, pixels = pictures
    assert _exact(detector.detect(_noisy(pixels, 0.03)), codes) >= 0.97
    assert _exact(detector.detect(_blurred(pixels, 0.7)), codes) >= 0.97


@pytest.mark.slow
@DETECTORS
def test_two_thousand_renders(detector):
    codes = _codes(np.random.default_rng(9), 2000)
    pixels = _render(codes, 9000)
    assert _exact(detector.detect(pixels), codes) >= 0.995
    assert _exact(detector.detect(_noisy(pixels, 0.03)), codes) >= 0.97
    assert _exact(detector.detect(_blurred(pixels, 0.7)), codes) >= 0.97
    assert _exact(detector.detect(_bytes(pixels[:400] * 0.95)), codes[:400]) >= 0.97
    assert _exact(detector.detect(_bytes(pixels[:400] * 1.05)), codes[:400]) >= 0.97


@DETECTORS
def test_a_faded_thing_is_unsure_in_its_own_cell(detector, altered):
    _, full, without, cells = altered
    readings = detector.detect(_bytes(0.4 * full + 0.6 * without))
    assert not readings.clean.any()
    sure = readings.confidence >= SURE
    assert not sure[np.arange(len(cells)), cells].any()
    sure[np.arange(len(cells)), cells] = True
    assert sure.mean() > 0.99  # the other cells are read as before


@DETECTORS
def test_a_colour_between_two_is_unclean(detector):
    codes = np.zeros((4, CELLS), np.int32)
    codes[:, 5] = 2  # a large red circle; colours are two codes apart
    between = 0.5 * _render(codes + 2 * (codes > 0)) + 0.5 * _render(codes + 4 * (codes > 0))
    assert not detector.detect(_bytes(between)).clean.any()  # of orange and yellow


@DETECTORS
def test_two_things_in_a_cell_are_unclean(detector, altered):
    _, full, without, _ = altered
    thing = full - without
    both = np.roll(thing, (-4, -4), (1, 2)) + np.roll(thing, (3, 3), (1, 2)) + without
    assert detector.detect(_bytes(both)).clean.mean() < 0.1


@DETECTORS
def test_things_are_found_across_the_borders_of_cells(detector):
    codes = _codes(np.random.default_rng(3), 32)
    codes.reshape(-1, 4, 4)[:, [0, 3]] = 0
    codes.reshape(-1, 4, 4)[:, :, [0, 3]] = 0
    moved = np.roll(_render(codes), (3, -3), (1, 2))
    np.testing.assert_array_equal(detector.detect(moved).codes, codes)


@DETECTORS
def test_more_things_than_a_scene_holds(detector):
    codes = _codes(np.random.default_rng(4), 8, least=MOST + 1, most=CELLS)
    readings = detector.detect(_render(codes))
    np.testing.assert_array_equal(readings.codes, codes)
    assert not readings.clean.any() and readings.scenes() == [None] * 8
    with pytest.raises(ValueError, match="at most 8"):
        readings.scene(0)


@DETECTORS
def test_what_is_no_picture_of_this_world(detector):
    black, paper = np.zeros((1, 64, 64, 3), np.uint8), _render(np.zeros((1, CELLS), np.int32))
    grain = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), np.uint8)
    readings = detector.detect(np.concatenate([paper, grain, black]))
    assert readings.clean.tolist() == [True, False, False]
    assert readings.scene(0) == Scene()
    assert len(detector.detect(paper[:0])) == 0


def test_pictures_of_another_size_are_refused():
    with pytest.raises(ValueError, match="pictures are 64x64"):
        detect.detect(np.zeros((2, 32, 64, 3), np.uint8))


def test_batches_of_any_size_are_read_alike(pictures):
    _, pixels = pictures
    one, all_ = detect.detect(pixels[:1]), detect.detect(pixels)
    np.testing.assert_array_equal(one.codes[0], all_.codes[0])
    np.testing.assert_array_equal(detect.detect(pixels[128:131]).codes, all_.codes[128:])


def test_the_detectors_agree_and_share_no_code(pictures):
    a, b = detect.detect(pictures[1]), detect_eval.detect(pictures[1])
    assert agreement(a, b)["pictures"] >= 0.99
    names = set()
    for node in ast.walk(ast.parse(Path(detect_eval.__file__).read_text())):
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    assert not any(word in name for name in names for word in ("miniature.detect", "render"))


def test_agreement_counts():
    codes = np.zeros((2, CELLS), np.int32)
    a = Readings(codes, np.ones((2, CELLS), np.float32), np.array([True, True]))
    other = codes.copy()
    other[1, :4] = 5
    b = Readings(other, a.confidence, np.array([True, False]))
    expected = {"pictures": 0.5, "cells": 28 / 32, "clean": 0.5, "clean_pictures": 1.0}
    assert agreement(a, b) == expected
