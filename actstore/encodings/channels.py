"""Means and deviations of a site's channels: what int8 measures rows by."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CHANNEL_WINDOWS = 256
"""Channels are measured on this many windows, the first of the plan."""


@dataclass(frozen=True)
class Channels:
    """Mean and deviation (d_model,) of each channel, fixed for a segment."""

    mean: NDArray[np.float32]
    deviation: NDArray[np.float32]

    @classmethod
    def of_moments(cls, mean: NDArray[np.float64], second: NDArray[np.float64]) -> Channels:
        """From the mean and the second moment of some rows; a channel that does not vary gets deviation 1."""
        deviation = np.sqrt(np.maximum(second - np.square(mean), 0)).astype(np.float32)
        return cls(mean.astype(np.float32), np.where(deviation > 0, deviation, np.float32(1)))

    @classmethod
    def from_table(cls, table: NDArray[np.float32]) -> Channels:
        return cls(table[0], table[1])

    @property
    def table(self) -> NDArray[np.float32]:
        """(2, d_model): as a store keeps them."""
        return np.stack([self.mean, self.deviation])
