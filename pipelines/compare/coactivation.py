"""Co-activation of two SAEs' features over the same rows: correlation of activations, overlap of firings."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

BLOCK_FEATURES = 1024


def correlations(a: sp.csc_array, b: sp.csc_array) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(Pearson correlation of activations, Jaccard index of firings), each (F, G), of the columns of (n, F) and (n, G).

    A column that does not vary has correlation 0 with everything.
    """
    n = a.shape[0]
    means, norms, fires = [], [], []
    for x in (a, b):
        exact = x.astype(np.float64)
        mean = np.asarray(exact.sum(axis=0)).ravel() / n
        square = np.asarray(exact.multiply(exact).sum(axis=0)).ravel()
        variance = np.maximum(square - n * np.square(mean), 0)
        means.append(mean)
        norms.append(np.sqrt(np.where(variance > 1e-12 * square, variance, 0)))
        fires.append(np.diff(exact.indptr))
    products = (a.astype(np.float64).T @ b.astype(np.float64)).toarray() - n * np.outer(*means)
    scale = np.outer(*norms)
    both = ((a > 0).astype(np.float64).T @ (b > 0).astype(np.float64)).toarray()
    either = np.maximum(np.add.outer(*fires) - both, 1)
    correlation = np.where(scale > 0, products / np.where(scale > 0, scale, 1), 0)
    return np.clip(correlation, -1, 1).astype(np.float32), (both / either).astype(np.float32)


def best_correlations(
    a: sp.csc_array, b: sp.csc_array
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
    """For each column of `a` (n, F): its largest correlation with one of `b` (n, G), its largest Jaccard index, and the
    column of the former."""
    best, jaccard = np.zeros(a.shape[1], np.float32), np.zeros(a.shape[1], np.float32)
    which = np.full(a.shape[1], -1, np.int64)
    if not b.shape[1]:
        return best, jaccard, which
    for start in range(0, a.shape[1], BLOCK_FEATURES):
        mine = slice(start, start + BLOCK_FEATURES)
        correlation, overlap = correlations(a[:, mine], b)
        best[mine], which[mine], jaccard[mine] = correlation.max(axis=1), correlation.argmax(axis=1), overlap.max(axis=1)
    return best, jaccard, which
