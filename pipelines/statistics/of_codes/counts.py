"""How often each feature fires, and how strongly when it does."""

from __future__ import annotations

from typing import Self

import numpy as np

from pipelines.statistics.block import CodeBlock
from pipelines.statistics.statistic import FEATURES, Arrays, DenseStatistic, Extent


class FeatureCounts(DenseStatistic):
    """`n_rows`, and of each feature (F,) the rows in which it fires, the sum of its values and the largest."""

    name = "counts"
    arrays = tuple(f"{FEATURES}/{array}" for array in ("fires", "frequency", "mean", "peak"))

    def __init__(self, n_features: int):
        self.n_rows = 0
        self.fires = np.zeros(n_features, np.int64)
        self.total = np.zeros(n_features, np.float64)
        self.peak = np.zeros(n_features, np.float32)

    @classmethod
    def make(cls, extent: Extent) -> Self:
        return cls(extent.n_features)

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

    def finalize(self) -> Arrays:
        """(F,) arrays: fires, frequency (share of rows), mean (over its firings, 0 when dead), peak."""
        frequency, mean = self.fires / max(self.n_rows, 1), self.total / np.maximum(self.fires, 1)
        return dict(zip(self.arrays, (self.fires, frequency, mean, self.peak), strict=True))
