"""p-values, false discovery rates and effect sizes, each against its definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pipelines.structure.significance import (
    DrawMoments,
    NullFit,
    fit_null,
    independence_fit,
    judge,
    tail_probabilities,
)


@given(seed=st.integers(0, 2**32 - 1), cut=st.integers(0, 30))
@settings(max_examples=30, deadline=None)
def test_moments_are_numpys_and_any_merge_gives_the_same_integers(seed: int, cut: int) -> None:
    counts = np.random.default_rng(seed).poisson(50, (30, 7))
    parts = [DrawMoments(7), DrawMoments(7)]
    for number, row in enumerate(counts):
        parts[number >= cut].update(row)
    merged = parts[1].merge(parts[0])
    assert np.array_equal(merged.total, counts.sum(axis=0))
    assert np.array_equal(merged.squares, (counts**2).sum(axis=0))
    mean, variance = merged.finalize()
    np.testing.assert_allclose(mean, counts.mean(axis=0))
    np.testing.assert_allclose(variance, counts.var(axis=0, ddof=1))


LAWS = [stats.poisson(7.3), stats.binom(40, 0.2), stats.binom(400, 0.03), stats.nbinom(9, 0.4), stats.nbinom(3.5, 0.2)]


@pytest.mark.parametrize("law", LAWS, ids=["poisson", "binomial", "rare binomial", "negative binomial", "real size"])
def test_tails_are_those_of_the_law_with_the_same_moments(law: stats.rv_discrete_frozen) -> None:
    counts = np.arange(0, 30)
    mean, variance = (np.full(30, float(value)) for value in law.stats("mv"))
    at_most, at_least = tail_probabilities(counts, mean, variance)
    np.testing.assert_allclose(at_most, law.cdf(counts), rtol=1e-6, atol=1e-12)
    upper = law.sf(counts - 1)
    if variance[0] < mean[0]:  # a binomial's upper tail is no less than a normal's
        upper = np.where(counts > 0, np.maximum(upper, stats.norm.sf((counts - 0.5 - mean) / np.sqrt(variance))), 1)
    np.testing.assert_allclose(at_least, upper, rtol=1e-6, atol=1e-12)


def test_the_far_tail_of_dense_features_is_not_cut_off() -> None:
    """Two features in 50 of 100 rows each can fire together 35 times, though the binomial with these moments ends at 33."""
    law = stats.hypergeom(100, 50, 50)
    mean, variance = (np.full(4, float(value)) for value in (law.mean(), law.var()))
    counts = np.array([30, 33, 35, 38])
    _, at_least = tail_probabilities(counts, mean, variance)
    exact = law.sf(counts - 1)
    assert ((exact / 2 < at_least) & (at_least < 5 * exact)).all()


def test_variances_are_shrunk_towards_the_prior_ones_by_as_much_as_they_differ_by_chance() -> None:
    rng = np.random.default_rng(0)
    prior = rng.uniform(5, 50, 3000)
    moments = DrawMoments(3000)
    for _ in range(40):
        moments.update(np.round(rng.normal(1e4, 10 * np.sqrt(2 * prior))).astype(np.int64))
    drawn = moments.finalize()[1]
    fit = fit_null(moments, 100 * prior)
    true = 200 * prior
    assert fit.degrees > 500  # nothing but chance sets them apart: nearly all weight is on the prior's shape
    assert np.abs(fit.variance / true - 1).max() < 0.15 < np.abs(drawn / true - 1).max()


def test_variances_of_their_own_are_kept() -> None:
    rng = np.random.default_rng(0)
    own = rng.uniform(100, 10_000, 2000)
    moments = DrawMoments(2000)
    for _ in range(100):
        moments.update(np.round(rng.normal(1e4, np.sqrt(own))).astype(np.int64))
    fit = fit_null(moments, np.ones(2000))
    assert fit.degrees < 110
    assert np.corrcoef(np.log(fit.variance), np.log(own))[0, 1] > 0.95


def test_p_values_of_null_counts_are_uniform_and_q_is_benjamini_and_hochbergs() -> None:
    rng = np.random.default_rng(1)
    mean = np.exp(rng.uniform(np.log(5), np.log(5000), 20_000))
    null = NullFit(mean, mean, 1e6, 10**9)
    counts = rng.poisson(mean)
    judged = judge(counts, null, 5)
    assert judged.tested.all()
    for bound in (0.5, 0.1, 0.01, 0.001):
        share = (judged.p <= bound).mean()
        assert share <= bound + 3 * math.sqrt(bound / 20_000)  # a discrete law's p-values are no smaller than uniform ones
        assert share > 0.3 * bound
    assert judged.called(0.01).sum() == 0
    counts[:100] = (mean[:100] + 8 * np.sqrt(mean[:100]) + 10).astype(np.int64)
    judged = judge(counts, null, 5)
    order = np.argsort(judged.p)
    raw = judged.p[order] * 20_000 / np.arange(1, 20_001)
    np.testing.assert_allclose(judged.q[order], np.minimum(np.minimum.accumulate(raw[::-1])[::-1], 1))
    assert judged.called(0.01)[:100].all()
    assert judged.called(0.01).sum() <= 105


def test_few_degrees_of_freedom_and_few_draws_make_p_values_larger_never_smaller() -> None:
    counts, mean = np.array([40, 10]), np.array([20.0, 20.0])
    sure = judge(counts, NullFit(mean, mean, 1e6, 10**9), 5).p
    for degrees, draws in ((20.0, 10**9), (1e6, 20), (20.0, 20)):
        assert (judge(counts, NullFit(mean, mean, degrees, draws), 5).p > sure).all()


def test_counts_with_a_small_expectation_are_not_tested() -> None:
    judged = judge(np.array([100, 100]), NullFit(np.array([4.9, 5.0]), np.array([4.9, 5.0]), 1e6, 10**9), 5)
    assert judged.tested.tolist() == [False, True]
    assert judged.called(0.01).tolist() == [False, True]
    assert judged.p[0] == judged.q[0] == 1


def test_independence_is_the_hypergeometric_law_over_all_rows() -> None:
    fit = independence_fit(np.array([30]), np.array([50]), 200)
    law = stats.hypergeom(200, 30, 50)
    assert fit.mean[0] == pytest.approx(law.mean())
    assert fit.variance[0] == pytest.approx(law.var())
