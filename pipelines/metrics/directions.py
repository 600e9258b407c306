"""Directions compared: cosines of two sets, the best match of each, one-to-one matchings, and what chance gives.

Directions are rows (F, d) of any length but 0.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

BLOCK_COSINES = 1 << 24
MOST_MATCHED = 8192
"""Features that are matched one to one, at most: the assignment takes F³ time and a dense F² matrix."""

Floats = NDArray[np.float32]


def unit_rows(directions: NDArray[np.floating]) -> Floats:
    """The same directions with norm 1."""
    wide = directions.astype(np.float64)
    return np.asarray(wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-30), np.float32)


def random_directions(n: int, d_model: int, seed: int) -> Floats:
    """(n, d) unit vectors, uniform on the sphere."""
    return unit_rows(np.random.default_rng(seed).standard_normal((n, d_model)))


def best_cosines(one: Floats, other: Floats) -> tuple[Floats, NDArray[np.int64]]:
    """For each unit row of `one`, its largest cosine with a row of `other`, and with which (the first of equals)."""
    best, which = np.empty(len(one), np.float32), np.empty(len(one), np.int64)
    size = max(1, BLOCK_COSINES // max(len(other), 1))
    for start in range(0, len(one), size):
        block = one[start : start + size] @ other.T
        which[start : start + size] = block.argmax(axis=1)
        best[start : start + size] = block.max(axis=1)
    return best, which


def match_one_to_one(similarity: Floats) -> NDArray[np.int64]:
    """(F,) the partner of each row, -1 for none: the one-to-one matching with the largest sum (Kuhn 1955).

    >>> match_one_to_one(np.array([[0.9, 0.8], [0.8, 0.1], [0.0, 0.0]], np.float32)).tolist()
    [1, 0, -1]
    """
    row, column = linear_sum_assignment(similarity, maximize=True)
    partner = np.full(len(similarity), -1, np.int64)
    partner[row] = column
    return partner


def all_pairs(directions: Floats, bins: NDArray[np.floating]) -> tuple[NDArray[np.int64], Floats]:
    """(how many pairs i < j of unit rows have an absolute cosine in each bin, the largest of each row with another one)."""
    n = len(directions)
    counts, largest = np.zeros(len(bins) - 1, np.int64), np.zeros(n, np.float32)
    size = max(1, BLOCK_COSINES // max(n, 1))
    for start in range(0, n, size):
        block = np.abs(directions[start : start + size] @ directions.T)
        own = np.arange(len(block))
        block[own, start + own] = -1.0
        largest[start : start + size] = block.max(axis=1)
        above = np.arange(n) > start + own[:, None]
        counts += np.histogram(np.minimum(block[above], 1.0), bins=bins)[0]
    return counts, largest
