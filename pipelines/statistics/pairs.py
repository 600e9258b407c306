"""In how many rows each pair of features fires together: exact counts of some features against all.

Work is rows · k², not rows · F². The rows in which each feature fires are listed once, feature after feature; then, a few
thousand firings at a time, the codes of their rows are gathered (each row is k contiguous numbers) and added into the rows
of the result that belong to their features: a piece and the rows it adds to stay in a core's cache, and a piece is one
call, however many features it touches. Each feature's counts are of the smallest type that can hold them.

Measured in one run of `benchmarks/analyze.py` (F = 24,576, k = 32, Zipf codes, 1M rows, one thread): 500,000 rows/s, 28
times a scipy sparse product BᵀB; a dense one on two threads does 161 rows/s.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.sparse import _sparsetools

PIECE_CODES = 1 << 16
"""Codes gathered at a time: they and their counts stay in a core's own cache."""


def firings_of(codes: NDArray[Any], n_features: int) -> sp.csr_array:
    """(F, n) the rows in which each feature fires, of codes (n, k); feature F is none.

    >>> firings_of(np.array([[0, 2], [2, 3]]), 3).toarray().tolist()
    [[1, 0], [0, 0], [1, 1]]
    """
    row_starts = np.arange(len(codes) + 1, dtype=np.int32 if codes.size < 1 << 31 else np.int64) * codes.shape[1]
    entries = (np.ones(codes.size, np.uint8), codes.reshape(-1), row_starts)
    by_feature = sp.csr_array(entries, shape=(len(codes), n_features + 1)).tocsc()
    starts = by_feature.indptr[:-1]
    return firing_lists(by_feature.indices[: starts[-1]], starts, len(codes))


def firing_lists(rows: NDArray[np.integer], starts: NDArray[np.integer], n_rows: int) -> sp.csr_array:
    """(features, n_rows) the rows in which each feature fires: of feature i, rows[starts[i]:starts[i + 1]]."""
    return sp.csr_array((np.ones(len(rows), np.uint8), rows, starts), shape=(len(starts) - 1, n_rows))


def marked_codes(indices: NDArray[Any], fired: NDArray[np.bool_] | None, n_features: int) -> NDArray[Any]:
    """(n, k) indices of what fires (None: all of them), and feature F where nothing does: all that counting needs.

    >>> marked_codes(np.array([[0, 2]]), np.array([[True, False]]), 3).tolist()
    [[0, 3]]
    """
    dtype = np.min_scalar_type(n_features)
    codes = np.asarray(indices, dtype)
    return codes if fired is None else np.where(fired, codes, dtype.type(n_features))


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
    codes = marked_codes(indices, fired, n_features)
    tile = PairTile(start, n_features, np.full(max(stop - start, 0), len(indices)))
    tile.add(codes, firings_of(codes, n_features)[tile.start : tile.stop])
    return tile.rows()


def count_type(largest: int) -> np.dtype[np.unsignedinteger]:
    """The smallest unsigned type, of 8 to 64 bits, that holds a count: no pair has more rows than its rarer feature.

    >>> [count_type(n).itemsize for n in (255, 256, 65_536, 1 << 32)]
    [1, 2, 4, 8]
    """
    return np.min_scalar_type(largest)


def count_bytes(largest: NDArray[np.integer]) -> NDArray[np.int64]:
    """The bytes of `count_type` of each number.

    >>> count_bytes(np.array([255, 256, 65_536, 1 << 32])).tolist()
    [1, 2, 4, 8]
    """
    ends = [np.iinfo(f"u{n}").max for n in (1, 2, 4)]
    return np.left_shift(1, np.searchsorted(np.array(ends), largest)).astype(np.int64)


