"""Packing: every example once, in rows that hold it, in as few steps as there can be."""

import numpy as np
import pytest

from clvr_jax.data.packing import WINDOW, Shape, Size, pack, plan_packed, utilisation
from clvr_jax.data.plan import FILLING

CAPACITY = 1000


def conversations(count, seed=0, least=1):
    """Sizes as trajectories have them: some text, and images that make most of the tokens."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 5, count)
    return [
        Size(int(rng.integers(least, 300)) + 140 * int(n), int(n), 4 * 140 if n else 0)
        for n in images
    ]


def contents(steps):
    """Examples of every row that is not empty."""
    rows = [row for step in steps for row in step.rows.reshape(-1, step.rows.shape[-1])]
    return [row[row != FILLING].tolist() for row in rows if (row != FILLING).any()]


@pytest.mark.parametrize("count", [1, 2, 37, WINDOW + 1, 2500])
@pytest.mark.parametrize("most_images", [None, 4])
def test_every_example_comes_once_and_fits(count, most_images):
    sizes = conversations(count)
    rows = pack(sizes, CAPACITY, 0, 0, most_images=most_images)
    assert sorted(i for row in rows for i in row) == list(range(count))
    assert all(rows)
    for row in rows:
        assert sum(sizes[i].tokens for i in row) <= CAPACITY
        assert most_images is None or sum(sizes[i].images for i in row) <= most_images


def test_a_packing_is_a_function_of_seed_and_epoch():
    sizes = conversations(200)
    assert pack(sizes, CAPACITY, 3, 1) == pack(list(sizes), CAPACITY, 3, 1)
    others = [pack(sizes, CAPACITY, seed, epoch) for seed, epoch in ((3, 1), (3, 2), (4, 1))]
    sets = [{frozenset(row) for row in rows} for rows in others]
    assert sets[0] != sets[1] and sets[0] != sets[2]  # company changes, not only the order


def test_known_packings():
    """By hand: exact fits are found, and awkward lengths leave room."""
    as_sets = lambda lengths, **limits: sorted(
        sorted(lengths[i] for i in row)
        for row in pack([Size(*n) for n in lengths], 10, 0, 0, **limits)
    )
    assert as_sets([(7,), (3,), (6,), (4,), (5,), (5,)]) == [
        [(3,), (7,)],
        [(4,), (6,)],
        [(5,), (5,)],
    ]
    assert as_sets([(10,), (10,), (1,)]) == [[(1,)], [(10,)], [(10,)]]
    assert as_sets([(6,), (6,), (6,)]) == [[(6,)]] * 3
    crowded = [(2, 2, 64)] * 3
    assert as_sets(crowded) == [crowded]
    assert as_sets(crowded, most_images=4) == [crowded[:1], crowded[:2]]


def test_rows_are_full():
    """Trajectories of a tenth to four fifths of a row use at least nine tenths of the room."""
    sizes = conversations(3000, least=100)
    steps = plan_packed(sizes, CAPACITY, 4, 8, 0, 0)
    used = utilisation(steps, sizes)
    assert used.tokens > 0.9 and used.rows > 0.95 and used.images > 0.6
    fewest = sum(size.tokens for size in sizes) / CAPACITY
    assert len(contents(steps)) < 1.1 * fewest


def test_utilisation_counts():
    sizes = [Size(600, 1, 64), Size(300, 2, 64), Size(1000)]
    steps = plan_packed(sizes, CAPACITY, 1, 4, 0, 0)
    assert len(steps) == 1 and steps[0].static == Shape(CAPACITY, 4, 64)
    assert utilisation(steps, sizes) == (2 / 4, 1900 / 4000, 3 / 16)


@pytest.mark.parametrize("count", [1, 31, 32, 33, 700])
@pytest.mark.parametrize(("accumulation", "rows"), [(1, 1), (2, 3), (4, 8)])
def test_steps_hold_every_row_once_and_are_few(count, accumulation, rows):
    sizes = conversations(count)
    steps = plan_packed(sizes, CAPACITY, accumulation, rows, 5, 2)
    packed = pack(sizes, CAPACITY, 5, 2)
    assert sorted(contents(steps)) == sorted(packed)
    assert len(steps) == -(-len(packed) // (accumulation * rows))
    held = [(step.rows != FILLING).any(-1).sum() for step in steps]
    assert max(held) - min(held) <= 1, "what is left over follows from all steps alike"
    for step in steps:
        assert step.rows.shape[:2] == (accumulation, rows)
        for row in contents([step]):
            assert sum(sizes[i].images for i in row) <= step.static.images
            assert max(sizes[i].patches for i in row) <= step.static.patches
    again = plan_packed(sizes, CAPACITY, accumulation, rows, 5, 2)
    for one, other in zip(steps, again, strict=True):
        assert one.static == other.static and np.array_equal(one.rows, other.rows)


def test_programs_are_few_and_rows_of_alike_needs_meet():
    sizes = conversations(2000)
    steps = [s for epoch in range(3) for s in plan_packed(sizes, CAPACITY, 1, 8, 0, epoch)]
    statics = {step.static for step in steps}
    assert all(s.images & (s.images - 1) == 0 for s in statics) and len(statics) <= 5
    assert {s.patches for s in statics} <= {0, 576}, "no more than the largest image needs"
    mixed = 0
    for step in steps:
        needs = [sum(sizes[i].images for i in row) for row in contents([step])]
        mixed += 2 * min(needs) <= step.static.images - 2
    assert mixed < 0.1 * len(steps)
    text = plan_packed([Size(5), Size(7)], CAPACITY, 1, 1, 0, 0)
    assert [step.static for step in text] == [Shape(CAPACITY, 0, 0)]


def test_what_does_not_fit_is_named():
    sizes = [Size(10), Size(1200, 1, 64), Size(1001, 9, 64)]
    with pytest.raises(ValueError, match=r"example 'b' has 1200 tokens, a row holds 1000 \(2 of 3"):
        pack(sizes, CAPACITY, 0, 0, names=["a", "b", "c"])
    with pytest.raises(ValueError, match=r"example 2 has 9 images, a row holds 8 \(1 of 3"):
        pack(sizes, 2000, 0, 0, most_images=8)
    with pytest.raises(ValueError, match="no examples"):
        pack([], CAPACITY, 0, 0)
    with pytest.raises(ValueError, match="accumulation 0, rows 4"):
        plan_packed(sizes, 2000, 0, 4, 0, 0)
