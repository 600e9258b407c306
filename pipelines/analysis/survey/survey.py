"""All statistics of `analyze` at once: what one task computes of one shard."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipelines.statistics import CodeBlock, FeatureCounts, FiringTable, RowCounts, SampledExamples, TopExamples
from pipelines.statistics.tables import N_BINS, value_bins

T = TypeVar("T")
KEPT = ("top", "random")
TABLES = ("tokens", "positions", "parts", "documents", "bins")


@dataclass(frozen=True)
class Extent:
    """How many there are of everything that is counted."""

    n_features: int
    k: int
    n_vocabulary: int
    context: int
    n_documents: int
    n_parts: int

    def columns(self, table: str) -> int:
        return {
            "tokens": self.n_vocabulary,
            "positions": self.context,
            "parts": self.n_parts,
            "documents": self.n_documents,
            "bins": N_BINS,
        }[table]


class Survey:
    """Dense counts, small; and by feature kept examples and sparse tables of firings, which grow with the corpus."""

    def __init__(self, extent: Extent, n_examples: int, n_random: int, seed: int):
        self.counts = FeatureCounts(extent.n_features)
        self.rows = RowCounts(extent.k, extent.n_vocabulary, extent.context, extent.n_documents, extent.n_parts)
        self.top = TopExamples(n_examples)
        self.random = SampledExamples(n_random, seed)
        self.tables = {
            name: FiringTable(extent.n_features, extent.columns(name), has_totals=name == "tokens") for name in TABLES
        }

    def update(self, block: CodeBlock) -> None:
        for statistic in (self.counts, self.rows, self.top, self.random):
            statistic.update(block)
        row, feature, value = block.firings
        for name, table in self.tables.items():
            table.update(feature, value_bins(value) if name == "bins" else getattr(block, name)[row], value)

    def merge(self, other: Survey) -> Survey:
        self.counts.merge(other.counts)
        self.rows.merge(other.rows)
        for kind in KEPT:
            getattr(self, kind).merge(getattr(other, kind))
        for name, table in other.tables.items():
            self.tables[name].merge(table)
        return self

    def take_arrays(self) -> dict[str, NDArray[Any]]:
        """One-dimensional arrays that say all of it; kept examples and tables feature by feature, which are forgotten here,
        one after another: both forms of all of them at once would be a task's largest memory."""
        arrays = {"n_rows": np.array([self.counts.n_rows])}
        arrays |= {f"counts/{name}": getattr(self.counts, name) for name in ("fires", "total", "peak")}
        arrays |= {f"rows/{name}": counts for name, counts in self.rows.finalize().items()}
        for kind in KEPT:
            columns = getattr(self, kind).finalize()
            getattr(self, kind).clear()
            arrays |= {f"{kind}/{name}": column for name, column in columns.items()}
            features = np.arange(len(self.counts.fires) + 1)
            arrays[f"{kind}/starts"] = np.searchsorted(columns["feature"], features).astype(np.int64)
        for name, table in self.tables.items():
            counts, total = table.finalize()
            table.clear()
            arrays |= {f"{name}/starts": counts.indptr.astype(np.int64), f"{name}/columns": counts.indices.astype(np.uint32)}
            arrays |= {f"{name}/count": counts.data.astype(np.uint32), f"{name}/total": total}
        return arrays

    def load_dense(self, read: Any) -> Survey:
        """The dense counts, as `read(name)` gives the arrays of `take_arrays`; what is kept by feature stays empty."""
        self.counts.n_rows = int(read("n_rows")[0])
        for name in ("fires", "total", "peak"):
            setattr(self.counts, name, read(f"counts/{name}"))
        for name in self.rows.finalize():
            setattr(self.rows, name, read(f"rows/{name}"))
        return self


def merged(left: T, right: T) -> T:
    """`left.merge(right)` of a copy: a task whose worker died may be run again on the same inputs."""
    merge: Any = deepcopy(left)
    return merge.merge(right)
