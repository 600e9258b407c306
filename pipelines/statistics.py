"""Statistics of codes as mergeable values: `update(block)`, `merge(other)`, `finalize()`.

The same object serves a loop over shards, a Dask tree and a test. Counts are exact integers and do not depend on
how the work was split; sums are float64, and equal for equal trees of merges.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

BANDS = ("always", "common", "rare", "very rare", "dead")
"""By firing frequency: > 90 %, (10, 90], (1, 10], (0, 1], and never."""


@dataclass(frozen=True)
class CodeBlock:
    """Some rows' codes, and where each row stands.

    `indices` and `values` (n, k), values 0 where nothing fires; `tokens` (n,) token ids; `windows` (n,) a number
    that is unique to each window over the whole store; `positions` (n,) place in the window.
    """

    n_features: int
    n_vocabulary: int
    indices: NDArray[np.int64]
    values: NDArray[np.float32]
    tokens: NDArray[np.int64]
    windows: NDArray[np.int64]
    positions: NDArray[np.int64]

    @cached_property
    def firings(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
        """(row, feature, value) of every code above zero, row after row."""
        row, slot = np.nonzero(self.values > 0)
        return row, self.indices[row, slot], self.values[row, slot]


class FeatureCounts:
    """How often each feature fires, and how strongly when it does."""

    def __init__(self, n_features: int):
        self.n_rows = 0
        self.fires = np.zeros(n_features, np.int64)
        self.total = np.zeros(n_features, np.float64)
        self.peak = np.zeros(n_features, np.float32)

    def update(self, block: CodeBlock) -> None:
        _, feature, value = block.firings
        self.n_rows += len(block.indices)
        self.fires += np.bincount(feature, minlength=len(self.fires))
        self.total += np.bincount(feature, weights=value, minlength=len(self.fires))
        np.maximum.at(self.peak, feature, value)

    def merge(self, other: FeatureCounts) -> FeatureCounts:
        self.n_rows += other.n_rows
        self.fires += other.fires
        self.total += other.total
        np.maximum(self.peak, other.peak, out=self.peak)
        return self

    def finalize(self) -> dict[str, NDArray[Any]]:
        """(F,) arrays: fires, frequency (share of rows), mean (over its firings, 0 when dead), peak."""
        return {
            "fires": self.fires,
            "frequency": self.fires / max(self.n_rows, 1),
            "mean": self.total / np.maximum(self.fires, 1),
            "peak": self.peak,
        }


class CoOccurrence:
    """In how many rows each pair of features fires together: exact counts, the upper triangle of BᵀB."""

    def __init__(self, n_features: int):
        self.counts = sp.csr_array((n_features, n_features), dtype=np.int64)

    def update(self, block: CodeBlock) -> None:
        row, feature, _ = block.firings
        fired = sp.csr_array((np.ones(len(row), np.int64), (row, feature)), shape=(len(block.indices), block.n_features))
        self.counts = self.counts + sp.triu(fired.T @ fired, k=1, format="csr")

    def merge(self, other: CoOccurrence) -> CoOccurrence:
        self.counts = self.counts + other.counts
        return self

    def finalize(self) -> sp.csr_array:
        """(F, F) CSR of int64, pairs i < j, column indices sorted."""
        self.counts.sort_indices()
        return self.counts


class TokenFirings:
    """On which tokens each feature fires: counts and sums of values, (F, vocabulary) CSR; and every token's rows."""

    def __init__(self, n_features: int, n_vocabulary: int):
        self.counts = sp.csr_array((n_features, n_vocabulary), dtype=np.int64)
        self.totals = sp.csr_array((n_features, n_vocabulary), dtype=np.float64)
        self.token_rows = np.zeros(n_vocabulary, np.int64)

    def update(self, block: CodeBlock) -> None:
        row, feature, value = block.firings
        place = (feature, block.tokens[row])
        self.counts = self.counts + sp.csr_array((np.ones(len(row), np.int64), place), shape=self.counts.shape)
        self.totals = self.totals + sp.csr_array((value.astype(np.float64), place), shape=self.totals.shape)
        self.token_rows += np.bincount(block.tokens, minlength=len(self.token_rows))

    def merge(self, other: TokenFirings) -> TokenFirings:
        self.counts = self.counts + other.counts
        self.totals = self.totals + other.totals
        self.token_rows += other.token_rows
        return self

    def finalize(self) -> tuple[sp.csr_array, sp.csr_array, NDArray[np.int64]]:
        self.counts.sort_indices()
        self.totals.sort_indices()
        return self.counts, self.totals, self.token_rows


