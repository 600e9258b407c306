"""A statistic of firings by feature and by one property of the firing or of its row: one subclass a property."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar, Self

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from pipelines.statistics.block import CodeBlock
from pipelines.statistics.firing_table import FiringTable
from pipelines.statistics.statistic import Arrays, Extent, Tile, TiledStatistic


class FiringsBy(TiledStatistic):
    """A sparse table (F, columns) of firings, written tile by tile as CSR; a subclass says which column a firing is of.

    With `has_totals` the table has the sum of the values of each entry's firings beside their number.
    """

    columns: ClassVar[tuple[str, ...]] = ("columns", "count")
    writes_table = True
    has_totals: ClassVar[bool] = False

    def __init__(self, n_features: int, n_columns: int):
        self.table = FiringTable(n_features, n_columns, has_totals=self.has_totals)

    @classmethod
    def make(cls, extent: Extent) -> Self:
        return cls(extent.n_features, cls.n_columns(extent))

    @abstractmethod
    def column(self, block: CodeBlock) -> NDArray[np.int64]:
        """The column of each of the block's firings."""

    def update(self, block: CodeBlock) -> None:
        _, feature, value = block.firings
        self.table.update(feature, self.column(block), value)

    def merge(self, other: FiringsBy) -> FiringsBy:
        self.table.merge(other.table)
        return self

    def take(self, n_features: int) -> Arrays:
        counts, total = self.table.finalize()
        self.table.clear()
        arrays: Arrays = {"starts": counts.indptr.astype(np.int64), "columns": counts.indices.astype(np.uint32)}
        return arrays | {"count": counts.data.astype(np.uint32)} | ({"total": total} if self.has_totals else {})

    def add(self, features: slice, parts: Iterable[Arrays]) -> None:
        for part in parts:
            total = part["total"] if self.has_totals else np.empty(0)
            self.table.add_rows(features, part["starts"], part["columns"], part["count"], total)

    def tile(self, features: slice) -> Tile:
        counts, total = self.table.finalize(features.start, features.stop)
        arrays = csr_arrays(counts, self.table.n_columns) if self.writes_table else {}
        return Tile(arrays | ({"total": total} if self.has_totals else {}), self.facts(counts))

    def facts(self, counts: sp.csr_array) -> Arrays:
        """What a tile says of its features, of whose firings `counts` (features, columns) are all."""
        return {}


def csr_arrays(counts: Any, n_columns: int) -> Arrays:
    """A tile's rows as they are kept: starts, columns and counts, the last two of the smallest type that holds them."""
    return {
        "starts": counts.indptr.astype(np.int64),
        "columns": counts.indices.astype(np.min_scalar_type(n_columns - 1)),
        "count": counts.data.astype(np.min_scalar_type(int(counts.data.max(initial=0)))),
    }
