"""Some rows' codes, and where each row stands: what every statistic is updated with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class CodeBlock:
    """Rows of codes, in any order.

    `indices` and `values` (n, k), values 0 where nothing fires; for each row `tokens` (n,) its token id, `windows` a number
    that is unique to each window over the whole store, `positions` its place in the window, `documents` the number of its
    document over the whole store, `parts` that of the corpus part its document belongs to.
    """

    n_features: int
    indices: NDArray[Any]
    values: NDArray[np.float32]
    tokens: NDArray[np.int64]
    windows: NDArray[np.int64]
    positions: NDArray[np.int64]
    documents: NDArray[np.int64]
    parts: NDArray[np.int64]

    @cached_property
    def firings(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
        """(row, feature, value) of every code above zero, row after row."""
        row, slot = np.nonzero(self.values > 0)
        return row, self.indices[row, slot].astype(np.int64), self.values[row, slot]

    @cached_property
    def rows_are_sorted(self) -> bool:
        """Whether rows lie in (window, position) order, as they do in a code store."""
        step, place = np.diff(self.windows), np.diff(self.positions)
        return bool(((step > 0) | ((step == 0) & (place > 0))).all())
