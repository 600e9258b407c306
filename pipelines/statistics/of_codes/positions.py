"""Firings of each feature at each position of a window."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipelines.statistics.block import CodeBlock
from pipelines.statistics.firings_by import FiringsBy
from pipelines.statistics.statistic import Extent


class PositionFirings(FiringsBy):
    """(F, context)."""

    name = "positions"

    @classmethod
    def n_columns(cls, extent: Extent) -> int:
        return extent.context

    def column(self, block: CodeBlock) -> NDArray[np.int64]:
        return block.positions[block.firings[0]]
