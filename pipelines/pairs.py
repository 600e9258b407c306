"""In how many rows each pair of features fires together: exact counts of some features against all.

Work is rows · k², not rows · F². The codes are brought into the order of features once; for each feature, the codes of
the rows in which it fires are gathered (each row is k contiguous numbers) and counted into the feature's own row of the
result, which fits in a core's cache. Measured beside it in one run (F = 24,576, k = 32, Zipf codes, one thread; see
`benchmarks/analyze.py`): a sparse product BᵀB takes ten times as long, a dense one thousands of times.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK_CODES = 1 << 23
"""Codes brought into order at a time: bounds memory (about 30 bytes each while they are sorted)."""
PIECE_CODES = 1 << 15
"""Codes gathered at a time: they and their counts stay in a core's own cache."""


def pair_counts(
    indices: NDArray[Any], fired: NDArray[np.bool_] | None, n_features: int, features: slice
) -> NDArray[np.unsignedinteger]:
    """(len(features), F): the rows in which feature a of the slice and feature b both fire; at a = b, those in which a does.

    `indices` (n, k) are each row's features, of any integer type; `fired` (n, k) says which of them count, None for all.
    What counts must be different features in each row. Both triangles are there, for the features of the slice.

    >>> pair_counts(np.array([[0, 2], [2, 1], [2, 0]]), None, 3, slice(1, 3)).tolist()
    [[0, 1, 1], [2, 1, 3]]
    """
    start, stop, _ = features.indices(n_features)
    tile = PairTile(start, stop, n_features, count_type(len(indices)))
    tile.add(indices, fired)
    return tile.counts


def count_type(largest: int) -> np.dtype[np.unsignedinteger]:
    """The smallest unsigned type, of 8 to 64 bits, that holds a count: no pair has more rows than its rarer feature.

    >>> [count_type(n).itemsize for n in (255, 256, 65_536, 1 << 32)]
    [1, 2, 4, 8]
    """
    return np.min_scalar_type(largest)


class PairTile:
    """Counts of the features [start, stop) against all, to which rows are added block by block; holds no F x F."""

    def __init__(self, start: int, stop: int, n_features: int, dtype: np.dtype[Any]):
        self.start, self.stop, self.n_features = start, stop, n_features
        # one more column takes the codes that do not count
        self._counts = np.zeros((max(stop - start, 0), n_features + 1), dtype)

    @property
    def counts(self) -> NDArray[Any]:
        """(stop - start, F), a view."""
        return self._counts[:, :-1]

    def add(
        self,
        indices: NDArray[Any],
        fired: NDArray[np.bool_] | None = None,
        near: tuple[NDArray[Any], NDArray[np.bool_]] | None = None,
    ) -> None:
        """Count the rows of codes (n, k); see `pair_counts`.

        `near` is another (indices, fired), each (n, K): what counts as together with a row, instead of the row itself.
        """
        n_rows, k = (indices if near is None else near[0]).shape
        block_rows = max(1, BLOCK_CODES // max(k, 1))
        for row in range(0, n_rows, block_rows):
            rows = slice(row, row + block_rows)
            own = self._marked(indices[rows], None if fired is None else fired[rows])
            self._add_block(own, own if near is None else self._marked(near[0][rows], near[1][rows]))

    def _marked(self, indices: NDArray[Any], fired: NDArray[np.bool_] | None) -> NDArray[Any]:
        """Codes that do not count become feature F."""
        if fired is None or fired.all():
            return np.ascontiguousarray(indices)
        return np.where(fired, indices, np.min_scalar_type(self.n_features).type(self.n_features))

    def _add_block(self, codes: NDArray[Any], others: NDArray[Any]) -> None:
        rows, starts = self._by_feature(codes)
        piece_rows = max(1, PIECE_CODES // others.shape[1])
        piece = np.empty((piece_rows, others.shape[1]), others.dtype)
        columns = np.empty(piece.shape, np.intp)
        ones = np.ones(piece.size, self._counts.dtype)
        bounds = starts.tolist()
        for feature in np.flatnonzero(np.diff(starts)).tolist():
            for first in range(bounds[feature], bounds[feature + 1], piece_rows):
                n = min(piece_rows, bounds[feature + 1] - first)
                np.take(others, rows[first : first + n], axis=0, out=piece[:n], mode="clip")  # "raise" copies once more
                columns[:n] = piece[:n]
                # numpy's fast path, 1.2 ns a count, wants indices in intp and ones of the counts' own type
                np.add.at(self._counts[feature], columns[:n].reshape(-1), ones[: n * others.shape[1]])

    def _by_feature(self, codes: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(rows, starts): the rows in which feature start + i fires are rows[starts[i]:starts[i + 1]]."""
        flat = codes.reshape(-1)
        n = self.stop - self.start
        place = np.flatnonzero((flat >= self.start) & (flat < self.stop))
        local = (flat[place] - flat.dtype.type(self.start)).astype(np.min_scalar_type(max(n - 1, 0)))
        order = np.argsort(local, kind="stable")  # a radix sort for up to 16 bits
        starts = np.zeros(n + 1, np.int64)
        np.cumsum(np.bincount(local, minlength=n), out=starts[1:])
        return place[order] // codes.shape[1], starts
