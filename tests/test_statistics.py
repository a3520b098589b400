"""Intervals and tests of shares, against published examples."""

import math

import numpy as np
import pytest

from clvr_jax.statistics import holm, mcnemar, paired_difference, rate, wilson


def pairs(both, only_a, only_b, neither):
    """Results of two systems with these counts."""
    a = [True] * (both + only_a) + [False] * (only_b + neither)
    b = [True] * both + [False] * only_a + [True] * only_b + [False] * neither
    return a, b


# Newcombe 1998, Statistics in Medicine 17, 857, table I, method 3
@pytest.mark.parametrize(
    "successes,trials,expected",
    [(81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0.0, 0.1611))],
)
def test_wilson(successes, trials, expected):
    assert wilson(successes, trials) == pytest.approx(expected, abs=5e-5)


def test_a_rate_without_trials_says_nothing():
    nothing = rate([])
    assert (nothing.low, nothing.high) == (0.0, 1.0) and math.isnan(nothing.value)
    assert nothing.as_dict()["rate"] is None
    assert rate([True, False, True]).value == pytest.approx(2 / 3)


def test_wilson_refuses_what_is_no_share():
    with pytest.raises(ValueError, match="3 successes of 2"):
        wilson(3, 2)
    with pytest.raises(ValueError, match="level is 95"):
        wilson(1, 2, 95.0)


# Fagerland, Lydersen and Laake 2013, BMC Medical Research Methodology 13:91: airway reactivity of
# 21 children before and after transplantation (Bentur et al. 2009), exact conditional test
def test_mcnemar():
    a, b = pairs(1, 1, 7, 12)
    assert mcnemar(a, b) == pytest.approx(0.0703, abs=5e-5) == mcnemar(b, a)
    assert mcnemar(a, a) == 1.0
    with pytest.raises(ValueError, match="same cases"):
        mcnemar(a, b[1:])


@pytest.mark.parametrize(
    "counts,expected",
    [
        ((1, 1, 7, 12), (-0.286, -0.507, -0.026)),  # Fagerland et al. 2014, the same children
        ((14, 5, 0, 22), (0.122, 0.011, 0.226)),  # Altman et al. 2000, Statistics with Confidence
        ((36, 12, 2, 0), (0.2, 0.0569, 0.3404)),  # Newcombe 1998, Stat. Med. 17, 2635, table II
    ],
)
def test_paired_difference(counts, expected):
    a, b = pairs(*counts)
    found = paired_difference(a, b)
    assert found == pytest.approx(expected, abs=5e-4)
    back = paired_difference(b, a)
    assert back == pytest.approx((-found.value, -found.high, -found.low))


def test_paired_difference_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(250):
        skill = rng.random(80)  # a and b share what is hard
        a, b = rng.random(80) < skill, rng.random(80) < 0.8 * skill
        found = paired_difference(a, b)
        covered += found.low <= 0.1 <= found.high
    assert 0.92 <= covered / 250 <= 0.98


def test_equal_results_differ_by_nothing():
    found = paired_difference([True] * 10, [True] * 10)
    assert found.value == 0 and found.low < 0 < found.high


def test_holm():
    # p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm") of R
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]).tolist() == [1.0, 1.0] and holm([]).size == 0
    with pytest.raises(ValueError, match="between 0 and 1"):
        holm([1.2])
