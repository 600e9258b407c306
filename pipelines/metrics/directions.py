"""Comparisons of directions: cosines of two sets, best matches, one-to-one matchings, and random directions for chance.

Directions are rows (F, d) of any norm but 0.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

BLOCK_COSINES = 1 << 24
MOST_MATCHED = 8192
"""At most this many features are matched one to one: the assignment takes F³ time and a dense F² matrix."""

Floats = NDArray[np.float32]


def unit_rows(directions: NDArray[np.floating]) -> Floats:
    """The same directions with norm 1."""
    wide = directions.astype(np.float64)
    return np.asarray(wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-30), np.float32)


def random_directions(n: int, d_model: int, seed: int) -> Floats:
    """(n, d) unit vectors, drawn uniformly from the sphere."""
    return unit_rows(np.random.default_rng(seed).standard_normal((n, d_model)))


def best_cosines(one: Floats, other: Floats) -> tuple[Floats, NDArray[np.int64]]:
    """For each unit row of `one`: its largest cosine with a row of `other`, and that row's index (the first of equals)."""
    best, which = np.empty(len(one), np.float32), np.empty(len(one), np.int64)
    block_rows = max(1, BLOCK_COSINES // max(len(other), 1))
    for start in range(0, len(one), block_rows):
        block = one[start : start + block_rows] @ other.T
        which[start : start + block_rows] = block.argmax(axis=1)
        best[start : start + block_rows] = block.max(axis=1)
    return best, which


def match_one_to_one(similarity: Floats) -> NDArray[np.int64]:
    """(F,) the partner of each row, -1 for none, in the one-to-one matching with the largest sum (Kuhn 1955).

    >>> match_one_to_one(np.array([[0.9, 0.8], [0.8, 0.1], [0.0, 0.0]], np.float32)).tolist()
    [1, 0, -1]
    """
    row, column = linear_sum_assignment(similarity, maximize=True)
    partner = np.full(len(similarity), -1, np.int64)
    partner[row] = column
    return partner


def all_pairs(directions: Floats, bins: NDArray[np.floating]) -> tuple[NDArray[np.int64], Floats]:
    """Absolute cosines of unit rows: how many pairs i < j lie in each bin, and each row's largest with another row."""
    n = len(directions)
    counts, largest = np.zeros(len(bins) - 1, np.int64), np.zeros(n, np.float32)
    block_rows = max(1, BLOCK_COSINES // max(n, 1))
    for start in range(0, n, block_rows):
        block = np.abs(directions[start : start + block_rows] @ directions.T)
        row = np.arange(len(block))
        block[row, start + row] = -1.0
        largest[start : start + block_rows] = block.max(axis=1)
        above = np.arange(n) > start + row[:, None]
        counts += np.histogram(np.minimum(block[above], 1.0), bins=bins)[0]
    return counts, largest
