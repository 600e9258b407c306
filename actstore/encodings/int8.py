"""int8: deviations from the channels' means, in units of the channels' deviations, as multiples of a scale of each row."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore.encodings.base import Encoding, Rows
from actstore.encodings.channels import Channels

FLOAT32 = np.finfo(np.float32)
STEPS, STEPS_PER_RMS = 127, 29
FURTHEST = 1e16
"""The largest deviation from a channel's mean; the mean square of a larger one would overflow."""


class Int8(Encoding):
    """(n, d) multiples of each row's scale, and the scales (n,).

    A scale is as fine as 127 steps allow, but no finer than a 29th of the row's root mean square: an error of
    1 / 29² / 12 = 1e-4 of the variance, and at most log2(29 sqrt(2πe)) = 6.9 bits a value when compressed.
    """

    def keep(self, rows: Rows, channels: Channels | None) -> tuple[NDArray[Any], Rows | None]:
        assert channels is not None
        with np.errstate(over="ignore"):
            standard = (rows - channels.mean) / channels.deviation
        largest = np.abs(standard).max(axis=1)
        if not (largest <= FURTHEST).all():
            raise self.does_not_fit(rows, np.abs(standard) <= FURTHEST)
        root_mean_square = np.sqrt(np.square(standard).mean(axis=1))
        scale = np.maximum(largest / np.float32(STEPS), root_mean_square / np.float32(STEPS_PER_RMS))
        scale[scale < FLOAT32.tiny] = 1  # a scale below that would have no precision left
        return np.rint(standard / scale[:, None]).astype(np.int8), scale

    def decode(
        self, kept: NDArray[Any], scale: Rows | None = None, channels: Channels | None = None, out: Rows | None = None
    ) -> NDArray[Any]:
        if scale is None or channels is None:
            raise ValueError("int8 needs the rows' scales and the channels' means and deviations")
        rows = kept.astype(np.float32)
        rows *= scale[:, None]
        rows *= channels.deviation
        rows += channels.mean
        return rows


ENCODING = Int8(
    "int8",
    "int8",
    compressed=True,
    largest=float(FLOAT32.max) / 4,  # so that differences from a mean are in range, too
    needs_channels=True,
    has_scale=True,
    offered=4,
)
