"""Lazy joins and copies."""

import ml_dtypes
import numpy as np
import pytest

from conversion.lazy import Joined, Stored, contiguous, fill, memory_order

DTYPES = [np.float32, ml_dtypes.bfloat16, np.float64]


def noise(*shape, dtype=np.float32):
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(130, 3, 5, 70), (700, 900), (1, 65), (3,), (0, 4), ()])
def test_contiguous_copies_any_permutation(shape, dtype):
    x = noise(*shape, dtype=dtype)
    for order in {tuple(np.roll(range(x.ndim), n)) for n in range(max(x.ndim, 1))}:
        view = x.transpose(order)
        out = contiguous(view)
        assert out.flags.c_contiguous and out.dtype == dtype
        np.testing.assert_array_equal(out, view)
    assert contiguous(x) is x or contiguous(x).base is x.base


def test_contiguous_casts():
    x = noise(70, 80)
    out = contiguous(x.T, ml_dtypes.bfloat16)
    np.testing.assert_array_equal(out, x.T.astype(ml_dtypes.bfloat16))


def test_fill_writes_into_part_of_an_array():
    out, x = np.zeros((600, 3, 2, 400), np.float32), noise(2, 400, 600)
    fill(out[:, 1], x.transpose(2, 0, 1))
    np.testing.assert_array_equal(out[:, 1], x.transpose(2, 0, 1))
    assert not out[:, 0].any() and not out[:, 2].any()


def test_joined_is_concatenate_for_every_slice():
    parts = [noise(4, n, 6) for n in (2, 1, 3)]
    joined, whole = Joined(parts, 1), np.concatenate(parts, axis=1)
    assert joined.shape == whole.shape and joined.ndim == 3
    np.testing.assert_array_equal(np.asarray(joined), whole)
    for start in range(6):
        for stop in range(start + 1, 7):
            index = (slice(1, 3), slice(start, stop))
            np.testing.assert_array_equal(joined[index], whole[index])
    np.testing.assert_array_equal(np.asarray(joined.transpose((1, 2, 0))), whole.transpose(1, 2, 0))


def test_joined_promotes_types():
    joined = Joined([noise(2, 3), noise(2, 3, dtype=ml_dtypes.bfloat16)], 0)
    assert joined.dtype == np.float32
    assert np.asarray(joined).dtype == np.float32


def test_stored_reads_what_is_asked():
    x, asked = noise(4, 5), []

    def read(index):
        asked.append(index)
        return x if index is None else x[index]

    stored = Stored(x.shape, x.dtype, read)
    np.testing.assert_array_equal(stored[1:3], x[1:3])
    np.testing.assert_array_equal(np.asarray(stored), x)
    assert asked == [(slice(1, 3), slice(None)), None]


def test_memory_order_makes_a_transposed_view_contiguous():
    x = noise(4, 5, 6)
    view = x.transpose(2, 0, 1)
    assert memory_order(view) == (1, 2, 0)
    assert view.transpose(memory_order(view)).flags.c_contiguous
