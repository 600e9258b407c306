"""Running sums of a site's rows: what its commit records say of them, and what int8 measures them by."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore.codecs import Channels


class Moments:
    """Sums over rows of `d_model` channels, in float64.

    >>> moments = Moments(d_model=2)
    >>> moments.update(np.array([[3, 4], [0, 0]], np.float32))
    >>> moments.record()
    {'mean': [1.5, 2.0], 'second_moment': [4.5, 8.0], 'mean_norm': 2.5}
    """

    def __init__(self, d_model: int):
        self.total = np.zeros(d_model)
        self.squares = np.zeros(d_model)
        self.norms = 0.0
        self.n_rows = 0

    def update(self, rows: NDArray[np.float32]) -> None:
        """Add rows (n, d_model)."""
        own = rows.astype(np.float64)
        squares = own * own
        self.total += own.sum(axis=0)
        self.squares += squares.sum(axis=0)
        self.norms += float(np.sqrt(squares.sum(axis=1)).sum())
        self.n_rows += len(rows)

    def record(self) -> dict[str, Any]:
        """What a commit record says of these rows, of which there is at least one."""
        return {
            "mean": (self.total / self.n_rows).tolist(),
            "second_moment": (self.squares / self.n_rows).tolist(),
            "mean_norm": self.norms / self.n_rows,
        }

    def channels(self) -> Channels:
        """Mean and deviation of each channel; 0 and 1 where there were no rows."""
        n_rows = max(self.n_rows, 1)
        return Channels.of_moments(self.total / n_rows, self.squares / n_rows)
