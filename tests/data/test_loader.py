"""Loading: the order of the plan from any step on, names in errors, and an end to the threads."""

import threading
import time

import numpy as np
import pytest

from clvr_jax.data.loader import LoadError, load, naming, stack
from clvr_jax.data.plan import plan_groups, rows_of_process

STEPS = plan_groups([i % 2 for i in range(40)], 2, 4, 0, 0)


def make(step):
    time.sleep(0.01 * float(np.random.rand()))  # finished in any order
    return {"rows": step.rows.copy()}


@pytest.mark.parametrize("threads", [0, 1, 4])
@pytest.mark.parametrize("start", [0, 3, len(STEPS)])
def test_batches_come_in_the_order_of_the_plan(threads, start):
    with load(STEPS, make, start, threads=threads, prefetch=3) as batches:
        got = list(batches)
    assert [batch.index for batch in got] == list(range(start, len(STEPS)))
    for index, static, arrays in got:
        assert static == STEPS[index].static
        np.testing.assert_array_equal(arrays["rows"], STEPS[index].rows)


def test_processes_together_load_what_one_loads():
    part = lambda i: lambda step: {"rows": rows_of_process(step.rows, i, 2)}
    one = [batch.arrays["rows"] for batch in load(STEPS, make)]
    two = [[batch.arrays["rows"] for batch in load(STEPS, part(i))] for i in range(2)]
    for whole, *parts in zip(one, *two, strict=True):
        np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


@pytest.mark.parametrize("threads", [0, 3])
def test_a_failure_names_step_and_item_after_the_steps_before_it(threads):
    def broken(step):
        if step is STEPS[2]:
            with naming("trajectory t7, image 3"):
                raise OSError("cannot identify image file 'x.png'")
        return make(step)

    batches = load(STEPS, broken, threads=threads)
    assert [next(batches).index for _ in range(2)] == [0, 1]
    with pytest.raises(LoadError, match=r"^step 2: trajectory t7, image 3: OSError: cannot") as got:
        next(batches)
    assert isinstance(got.value.__cause__, OSError)
    assert list(batches) == []  # closed


def test_closing_ends_the_threads_soon():
    before = threading.active_count()
    made = []

    def slow(step):
        made.append(1)
        time.sleep(0.02)
        return {}

    batches = load(STEPS * 100, slow, threads=3, prefetch=3)
    next(batches)
    batches.close()
    batches.close()
    with pytest.raises(StopIteration):
        next(batches)
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before  # threads of earlier tests may end meanwhile
    assert len(made) < 10  # and nothing was read far ahead


def test_a_start_beyond_the_plan_is_refused():
    with pytest.raises(ValueError, match=r"step 99 lies outside of a plan of \d+ steps"):
        load(STEPS, make, 99)


def test_stack_fills_with_zeros_and_checks_shapes():
    item = np.ones((2, 3), np.uint8)
    out = stack([item, None, item, None], (2, 2), ((2, 3), np.uint8))
    assert out.shape == (2, 2, 2, 3) and out.dtype == np.uint8
    assert out.sum(axis=(2, 3)).tolist() == [[6, 0], [6, 0]]
    with pytest.raises(ValueError, match=r"shape \(2, 3\), \(3, 2\) was planned"):
        stack([item], (1, 1), ((3, 2), np.uint8))
