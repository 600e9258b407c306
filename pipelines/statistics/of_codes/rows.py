"""What rows there are, whatever fires in them."""

from __future__ import annotations

from typing import Self

import numpy as np

from pipelines.statistics.block import CodeBlock
from pipelines.statistics.statistic import Arrays, DenseStatistic, Extent


class RowCounts(DenseStatistic):
    """Rows by number of active features (L0), token, position, document and part."""

    name = "rows"
    arrays = tuple(f"rows/{array}" for array in ("active", "tokens", "positions", "documents", "parts"))

    def __init__(self, k: int, n_vocabulary: int, context: int, n_documents: int, n_parts: int):
        self.active = np.zeros(k + 1, np.int64)
        self.tokens = np.zeros(n_vocabulary, np.int64)
        self.positions = np.zeros(context, np.int64)
        self.documents = np.zeros(n_documents, np.int64)
        self.parts = np.zeros(n_parts, np.int64)

    @classmethod
    def make(cls, extent: Extent) -> Self:
        return cls(extent.k, extent.n_vocabulary, extent.context, extent.n_documents, extent.n_parts)

    def update(self, block: CodeBlock) -> None:
        self.active += np.bincount((block.values > 0).sum(axis=1), minlength=len(self.active))
        for name in ("tokens", "positions", "documents", "parts"):
            own = getattr(self, name)
            own += np.bincount(getattr(block, name), minlength=len(own))

    def merge(self, other: RowCounts) -> RowCounts:
        for name, own in vars(self).items():
            own += getattr(other, name)
        return self

    def finalize(self) -> Arrays:
        """active (k + 1,), tokens (vocabulary,), positions (context,), documents, parts: rows of each kind."""
        return {f"rows/{name}": counts for name, counts in vars(self).items()}
