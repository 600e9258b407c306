"""The strongest firings of each feature, to be looked at."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from pipelines.statistics.block import CodeBlock
from pipelines.statistics.firing_table import stable_order
from pipelines.statistics.kept_firings import KeptFirings, firing_columns, is_new, ordered_firings
from pipelines.statistics.statistic import Extent


class TopExamples(KeptFirings):
    """Each feature's `n` strongest firings, at most one a window; ties go to the earlier window and position.

    Any order of merging gives the same result: a firing among the n best of the whole is among the n best of its own
    block.
    """

    name = "top"

    @classmethod
    def make(cls, extent: Extent) -> Self:
        return cls(extent.n_examples)

    def update(self, block: CodeBlock) -> None:
        row, feature, value = ordered_firings(block)
        order = stable_order(feature)
        window = block.windows[row[order]]
        starts = np.flatnonzero(is_new(feature[order], window))
        if not len(starts):
            return
        strongest = np.maximum.reduceat(value[order], starts)
        at_peak = np.flatnonzero(value[order] == np.repeat(strongest, np.diff(starts, append=len(order))))
        first = order[at_peak[np.searchsorted(at_peak, starts)]]
        first = first[np.argsort(row[first], kind="stable")]
        self._add(**firing_columns(block, row[first], feature[first], value[first], _falling(value[first])))

    def _keep(self, **columns: NDArray[Any]) -> None:
        order = stable_order(*(columns[name] for name in ("feature", "window", "rank", "position")))
        best = order[is_new(columns["feature"][order], columns["window"][order])]
        super()._keep(**{name: column[best] for name, column in columns.items()})


def _falling(value: NDArray[np.float32]) -> NDArray[np.int64]:
    """A rank that is smaller for a larger value: positive floats sort as their bits do."""
    return 0x7FFFFFFF - value.view(np.uint32).astype(np.int64)
