"""Intervals cover the truth as often as they say, and pass@k equals counting all subsets."""

import itertools

import numpy as np
import pytest

from hiexp.tasks.statistics import bootstrap_interval, macro_interval, paired_difference, pass_at_k, t_interval


def test_interval_covers_the_true_mean_in_about_95_percent_of_samples():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        low, high = bootstrap_interval(rng.random(80) < 0.6, seed=seed)
        covered += low <= 0.6 <= high
    assert 175 <= covered <= 199


def test_interval_of_equal_values_is_a_point_and_seeds_decide():
    assert bootstrap_interval([0.5] * 9) == (0.5, 0.5)
    values = np.arange(20.0)
    assert bootstrap_interval(values) == bootstrap_interval(values)
    low, high = bootstrap_interval(values, level=0.5)
    wide_low, wide_high = bootstrap_interval(values, level=0.99)
    assert wide_low < low < values.mean() < high < wide_high


def test_paired_difference_is_narrower_than_independent_ones():
    rng = np.random.default_rng(1)
    base = rng.random(200)
    better = base + 0.05 + 0.01 * rng.normal(size=200)
    mean, low, high = paired_difference(better, base)
    assert low < mean < high
    assert 0.04 < low < 0.05 < high < 0.06


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_pass_at_k_counts_subsets(k):
    correct = np.random.default_rng(2).random((30, 5)) < 0.3
    brute = np.mean([[any(subset) for subset in itertools.combinations(row, k)] for row in correct], axis=1)
    assert pass_at_k(correct, k) == pytest.approx(brute, abs=1e-12)


def test_macro_interval_covers_the_mean_of_means_and_is_one_sets_own_for_one():
    rng = np.random.default_rng(3)
    covered = 0
    for seed in range(200):
        low, high = macro_interval([rng.random(150) < 0.3, rng.random(60) < 0.7], seed=seed)
        covered += low <= 0.5 <= high
    assert 175 <= covered <= 199
    values = rng.random(30)
    assert macro_interval([values]) == bootstrap_interval(values)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: bootstrap_interval([]), "values: expected finite numbers"),
        (lambda: macro_interval([]), "sets: expected at least one"),
        (lambda: bootstrap_interval([1.0, np.nan]), "values: expected finite numbers"),
        (lambda: bootstrap_interval([1.0], level=1.0), "level"),
        (lambda: paired_difference([1.0], [1.0, 2.0]), "b: expected the shape"),
        (lambda: pass_at_k([[True, False]], 3), r"k: expected 1\.\.n"),
        (lambda: pass_at_k([True], 1), r"k: expected 1\.\.n"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_t_interval_is_students():
    # t(0.975, 4) = 2.776445 (any table); the standard deviation of 1..5 is sqrt(2.5).
    low, high = t_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.7764451 * (2.5 / 5) ** 0.5
    assert (low, high) == (pytest.approx(3.0 - half), pytest.approx(3.0 + half))
    assert t_interval([1.0]) is None
    assert t_interval([]) is None
    assert t_interval([2.0, 2.0, 2.0]) == (2.0, 2.0)
    with pytest.raises(ValueError, match="expected finite numbers"):
        t_interval([1.0, float("nan")])
