"""How often and how strongly each feature fires, and what rows there are: dense counts."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.statistics.block import CodeBlock

BANDS = ("always", "common", "rare", "very rare", "dead")
"""By firing frequency: > 90 %, (10, 90], (1, 10], (0, 1], and never."""


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


class RowCounts:
    """What rows there are, whatever fires: by number of active features (L0), token, position, document and part."""

    def __init__(self, k: int, n_vocabulary: int, context: int, n_documents: int, n_parts: int):
        self.active = np.zeros(k + 1, np.int64)
        self.tokens = np.zeros(n_vocabulary, np.int64)
        self.positions = np.zeros(context, np.int64)
        self.documents = np.zeros(n_documents, np.int64)
        self.parts = np.zeros(n_parts, np.int64)

    def update(self, block: CodeBlock) -> None:
        self.active += np.bincount((block.values > 0).sum(axis=1), minlength=len(self.active))
        for name in ("tokens", "positions", "documents", "parts"):
            own = getattr(self, name)
            own += np.bincount(getattr(block, name), minlength=len(own))

    def merge(self, other: RowCounts) -> RowCounts:
        for name, own in vars(self).items():
            own += getattr(other, name)
        return self

    def finalize(self) -> dict[str, NDArray[np.int64]]:
        """active (k + 1,), tokens (vocabulary,), positions (context,), documents, parts: rows of each kind."""
        return dict(vars(self))


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
