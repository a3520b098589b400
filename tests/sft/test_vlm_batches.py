"""Steps of packed examples as arrays: what is where."""

import numpy as np
import pytest

from clvr_jax.data.loader import LoadError
from clvr_jax.data.packing import plan_packed
from clvr_jax.models.qwen3_vl import vision
from clvr_jax.sft.vlm import batches
from tests.sft import vlm_cases as cases

VISION = cases.CFG.vision


def read(index):
    return cases.examples()[index]


def make(step, process=(0, 1)):
    return batches.make(step, read, VISION, process)


def test_a_row_by_hand():
    """Two examples behind one another, then padding."""
    one, two = read(3), read(0)  # 11 tokens of text; 3, a picture of 6 cells, 2 and 5
    batch = make(cases.step([3, 0]))
    assert {leaf.shape[:2] for leaf in batch.values()} == {(1, 1)}
    row = {name: leaf[0, 0] for name, leaf in batch.items()}
    np.testing.assert_array_equal(row["ids"], [*one.ids, *two.ids, *[0] * 11])
    np.testing.assert_array_equal(row["segments"], [1] * 11 + [2] * 18 + [0] * 11)
    np.testing.assert_array_equal(row["positions"][:11], one.positions)
    np.testing.assert_array_equal(row["positions"][11:29], two.positions)
    learnt = [*range(6, 10), *range(23, 28)]  # each predicts the token behind it
    np.testing.assert_array_equal(np.flatnonzero(row["weights"]), learnt)
    np.testing.assert_array_equal(row["targets"][learnt], [*one.ids[7:], *two.ids[13:]])
    assert set(row["weights"]) == {0, 1} and row["weights"].dtype == np.float32
    assert row["targets"][10] == row["targets"][28] == 0  # nothing of the next example
    np.testing.assert_array_equal(np.flatnonzero(row["places"] >= 0), np.arange(15, 21))
    np.testing.assert_array_equal(row["places"][15:21], np.arange(6))


def test_pictures_lie_in_places_of_their_own():
    batch = make(cases.step([2, 1, 0], tokens=48, patches=32))
    row = {name: leaf[0, 0] for name, leaf in batch.items()}
    pictures = [p for i in (2, 0) for _, p in read(i).pictures]
    assert row["pixels"].dtype == np.uint8 and row["pixels"].shape == (4, 32, 12)
    assert row["patches"].tolist() == [4, 32, 24, 4]  # the last holds no picture
    for i, picture in enumerate(pictures):
        count = len(picture.patches)
        np.testing.assert_array_equal(row["pixels"][i, :count], picture.patches)
        assert not row["pixels"][i, count:].any()
        known = vision.places([picture.grid], VISION, 32)
        for name, leaf in zip(batches.PLACES, (known.taps, known.weights, known.rows)):
            np.testing.assert_array_equal(row[name][i], leaf[0])
    cells = row["places"][row["places"] >= 0]
    np.testing.assert_array_equal(cells, [0, *range(8, 16), *range(16, 22)])  # 8 cells a place
    assert (row["ids"][row["places"] >= 0] == cases.CFG.image_token).all()


def test_rows_without_examples_weigh_nothing():
    batch = make(cases.step([3], [], [], [1], accumulation=2))
    assert batch["weights"].shape == (2, 2, 40)
    assert batch["weights"].sum(-1).tolist() == [[4, 0], [0, 1]]
    for at in ((0, 1), (1, 0)):
        assert not any(batch[name][at].any() for name in ("ids", "segments", "pixels", "positions"))
        assert (batch["places"][at] == -1).all() and (batch["patches"][at] == 4).all()
    empty = batches.empty((2, 3), cases.step([0]).static, VISION)
    assert {name: (x.shape[2:], x.dtype) for name, x in empty.items()} == {
        name: (x.shape[2:], x.dtype) for name, x in batch.items()
    }


def test_text_alone_has_no_room_for_pictures():
    batch = make(cases.step([3, 1], images=0, patches=0))
    assert batch.keys() == {"ids", "targets", "segments", "positions", "weights"}


def test_processes_share_a_step():
    step = cases.step([0], [1, 3], [2], [], [4], [5], [3], [1], accumulation=2)
    whole = make(step)
    halves = [make(step, (i, 2)) for i in range(2)]
    for name, leaf in whole.items():
        np.testing.assert_array_equal(np.concatenate([h[name] for h in halves], axis=1), leaf)


def test_a_planned_epoch_is_read_whole():
    sizes = [example.size for example in cases.examples()] * 5
    steps = plan_packed(sizes, 40, 2, 2, seed=1, epoch=0, most_images=4)
    read = lambda i: cases.examples()[i % len(cases.examples())]
    made = [batches.make(step, read, VISION) for step in steps]
    learnt = sum(batch["weights"].sum() for batch in made)
    assert learnt == sum(example.trained[1:].sum() for example in map(read, range(len(sizes))))
    pixels = sum(int(batch["pixels"].sum()) for batch in made)
    assert pixels == 5 * sum(int(p.patches.sum()) for e in cases.examples() for _, p in e.pictures)


@pytest.mark.parametrize(
    "room", [{"tokens": 20}, {"images": 2}, {"patches": 12}], ids=lambda room: next(iter(room))
)
def test_what_outgrew_its_plan_is_named(room):
    with pytest.raises(
        LoadError, match=r"example 4: its 30 tokens and 3 images .*it changed since"
    ):
        make(cases.step([1, 4], **room))
    with pytest.raises(LoadError, match="example 77: IndexError"):
        make(cases.step([1, 77]))
