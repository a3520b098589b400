"""Rows of lessons: long ones are learnt as often as short ones."""

from types import SimpleNamespace

import numpy as np
import pytest

from clvr_jax.data.packing import Shape
from launch.training.world_vlm import fill

ROOM = Shape(tokens=100, images=8, patches=4)


def draws(stories, short=(10, 1)):
    """Lessons as (tokens, pictures); a story is any of `stories`."""

    def draw(rng, long):
        tokens, images = stories[int(rng.integers(len(stories)))] if long else short
        return SimpleNamespace(ids=[0] * tokens, long=long), [None] * images

    return draw


def rows(*args, count=200):
    return [fill(np.random.default_rng(i), ROOM, draws(*args), True) for i in range(count)]


def test_a_row_is_a_story_and_what_fits_behind_it():
    for row in rows([(95, 5), (31, 2)]):
        assert [example.long for example, _ in row] == [True] + [False] * (len(row) - 1)
        first = len(row[0][0].ids)
        assert len(row) == 1 + (100 - first) // 10


def test_pictures_take_room_too():
    assert {len(row) for row in rows([(20, 5)])} == {1 + 3}


def test_long_stories_are_as_frequent_as_drawn():
    long = sum(len(row[0][0].ids) == 95 for row in rows([(95, 5), (31, 2)]))
    assert 70 < long < 130, "half of them"


def test_a_story_that_no_row_holds_is_drawn_anew():
    assert {len(row[0][0].ids) for row in rows([(101, 1), (50, 9), (40, 8)])} == {40}
    with pytest.raises(ValueError, match="none has at most 100 tokens and 8 pictures; give a"):
        fill(np.random.default_rng(0), ROOM, draws([(101, 1)]), True)


def test_rows_of_short_lessons_have_no_story():
    row = fill(np.random.default_rng(0), ROOM, draws([(1, 1)]))
    assert [example.long for example, _ in row] == [False] * 8, "as many as there are pictures"
