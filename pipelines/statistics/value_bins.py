"""Bins of activations, exact functions of a value's bits, and quantiles counted in them."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

BINS_PER_OCTAVE = 16
"""The bin of an activation is its float32 exponent and the first four bits of its mantissa."""
_SHIFT = 23 - (BINS_PER_OCTAVE.bit_length() - 1)
N_BINS = 1 << (32 - 1 - _SHIFT)


def value_bins(values: NDArray[np.float32]) -> NDArray[np.int64]:
    """The bin of each positive value, 16 an octave, of equal width inside each octave: an exact function of its bits.

    >>> value_bins(np.array([1.0, 1.05, 1.07, 2.0], np.float32)).tolist()
    [2032, 2032, 2033, 2048]
    """
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> _SHIFT).astype(np.int64)


def bin_edges(bins: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The smallest value of each bin and of the next: a bin is at most 1/16 of its lower edge wide.

    >>> [edge.tolist() for edge in bin_edges(np.array([2032]))]
    [[1.0], [1.0625]]
    """
    low = (np.asarray(bins).astype(np.uint32) << _SHIFT).view(np.float32)
    high = ((np.asarray(bins).astype(np.uint32) + np.uint32(1)) << _SHIFT).view(np.float32)
    return low, high


def quantile_bins(counts: sp.csr_array, quantiles: tuple[float, ...]) -> NDArray[np.int64]:
    """(F, quantiles) the bin in which each quantile of a feature's activations lies, -1 when it never fires.

    The q-quantile is the smallest value with at least ceil(q n) of the n firings at or below it (inverse of the empirical
    distribution), so its bin is exact.
    """
    bins = np.full((counts.shape[0], len(quantiles)), -1, np.int64)
    running = np.cumsum(counts.data)
    before = np.concatenate([[0], running])[counts.indptr]
    fires = np.diff(before)
    live = fires > 0
    for i, quantile in enumerate(quantiles):
        rank = np.maximum(np.ceil(quantile * fires).astype(np.int64), 1)
        entry = np.searchsorted(running, (before[:-1] + rank)[live], side="left")
        bins[live, i] = counts.indices[entry]
    return bins
