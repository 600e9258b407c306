"""Firings of each feature in each part of the corpus."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipelines.statistics.block import CodeBlock
from pipelines.statistics.firings_by import FiringsBy
from pipelines.statistics.statistic import Extent


class PartFirings(FiringsBy):
    """(F, parts)."""

    name = "parts"

    @classmethod
    def n_columns(cls, extent: Extent) -> int:
        return extent.n_parts

    def column(self, block: CodeBlock) -> NDArray[np.int64]:
        return block.parts[block.firings[0]]
