"""Firings of each feature on each token, and the sum of its values there."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipelines.statistics.block import CodeBlock
from pipelines.statistics.firings_by import FiringsBy
from pipelines.statistics.statistic import Extent


class TokenFirings(FiringsBy):
    """(F, vocabulary)."""

    name = "tokens"
    columns = ("columns", "count", "total")
    has_totals = True

    @classmethod
    def n_columns(cls, extent: Extent) -> int:
        return extent.n_vocabulary

    def column(self, block: CodeBlock) -> NDArray[np.int64]:
        return block.tokens[block.firings[0]]
