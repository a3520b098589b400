"""Plans: every item once an epoch, one key a step, the same on every host, found by index."""

import collections

import numpy as np
import pytest

from clvr_jax.data.plan import FILLING, Epochs, Step, plan_groups, rows_of_process, shuffled

KEYS = ["wide"] * 13 + ["tall"] * 5 + ["square"]


def items(steps):
    return [int(i) for step in steps for i in step.rows.flat if i != FILLING]


def test_every_item_comes_once_and_steps_hold_one_key():
    steps = plan_groups(KEYS, 2, 3, seed=0, epoch=0)
    assert sorted(items(steps)) == list(range(len(KEYS)))
    for step in steps:
        assert step.rows.shape == (2, 3)
        assert {KEYS[i] for i in step.rows.flat if i != FILLING} == {step.static}


def test_what_is_left_over_is_spread_evenly():
    steps = plan_groups(KEYS, 2, 3, seed=0, epoch=0)
    sizes = collections.defaultdict(list)
    for step in steps:
        sizes[step.static].append(int((step.rows != FILLING).sum()))
    # 13 over ceil(13 / 6) steps, not 6 + 6 + 1
    assert {k: sorted(v) for k, v in sizes.items()} == {
        "wide": [4, 4, 5],
        "tall": [5],
        "square": [1],
    }
    for step in steps:  # filling last, so that whole micro-batches may be empty but none has holes
        flat = step.rows.ravel()
        assert (flat[(flat != FILLING).sum() :] == FILLING).all()


def test_order_is_a_function_of_seed_and_epoch():
    plan = lambda seed, epoch: items(plan_groups(KEYS, 1, 4, seed, epoch))
    assert plan(0, 0) == plan(0, 0)
    assert len({tuple(plan(s, e)) for s in (0, 1) for e in (0, 1)}) == 4
    assert len({step.static for step in plan_groups(KEYS, 1, 4, 0, 0)[:4]}) > 1  # keys are mixed


def test_shuffles_do_not_change_with_numpy():
    # the bits of PCG64 are fixed by numpy's policy (NEP 19); its own permutation is not
    assert shuffled(8, 1, 2, 3).tolist() == [1, 3, 7, 5, 2, 0, 4, 6]
    counts = np.zeros((6, 6))
    for seed in range(3000):
        counts[np.arange(6), shuffled(6, seed)] += 1
    assert np.abs(counts / 3000 - 1 / 6).max() < 0.03


def test_processes_share_the_rows():
    rows = np.arange(24).reshape(2, 12)
    parts = [rows_of_process(rows, i, 3) for i in range(3)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), rows)
    with pytest.raises(ValueError, match="12 rows of a micro-batch over 5 processes"):
        rows_of_process(rows, 0, 5)


def test_a_run_is_its_epochs_one_after_the_other():
    plan = lambda epoch: plan_groups(KEYS, 1, 4, 7, epoch)
    run = Epochs(plan, epochs=3)
    flat = [step for epoch in range(3) for step in plan(epoch)]
    assert len(run) == len(flat)
    for i in (0, 5, 12, len(flat) - 1, -1):
        np.testing.assert_array_equal(run[i].rows, flat[i].rows)
    assert [i for step in run for i in step.rows.flat] == [i for s in flat for i in s.rows.flat]
    per_epoch = len(plan(0))
    assert run.place(per_epoch) == (1, 0) and run.place(per_epoch - 1) == (0, per_epoch - 1)
    assert run[per_epoch - 1].epoch == 0 and run[per_epoch].epoch == 1
    assert run.epoch_ends() == [per_epoch, 2 * per_epoch, 3 * per_epoch]
    assert set(run.statics()) == set(KEYS)
    with pytest.raises(IndexError):
        run[len(flat)]


def test_a_run_may_be_given_in_steps_and_epochs_may_differ_in_length():
    plan = lambda epoch: [Step(epoch, np.zeros((1, 1), int))] * (epoch + 1)
    run = Epochs(plan, steps=8)
    assert [step.static for step in run] == [0, 1, 1, 2, 2, 2, 3, 3]
    assert run.epoch_ends() == [1, 3, 6, 8]


def test_few_epochs_are_held():
    asked = []

    def plan(epoch):
        asked.append(epoch)
        return [Step(epoch, np.zeros((1, 1), int))] * 2

    run = Epochs(plan, epochs=4)
    asked.clear()
    list(run)
    assert asked == [0, 1, 2, 3]  # each once, none kept from the start


def test_bad_plans_are_refused():
    with pytest.raises(ValueError, match="given 0 items"):
        plan_groups([], 1, 1, 0, 0)
    with pytest.raises(ValueError, match="rows 0"):
        plan_groups(KEYS, 1, 0, 0, 0)
    with pytest.raises(ValueError, match="give epochs or steps"):
        Epochs(lambda epoch: [], epochs=1, steps=1)
    with pytest.raises(ValueError, match="epoch 0 has no steps"):
        Epochs(lambda epoch: [], steps=3)
