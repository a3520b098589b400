"""Penalties, truncation, grammars and noise of the device's sampler, against plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clvr_jax.generate import sampling
from clvr_jax.generate.sampling import Sampling

VOCAB = 70  # no multiple of 32: the last word of a mask is partly used


def options(**fields) -> Sampling:
    """Options of rows; every field a list, or its neutral value."""
    rows = max((len(v) for v in fields.values()), default=1)
    neutral = {
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition": 1.0,
        "presence": 0.0,
        "frequency": 0.0,
        "seed": 0,
    }
    kinds = {"top_k": jnp.int32, "seed": jnp.uint32}
    made = {
        name: jnp.asarray(fields.get(name, [value] * rows), kinds.get(name, jnp.float32))
        for name, value in neutral.items()
    }
    return Sampling(**made)


def scores(rows=1, seed=0):
    return jnp.asarray(3 * np.random.default_rng(seed).standard_normal((rows, VOCAB)), jnp.float32)


def draw(raw, o, counts=None, seen=None, step=None, mask=None):
    rows = len(raw)
    counts = jnp.zeros((rows, VOCAB), jnp.int32) if counts is None else jnp.asarray(counts)
    seen = jnp.zeros((rows, VOCAB), bool) if seen is None else jnp.asarray(seen)
    step = jnp.zeros(rows, jnp.int32) if step is None else jnp.asarray(step)
    return np.asarray(jax.jit(sampling.sample)(raw, o, seen, counts, step, mask))


def test_penalties_of_what_was_said_and_generated():
    raw = scores()
    counts = np.zeros((1, VOCAB), np.int32)
    counts[0, [3, 5]] = 1, 4
    seen = np.zeros((1, VOCAB), bool)
    seen[0, [3, 7]] = True
    o = options(repetition=[1.5], presence=[0.7], frequency=[0.2])
    ours = np.asarray(sampling.penalised(raw, o, jnp.asarray(seen), jnp.asarray(counts)))[0]
    theirs = np.asarray(raw)[0].copy()
    for token in (3, 5, 7):  # the conversation and this turn
        theirs[token] = theirs[token] / 1.5 if theirs[token] > 0 else theirs[token] * 1.5
    for token, times in ((3, 1), (5, 4)):  # this turn only
        theirs[token] -= 0.7 + 0.2 * times
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_no_penalty_changes_no_bit():
    raw = scores()
    counts = jnp.ones((1, VOCAB), jnp.int32)
    seen = jnp.ones((1, VOCAB), bool)
    np.testing.assert_array_equal(sampling.penalised(raw, options(), seen, counts), raw)


def kept(raw, **fields) -> set[int]:
    warm = sampling.warped(raw, options(**fields))
    return set(np.flatnonzero(np.isfinite(np.asarray(warm)[0])).tolist())


@pytest.mark.parametrize("k", [1, 2, 13, VOCAB, 1000])
def test_top_k_keeps_the_k_likeliest(k):
    raw = scores()
    best = np.argsort(-np.asarray(raw)[0])[:k]
    assert kept(raw, top_k=[k]) == set(best.tolist())


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.9, 0.999])
def test_top_p_keeps_the_least_set_that_reaches_p(p):
    raw = scores()
    order = np.argsort(-np.asarray(raw)[0])
    mass = np.cumsum(np.asarray(jax.nn.softmax(raw))[0][order])
    count = int(np.searchsorted(mass, p)) + 1
    assert kept(raw, top_p=[p]) == set(order[:count].tolist())


def test_top_p_counts_what_top_k_has_left():
    raw = jnp.log(jnp.asarray([[0.4, 0.3, 0.2, 0.1] + [1e-9] * (VOCAB - 4)]))
    assert kept(raw, top_p=[0.65]) == {0, 1}
    assert kept(raw, top_k=[2], top_p=[0.55]) == {0}  # 0.4 of 0.7 is 0.57


def test_min_p_is_a_share_of_the_best():
    raw = jnp.log(jnp.asarray([[0.5, 0.3, 0.1, 0.05] + [1e-9] * (VOCAB - 4)]))
    assert kept(raw, min_p=[0.15]) == {0, 1, 2}


def test_equal_tokens_stay_together():
    raw = jnp.zeros((1, VOCAB))
    assert len(kept(raw, top_k=[5])) == VOCAB
    assert len(kept(raw, top_p=[0.5])) == VOCAB


def test_temperature_comes_before_truncation():
    raw = jnp.log(jnp.asarray([[0.6, 0.3, 0.1] + [1e-9] * (VOCAB - 3)]))
    assert kept(raw, top_p=[0.5]) == {0}
    assert kept(raw, top_p=[0.5], temperature=[3.0]) > {0}


def test_rows_have_options_of_their_own():
    raw = jnp.tile(scores(), (4, 1))
    o = options(temperature=[0.0, 1.0, 1.0, 5.0], top_k=[0, 1, 0, 0], seed=[0, 1, 2, 3])
    best = int(jnp.argmax(raw[0]))
    draws = np.stack([draw(raw, o, step=[i] * 4) for i in range(50)])
    assert set(draws[:, 0]) == {best} and set(draws[:, 1]) == {best}
    assert len(set(draws[:, 2])) > 3 and len(set(draws[:, 3])) > len(set(draws[:, 2]))


def test_noise_depends_on_seed_and_step_alone():
    raw = scores(3)
    o = options(temperature=[1.0, 2.0, 0.5], seed=[9, 8, 7])
    together = draw(raw, o, step=[4, 5, 6])
    for row in range(3):
        one = jax.tree.map(lambda x, row=row: x[row : row + 1], o)
        assert draw(raw[row : row + 1], one, step=[4 + row]) == together[row]
    many = [int(draw(raw[:1], options(seed=[9]), step=[i])[0]) for i in range(40)]
    assert len(set(many)) > 5
    other = [int(draw(raw[:1], options(seed=[10]), step=[i])[0]) for i in range(40)]
    assert many != other


@pytest.mark.parametrize("token", [0, 31, 32, 63, 64, VOCAB - 1])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_mask_of_one_token(token, temperature):
    mask = np.zeros((1, 3), np.uint32)
    mask[0, token // 32] = np.uint32(1 << (token % 32))
    o = options(temperature=[temperature])
    assert draw(scores(), o, mask=jnp.asarray(mask.view(np.int32))) == [token]


def test_a_full_mask_changes_nothing():
    raw, o = scores(2), options(temperature=[1.0, 0.0], seed=[1, 2])
    mask = jnp.full((2, 3), -1, jnp.int32)
    np.testing.assert_array_equal(draw(raw, o, mask=mask), draw(raw, o))
