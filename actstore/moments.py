"""Sums over a site's rows: the statistics in records, and the channel means and deviations of int8."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore.encodings.channels import Channels


class RowMoments:
    """Sums over rows of `d_model` channels, in float64.

    >>> moments = RowMoments(d_model=2)
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


@dataclass(frozen=True)
class SiteStatistics:
    """A site's rows as the model gave them: how many, mean and second moment (d_model,), mean Euclidean norm."""

    n_rows: int
    mean: NDArray[np.float64]
    second_moment: NDArray[np.float64]
    mean_norm: float

    @classmethod
    def of_records(cls, records: Iterable[tuple[int, Mapping[str, Any]]]) -> SiteStatistics:
        """From pairs of a number of rows and what `RowMoments.record` said of them."""
        total, mean, second, norm = 0, np.zeros(0), np.zeros(0), 0.0
        for n_rows, own in records:
            weight = n_rows / (total + n_rows)
            own_mean, own_second = np.asarray(own["mean"]), np.asarray(own["second_moment"])
            mean = own_mean if not total else mean + (own_mean - mean) * weight
            second = own_second if not total else second + (own_second - second) * weight
            norm += (own["mean_norm"] - norm) * weight
            total += n_rows
        return cls(total, mean, second, norm)

    @property
    def deviation(self) -> NDArray[np.float64]:
        """(d_model,) standard deviation of each channel."""
        return np.sqrt(np.maximum(self.second_moment - np.square(self.mean), 0))