class PairTile:
    """Counts of some consecutive features against all, to which rows are added block by block; holds no F x F.

    Each block goes once through the memory of all counts: few large ones are faster.

    `largest` (n,) says of each feature from `start` on how often it can count with any other: its firings in all rows that
    are added, or more. A feature alone that needs a wide type leaves the others' counts narrow.
    """

    def __init__(self, start: int, n_features: int, largest: NDArray[np.integer]):
        self.start, self.stop, self.n_features = start, start + len(largest), n_features
        widths = count_bytes(largest)
        self._order = np.argsort(widths, kind="stable")  # features by (width, number)
        self._rank = np.argsort(self._order)
        self._edges = np.searchsorted(widths[self._order], [1, 2, 4, 8, 9])
        # one more column takes the codes that do not count
        n_columns = n_features + 1
        self._parts = [np.zeros((n, n_columns), f"u{1 << i}") for i, n in enumerate(np.diff(self._edges).tolist())]

    def plus(self, other: PairTile) -> PairTile:
        """The counts of this and of other rows, of the same features."""
        total: PairTile = object.__new__(PairTile)
        total.__dict__.update(self.__dict__)
        total._parts = [mine + others for mine, others in zip(self._parts, other._parts, strict=True)]
        return total

    def rows(self, first: int = 0, last: int | None = None) -> NDArray[Any]:
        """(last - first, F) counts of these features of the tile, a copy, of the widest of their types."""
        ranks = self._rank[first:last]
        kinds = np.searchsorted(self._edges, ranks, side="right") - 1
        dense = np.empty((len(ranks), self.n_features), f"u{1 << int(kinds.max(initial=0))}")
        for kind in set(kinds.tolist()):
            mine = kinds == kind
            dense[mine] = self._parts[kind][ranks[mine] - self._edges[kind], :-1]
        return dense

    def add_counts(self, counts: NDArray[Any]) -> None:
        """Add counts (n, F) that were found in another way."""
        kinds = np.searchsorted(self._edges, self._rank, side="right") - 1
        for kind, part in enumerate(self._parts):
            part[:, :-1] += counts[kinds == kind].astype(part.dtype)

    def add(self, codes: NDArray[Any], firings: sp.csr_array) -> None:
        """Count, for each firing of a feature of the tile, the features of its row of `codes` (n, k), but for feature F.

        `firings` (features of the tile, n) say in which rows each of them fires.
        """
        codes = np.require(codes, requirements=["C", "A"])  # of anything else, `take` copies all for every piece
        by_rank = firings[self._order]
        rows, starts = by_rank.indices, by_rank.indptr.astype(np.int64)
        piece_rows = max(1, PIECE_CODES // max(codes.shape[1], 1))
        piece = np.empty((piece_rows, codes.shape[1]), codes.dtype)
        columns = np.empty(piece.shape, np.int32)
        for part, low, high in zip(self._parts, self._edges[:-1], self._edges[1:], strict=True):
            ones = np.ones(piece.size, part.dtype)
            for first in range(int(starts[low]), int(starts[high]), piece_rows):
                n = min(piece_rows, int(starts[high]) - first)
                np.take(codes, rows[first : first + n], axis=0, out=piece[:n], mode="clip")  # "raise" copies once more
                columns[:n] = piece[:n]
                touched = slice(
                    int(np.searchsorted(starts, first, side="right")) - 1, int(np.searchsorted(starts, first + n))
                )
                bounds = np.clip(starts[touched.start : touched.stop + 1] - first, 0, n) * codes.shape[1]
                _add_rows(part[touched.start - low : touched.stop - low], bounds, columns, ones)


def _add_rows(counts: NDArray[Any], bounds: NDArray[np.int64], columns: NDArray[np.int32], ones: NDArray[Any]) -> None:
    """counts[i, c] += 1 for every c of columns[bounds[i]:bounds[i + 1]].

    This is how scipy makes a CSR matrix dense, without the zeros that `toarray(out=...)` writes first. `np.add.at` needs
    indices of 8 bytes and a call for each feature: the form that used it counted 176,000 to 210,000 rows/s where this one
    counts 400,000. The function is scipy's own, not its public interface: test_pairs.py would tell of a change.
    """
    n_rows, n_columns = counts.shape
    _sparsetools.csr_todense(n_rows, n_columns, bounds.astype(np.int32), columns.reshape(-1), ones, counts)
