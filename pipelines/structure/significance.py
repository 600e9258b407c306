"""Is a count more than chance gives? Moments over draws, p-values, false discovery rates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

TINY = 1e-300


class DrawMoments:
    """Sums of counts, and of their squares, over draws of the null: integers, so that no order of merging changes them."""

    def __init__(self, n: int):
        self.n_draws = 0
        self.total = np.zeros(n, np.int64)
        self.squares = np.zeros(n, np.int64)

    def update(self, counts: NDArray[np.int64]) -> None:
        self.n_draws += 1
        self.total += counts
        self.squares += counts * counts

    def merge(self, other: DrawMoments) -> DrawMoments:
        self.n_draws += other.n_draws
        self.total += other.total
        self.squares += other.squares
        return self

    def finalize(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(mean, unbiased variance) over the draws. The numerator of the variance is an exact integer."""
        n = self.n_draws
        numerator = n * self.squares - self.total * self.total
        return self.total / n, numerator / (n * max(n - 1, 1))


@dataclass(frozen=True)
class NullFit:
    """What the null says of each count: mean, variance, and the degrees of freedom with which the variance is known."""

    mean: NDArray[np.float64]
    variance: NDArray[np.float64]
    degrees: float
    n_draws: int


def fit_null(moments: DrawMoments, prior_variance: NDArray[np.float64]) -> NullFit:
    """Mean over the draws; variance over them, shrunk towards a multiple of `prior_variance`.

    A hundred draws determine a variance to 14 %, which is too coarse for p-values of 1e-8. The ratios of the drawn variances
    to the prior ones are therefore taken to have a scaled inverse chi-square law, whose scale and degrees of freedom are
    fitted to all of them at once (Smyth 2004, doi:10.2202/1544-6115.1027), and each variance is their weighted mean.
    """
    mean, variance = moments.finalize()
    degrees = moments.n_draws - 1
    usable = (variance > 0) & (prior_variance > 0)
    if usable.sum() < 2 or degrees < 2:
        return NullFit(mean, np.maximum(variance, prior_variance), float(max(degrees, 1)), moments.n_draws)
    logs = np.log(variance[usable] / prior_variance[usable]) - special.digamma(degrees / 2) + np.log(degrees / 2)
    excess = logs.var(ddof=1) - float(special.polygamma(1, degrees / 2))
    if excess > 1e-6:
        prior_degrees = 2 * _trigamma_inverse(excess)
        scale = np.exp(logs.mean() + special.digamma(prior_degrees / 2) - np.log(prior_degrees / 2))
    else:
        prior_degrees, scale = 1e6, np.exp(logs.mean())
    shrunk = (prior_degrees * scale * prior_variance + degrees * variance) / (prior_degrees + degrees)
    return NullFit(mean, shrunk, prior_degrees + degrees, moments.n_draws)


def _trigamma_inverse(value: float) -> float:
    """x with trigamma(x) = value, by Newton's method on 1/trigamma, which is convex (Smyth 2004, appendix)."""
    x = 0.5 + 1 / value
    for _ in range(50):
        trigamma = float(special.polygamma(1, x))
        step = trigamma * (1 - trigamma / value) / float(special.polygamma(2, x))
        x += step
        if abs(step) < 1e-8 * x:
            break
    return x


def tail_probabilities(
    counts: NDArray[np.int64], mean: NDArray[np.float64], variance: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(P(X <= count), P(X >= count)) of the binomial, Poisson or negative binomial with these moments.

    Which of the three is a matter of the variance: below, at or above the mean. All three are continuous in their
    parameters through the incomplete beta and gamma functions. A binomial with the moments of a sum of hypergeometric
    counts ends too early where both features are dense; its upper tail is no less than a normal's here.
    """
    real = np.asarray(counts, np.float64)
    ratio = variance / mean
    with np.errstate(divide="ignore", invalid="ignore"):
        p_low = np.clip(1 - ratio, 0, 1 - 1e-9)  # binomial: success probability, number of trials
        trials = mean / p_low
        size = mean / (ratio - 1)  # negative binomial
        p_high = (ratio - 1) / ratio

    def at_least(count: NDArray[np.float64]) -> NDArray[np.float64]:
        with np.errstate(divide="ignore", invalid="ignore"):
            binomial = np.where(count > trials, 0.0, special.betainc(count, np.maximum(trials - count + 1, TINY), p_low))
            negative = special.betainc(count, size, p_high)
        normal = special.ndtr((mean - count + 0.5) / np.sqrt(variance))
        upper = np.where(ratio > 1 + 1e-6, negative, special.gammainc(count, mean))
        return np.where(count <= 0, 1.0, np.where(ratio < 1 - 1e-6, np.maximum(binomial, normal), upper))

    def at_most(count: NDArray[np.float64]) -> NDArray[np.float64]:
        above = count + 1
        with np.errstate(divide="ignore", invalid="ignore"):
            binomial = np.where(above > trials, 1.0, special.betaincc(above, np.maximum(trials - count, TINY), p_low))
            negative = special.betaincc(above, size, p_high)
        return np.where(ratio < 1 - 1e-6, binomial, np.where(ratio > 1 + 1e-6, negative, special.gammaincc(above, mean)))

    return at_most(real), at_least(real)


@dataclass(frozen=True)
class Judged:
    """Counts against the null: two-sided p (1 where not tested), its q, and which counts are tested at all."""

    tested: NDArray[np.bool_]
    p: NDArray[np.float64]
    q: NDArray[np.float64]
    z: NDArray[np.float64]
    lift: NDArray[np.float64]

    def called(self, q: float) -> NDArray[np.bool_]:
        return self.tested & (self.q <= q)


def judge(counts: NDArray[np.int64], null: NullFit, min_expectation: float) -> Judged:
    """Two-sided p-values of counts with an expectation of at least `min_expectation`, and Benjamini-Hochberg's q over them.

    The variance is that of a new draw from a mean known by `n_draws` only. Each p-value's normal quantile is read on
    Student's t with the degrees of freedom that the variance has, which matters in the far tail.
    """
    tested = (null.mean >= min_expectation) & (null.variance > 0)
    p, z = np.ones(len(counts)), np.zeros(len(counts))
    mean = null.mean[tested]
    variance = null.variance[tested] * (1 + 1 / null.n_draws)
    low, high = tail_probabilities(counts[tested], mean, variance)
    p[tested] = np.minimum(1.0, 2 * _with_degrees(np.minimum(low, high), null.degrees))
    z[tested] = (counts[tested] - mean) / np.sqrt(variance)
    q = np.ones(len(counts))
    if tested.any():
        q[tested] = stats.false_discovery_control(p[tested], method="bh")
    return Judged(tested, p, q, z, counts / np.maximum(null.mean, TINY))


def _with_degrees(p: NDArray[np.float64], degrees: float) -> NDArray[np.float64]:
    small = p < 0.5
    quantile = special.ndtri_exp(np.log(np.maximum(p[small], TINY)))
    adjusted = p.copy()
    adjusted[small] = special.stdtr(degrees, quantile)
    return np.maximum(adjusted, p)


def independence_fit(left: NDArray[np.int64], right: NDArray[np.int64], n_rows: int) -> NullFit:
    """The wrong null: both features' rows drawn on their own over all rows (hypergeometric). For comparison only."""
    a, b = left.astype(np.float64), right.astype(np.float64)
    variance = a * b * (n_rows - a) * (n_rows - b) / (float(n_rows) ** 2 * max(n_rows - 1, 1))
    return NullFit(a * b / n_rows, variance, 1e6, 1 << 40)
