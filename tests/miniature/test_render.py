"""Pictures of scenes: everything at its place, and nothing changes that an edit does not name."""

import numpy as np
import pytest

from clvr_jax.miniature import render
from clvr_jax.miniature.pictures import Picture, rendered
from clvr_jax.miniature.scene import COLOURS, SHAPES, Scene, Thing, from_codes, thing
from tests.miniature.perfect import renders

CELL = render.CELL


def drawn(*scenes: Scene, seed: int = 0) -> np.ndarray:
    return renders(np.stack([scene.codes() for scene in scenes]), [seed] * len(scenes))


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
    for corners in (render.TRIANGLE, render.STAR):
        assert np.abs(corners).max() * max(render.RADII) + render.JITTER <= CELL / 2


def test_things_stay_in_their_cells_and_have_their_colours():
    things = [Thing(5, shape, colour, "large") for shape in SHAPES for colour in COLOURS]
    empty, *pictures = drawn(Scene(), *(Scene((each,)) for each in things), seed=3)
    for each, picture in zip(things, pictures, strict=True):
        changed = np.abs(cells(picture).astype(int) - cells(empty)).max(axis=(1, 2, 3)) > 0
        assert np.flatnonzero(changed).tolist() == [5]
        paint = np.array(render.PALETTE[COLOURS.index(each.colour)])
        near = np.abs(cells(picture)[5] / 255 - paint).max(axis=-1) < 0.09
        assert near.sum() >= 30, f"{each} has too little of its colour"


def test_a_picture_does_not_depend_on_its_batch():
    scenes = [Scene((thing(i, 10 * i + 3),)) for i in range(4)]
    together = drawn(*scenes, seed=1)
    keys = render.keys(np.full(2, 1))
    apart = render.render(np.stack([scene.codes() for scene in scenes[2:]]), keys)
    np.testing.assert_array_equal(apart, together[2:])


def test_any_number_of_pictures_is_rendered_in_groups_of_one_size():
    scene = Scene((thing(3, 7),))
    given = [Picture(scene.codes(), seed) for seed in range(130)]
    pixels = rendered(given, 128)
    assert pixels.shape == (130, render.SIDE, render.SIDE, 3)
    np.testing.assert_array_equal(rendered(given[129:], 128)[0], pixels[129])
    assert rendered([], 128).shape == (0, render.SIDE, render.SIDE, 3)


def test_a_blend_is_neither_the_one_nor_the_other_where_they_differ():
    one, other = Scene((thing(3, 7), thing(5, 30))), Scene((thing(3, 7), thing(5, 41)))
    blend = Picture(one.codes(), 3, other.codes(), 0.25)
    clean = rendered([Picture(one.codes(), 3), Picture(other.codes(), 3)], 4).astype(float)
    between, as_it_is = rendered([blend, Picture(one.codes(), 3)], 4)
    np.testing.assert_allclose(between, 0.75 * clean[0] + 0.25 * clean[1], atol=0.5)
    differs = (between != as_it_is).any(-1)
    assert differs[16:32, 16:32].any(), "in its cell"
    differs[16:32, 16:32] = False
    assert not differs.any(), "and nowhere else"


def test_large_is_larger_and_jitter_moves():
    scenes = [Scene((Thing(6, "circle", "black", size),)) for size in ("small", "large")]
    small, large = drawn(*scenes, seed=2)
    dark = lambda picture: (picture.mean(axis=-1) < 100).sum()
    assert 1.8 * dark(small) < dark(large)
    places = set()
    for picture in renders(np.stack([scenes[0].codes()] * 8), range(8)):
        ys, xs = np.nonzero(picture.mean(-1) < 100)
        places.add((round(ys.mean(), 1), round(xs.mean(), 1)))
    assert len(places) == 8