class TopExamples:
    """Each feature's `n` strongest firings, at most one a window; ties go to the earlier window and position.

    Rows are (feature, value, window, position). Any order of merging gives the same result: a firing among the n
    best of the whole is among the n best of its own block.
    """

    def __init__(self, n: int):
        self.n = n
        self.feature = np.empty(0, np.int64)
        self.value = np.empty(0, np.float32)
        self.window = np.empty(0, np.int64)
        self.position = np.empty(0, np.int64)

    def update(self, block: CodeBlock) -> None:
        row, feature, value = block.firings
        self._keep(feature, value, block.windows[row], block.positions[row])

    def merge(self, other: TopExamples) -> TopExamples:
        self._keep(other.feature, other.value, other.window, other.position)
        return self

    def finalize(self) -> dict[str, NDArray[Any]]:
        """Columns of equal length, by feature, then by falling value."""
        return {"feature": self.feature, "value": self.value, "window": self.window, "position": self.position}

    def _keep(
        self, feature: NDArray[np.int64], value: NDArray[np.float32], window: NDArray[np.int64], position: NDArray[np.int64]
    ) -> None:
        feature = np.concatenate([self.feature, feature])
        value = np.concatenate([self.value, value])
        window = np.concatenate([self.window, window])
        position = np.concatenate([self.position, position])
        order = np.lexsort((position, -value, window, feature))
        is_first = np.ones(len(order), bool)
        is_first[1:] = (np.diff(feature[order]) != 0) | (np.diff(window[order]) != 0)
        chosen = order[is_first]
        chosen = chosen[np.lexsort((window[chosen], -value[chosen], feature[chosen]))]
        starts = np.searchsorted(feature[chosen], feature[chosen])
        chosen = chosen[np.arange(len(chosen)) - starts < self.n]
        self.feature, self.value = feature[chosen], value[chosen]
        self.window, self.position = window[chosen], position[chosen]


class Survey:
    """All statistics of `analyze` at once: what one task computes of one shard."""

    def __init__(self, n_features: int, n_vocabulary: int, n_examples: int):
        self.counts = FeatureCounts(n_features)
        self.pairs = CoOccurrence(n_features)
        self.tokens = TokenFirings(n_features, n_vocabulary)
        self.examples = TopExamples(n_examples)

    def update(self, block: CodeBlock) -> None:
        for statistic in (self.counts, self.pairs, self.tokens, self.examples):
            statistic.update(block)

    def merge(self, other: Survey) -> Survey:
        self.counts.merge(other.counts)
        self.pairs.merge(other.pairs)
        self.tokens.merge(other.tokens)
        self.examples.merge(other.examples)
        return self


def frequency_bands(fires: NDArray[np.int64], n_rows: int) -> dict[str, int]:
    """How many features lie in each band; the bands sum to the number of features. Compares integers, not ratios.

    >>> frequency_bands(np.array([0, 1, 10, 11, 100, 101, 900, 901, 1000]), 1000)
    {'always': 2, 'common': 2, 'rare': 2, 'very rare': 2, 'dead': 1}
    """
    per_cent = fires * 100
    counts = [
        int((per_cent > 90 * n_rows).sum()),
        int(((per_cent > 10 * n_rows) & (per_cent <= 90 * n_rows)).sum()),
        int(((per_cent > n_rows) & (per_cent <= 10 * n_rows)).sum()),
        int(((fires > 0) & (per_cent <= n_rows)).sum()),
        int((fires == 0).sum()),
    ]
    return dict(zip(BANDS, counts, strict=True))
