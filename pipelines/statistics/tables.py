"""Firings by feature and by a property of their row (token, document, position, part) or of themselves (strength).

One sparse table serves all of these: a sorted list of (feature, column) with a count, and the sum of values if wanted.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

BINS_PER_OCTAVE = 16
"""Of activations: the bin of a value is its float32 exponent and the first four bits of its mantissa."""
_SHIFT = 23 - (BINS_PER_OCTAVE.bit_length() - 1)
N_BINS = 1 << (32 - 1 - _SHIFT)


class FiringTable:
    """How often each feature fires with each column, and (with `has_totals`) the sum of its values there."""

    def __init__(self, n_features: int, n_columns: int, *, has_totals: bool = False):
        self.n_features, self.n_columns, self.has_totals = n_features, max(n_columns, 1), has_totals
        self.key = np.empty(0, np.int64)
        self.count = np.empty(0, np.int64)
        self.total = np.empty(0, np.float64)
        self._waiting: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]] = []

    def update(self, feature: NDArray[np.int64], column: NDArray[np.int64], value: NDArray[np.float32]) -> None:
        """Add firings, one an entry."""
        key = feature * self.n_columns + column
        if not self.has_totals:
            keys, counts = _runs(np.sort(key))
            self._add(keys, counts, np.empty(0))
            return
        order = stable_order(feature, column)
        keys, counts = _runs(key[order])
        totals = np.add.reduceat(value[order].astype(np.float64), np.cumsum(counts) - counts) if len(keys) else np.empty(0)
        self._add(keys, counts, totals)

    def merge(self, other: FiringTable) -> FiringTable:
        self._add(*other._settled())
        return self

    def clear(self) -> None:
        """Forget all firings."""
        self.__init__(self.n_features, self.n_columns, has_totals=self.has_totals)  # type: ignore[misc]

    def add_rows(
        self,
        features: slice,
        starts: NDArray[np.int64],
        columns: NDArray[Any],
        count: NDArray[Any],
        total: NDArray[np.float64],
    ) -> None:
        """Add a table of the features of a slice in CSR form, as `finalize` gives it."""
        feature = np.repeat(np.arange(features.start, features.stop), np.diff(starts))
        self._add(feature * self.n_columns + columns, count.astype(np.int64), total)

    def finalize(self, start: int = 0, stop: int | None = None) -> tuple[sp.csr_array, NDArray[np.float64]]:
        """Counts of the features [start, stop) as (stop - start, columns) CSR of int64, and the totals of its entries."""
        stop = self.n_features if stop is None else stop
        self._settled()
        first, last = np.searchsorted(self.key, [start * self.n_columns, stop * self.n_columns])
        feature, column = np.divmod(self.key[first:last], self.n_columns)
        starts = np.searchsorted(feature, np.arange(start, stop + 1))
        counts = sp.csr_array((self.count[first:last], column, starts), shape=(stop - start, self.n_columns))
        return counts, self.total[first:last]

    def _add(self, key: NDArray[np.int64], count: NDArray[np.int64], total: NDArray[np.float64]) -> None:
        """Entries wait until they are as many as the table has: each is then sorted in a logarithm of times."""
        self._waiting.append((key, count, total))
        if sum(len(waiting[0]) for waiting in self._waiting) > len(self.key):
            self._settled()

    def _settled(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
        pieces = [(self.key, self.count, self.total), *self._waiting] if len(self.key) else self._waiting
        self._waiting = []
        if len(pieces) == 1 and pieces[0][0] is not self.key:
            self.key, self.count, self.total = pieces[0]
        elif len(pieces) > 1:
            key, count, total = (np.concatenate(columns) for columns in zip(*pieces, strict=True))
            order = np.argsort(key, kind="stable")  # merges runs that are sorted already
            self.key, lengths = _runs(key[order])
            starts = np.cumsum(lengths) - lengths
            self.count = np.add.reduceat(count[order], starts) if len(starts) else count
            if self.has_totals:
                self.total = np.add.reduceat(total[order], starts) if len(starts) else total
        return self.key, self.count, self.total


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
    found = np.full((counts.shape[0], len(quantiles)), -1, np.int64)
    running = np.cumsum(counts.data)
    before = np.concatenate([[0], running])[counts.indptr]
    fires = np.diff(before)
    live = fires > 0
    for i, quantile in enumerate(quantiles):
        rank = np.maximum(np.ceil(quantile * fires).astype(np.int64), 1)
        entry = np.searchsorted(running, (before[:-1] + rank)[live], side="left")
        found[live, i] = counts.indices[entry]
    return found


def _runs(ordered: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(distinct values, how often each) of a sorted array."""
    starts = np.flatnonzero(np.concatenate([np.ones(len(ordered[:1]), bool), ordered[1:] != ordered[:-1]]))
    return ordered[starts], np.diff(starts, append=len(ordered))


def stable_order(*keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """`np.lexsort(keys[::-1])` of non-negative integers, by radix passes of 16 bits, several times as fast."""
    order = np.arange(len(keys[0]))
    for key in reversed(keys):
        bits = int(key.max(initial=0)).bit_length()
        for shift in range(0, bits, 16):
            digits = ((key >> shift) & 0xFFFF).astype(np.uint16)
            order = order[np.argsort(digits[order], kind="stable")]
    return order
