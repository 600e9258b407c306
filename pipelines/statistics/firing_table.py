"""Firings by feature and by a property of their row or of themselves: a sorted list of (feature, column) with a count."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray


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
