"""In how many documents each feature fires, and whether its firings keep to few of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from pipelines.statistics.block import CodeBlock
from pipelines.statistics.firings_by import FiringsBy
from pipelines.statistics.statistic import FEATURES, Arrays, Extent


class DocumentFirings(FiringsBy):
    """(F, documents) while it is counted. Two numbers a feature are written, not the table, which grows with the corpus."""

    name = "documents"
    arrays = (f"{FEATURES}/n_documents", f"{FEATURES}/burstiness")
    writes_table = False

    @classmethod
    def n_columns(cls, extent: Extent) -> int:
        return extent.n_documents

    def column(self, block: CodeBlock) -> NDArray[np.int64]:
        return block.documents[block.firings[0]]

    def facts(self, counts: sp.csr_array) -> Arrays:
        """`n_documents` in which each feature fires; `same_document` ordered pairs of its firings inside one document."""
        inside = np.concatenate([[0], np.cumsum(counts.data * (counts.data - 1))])
        same_document = inside[counts.indptr[1:]] - inside[counts.indptr[:-1]]
        return {"n_documents": np.diff(counts.indptr).astype(np.int64), "same_document": same_document}

    def feature_arrays(self, facts: Arrays, dense: Mapping[str, Any]) -> Arrays:
        bursts = burstiness(facts["same_document"], dense["counts"].fires, dense["rows"].documents)
        return dict(zip(self.arrays, (facts["n_documents"], bursts), strict=True))


def burstiness(
    same_document: NDArray[np.int64], fires: NDArray[np.int64], document_rows: NDArray[np.int64]
) -> NDArray[np.float64]:
    """P(two rows of one document both fire) / P(two rows of the corpus both fire), over ordered pairs of different rows.

    1 where documents make no difference. `same_document` (F,) is the sum over documents of c (c - 1), c firings in it. NaN
    for a feature with fewer than two firings, and when no document has two rows.
    """
    n_rows = int(document_rows.sum())
    pairs_inside = float((document_rows * (document_rows - 1)).sum())
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(
            (same_document / pairs_inside) / (fires.astype(np.float64) * (fires - 1) / (n_rows * (n_rows - 1.0)))
        )
