"""Pictures of scenes: everything at its place, and nothing changes that an edit does not name."""

import numpy as np
import pytest

from clvr_jax.miniature import render
from clvr_jax.miniature.scene import COLOURS, SHAPES, Scene, Thing, from_codes, thing

CELL = render.CELL


def drawn(*scenes: Scene, seed: int = 0) -> np.ndarray:
    codes = np.stack([scene.codes() for scene in scenes])
    return np.asarray(render.render(codes, render.keys(np.full(len(scenes), seed, np.uint32))))


def cells(picture: np.ndarray) -> np.ndarray:
    """(16, 16, 16, 3) by cell."""
    grid = picture.reshape(4, CELL, 4, CELL, 3)
    return grid.transpose(0, 2, 1, 3, 4).reshape(16, CELL, CELL, 3)


def test_codes_say_all():
    things = [thing(cell, code) for cell, code in enumerate(range(81, 97))]
    assert [t.code for t in things] == list(range(81, 97))
    scene = Scene(tuple(things[:8]))
    assert from_codes(scene.codes()) == scene
    assert thing(3, 1) == Thing(3, "circle", "red", "small")


def test_scenes_refuse_what_cannot_be():
    with pytest.raises(ValueError, match="share a cell"):
        Scene((thing(3, 1), thing(3, 2)))
    with pytest.raises(ValueError, match="at most 8"):
        Scene(tuple(thing(cell, 1) for cell in range(9)))


def test_an_edit_changes_its_cell_only():
    before = Scene((thing(0, 5), thing(7, 40), thing(13, 90)))
    one, other = drawn(before, before.put(Thing(7, "star", "blue", "large")), seed=7)
    different = [bool((a != b).any()) for a, b in zip(cells(one), cells(other), strict=True)]
    assert [i for i, d in enumerate(different) if d] == [7]


def test_nothing_is_cut_off_at_the_border_of_its_cell():
    for corners in (render._TRIANGLE, render._STAR):
        assert np.abs(corners).max() * max(render.RADII) + render.JITTER <= CELL / 2


def test_things_stay_in_their_cells_and_have_their_colours():
    empty, *_ = drawn(Scene(), seed=3)
    for shape in SHAPES:
        for colour, paint in zip(COLOURS, render.PALETTE, strict=True):
            (picture,) = drawn(Scene((Thing(5, shape, colour, "large"),)), seed=3)
            changed = np.abs(cells(picture).astype(int) - cells(empty)).max(axis=(1, 2, 3)) > 0
            assert np.flatnonzero(changed).tolist() == [5]
            cell = cells(picture)[5]
            near = np.abs(cell / 255 - np.array(paint)).max(axis=-1) < 0.09
            assert near.sum() >= 30, f"a {colour} {shape} has too little {colour}"


def test_a_picture_does_not_depend_on_its_batch():
    scenes = [Scene((thing(i, 10 * i + 3),)) for i in range(4)]
    together = drawn(*scenes, seed=1)
    for i, scene in enumerate(scenes):
        np.testing.assert_array_equal(drawn(scene, seed=1)[0], together[i])


def test_large_is_larger_and_jitter_moves():
    small, large = (
        drawn(Scene((Thing(6, "circle", "black", size),)), seed=2)[0] for size in ("small", "large")
    )
    dark = lambda picture: (picture.mean(axis=-1) < 100).sum()
    assert 1.8 * dark(small) < dark(large)
    places = set()
    for seed in range(8):
        ys, xs = np.nonzero(
            drawn(Scene((Thing(6, "circle", "black", "small"),)), seed=seed)[0].mean(-1) < 100
        )
        places.add((round(ys.mean(), 1), round(xs.mean(), 1)))
    assert len(places) == 8
