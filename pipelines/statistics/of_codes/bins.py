"""Firings of each feature by strength, and quantiles of its activations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from pipelines.statistics.block import CodeBlock
from pipelines.statistics.firings_by import FiringsBy
from pipelines.statistics.statistic import FEATURES, Arrays, Extent
from pipelines.statistics.value_bins import N_BINS, quantile_bins, value_bins

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class StrengthFirings(FiringsBy):
    """(F, bins) by the bin of the value, 16 an octave; and (F, quantiles) the bin of each quantile, -1 when dead."""

    name = "bins"
    arrays = (f"{FEATURES}/quantile_bins",)

    @classmethod
    def n_columns(cls, extent: Extent) -> int:
        return N_BINS

    def column(self, block: CodeBlock) -> NDArray[np.int64]:
        return value_bins(block.firings[2])

    def facts(self, counts: sp.csr_array) -> Arrays:
        return {"quantile_bins": quantile_bins(counts, QUANTILES).ravel()}

    def feature_arrays(self, facts: Arrays, dense: Mapping[str, Any]) -> Arrays:
        return {self.arrays[0]: facts["quantile_bins"].reshape(-1, len(QUANTILES)).astype(np.int16)}
