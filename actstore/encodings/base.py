"""What an encoding is: it turns float32 rows into what Zarr stores, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore.encodings.channels import Channels
from actstore.errors import EncodingError

Rows = NDArray[np.float32]


@dataclass(frozen=True)
class Encoding:
    """One way to keep a row. This one keeps values as they are; others override `keep` and `decode`."""

    name: str
    """The encoding's name in a manifest."""
    dtype: str
    """The dtype on disk; empty where each array states its own."""
    compressed: bool
    """Whether chunks are compressed."""
    largest: float = float("inf")
    """The largest magnitude that is kept."""
    needs_channels: bool = False
    """Whether rows are measured by the channels' means and deviations, which each segment then keeps in a table."""
    has_scale: bool = False
    """Whether a scale of each row is kept beside the row."""
    float_dtype: str | None = None
    """The float type whose bits are kept, such as bfloat16: rows can be handed out as kept. None: rows are computed."""
    is_exact: bool = False
    """Whether decoding gives exactly the rows that the model gave."""
    offered: int | None = None
    """The place among the encodings that are offered for activations; None: not offered."""

    @property
    def itemsize(self) -> int:
        """Bytes one value takes before compression."""
        return np.dtype(self.dtype).itemsize

    @property
    def is_alone(self) -> bool:
        """Whether kept rows and nothing else are enough to decode them."""
        return not (self.needs_channels or self.has_scale)

    def encode(self, rows: Rows, channels: Channels | None = None) -> tuple[NDArray[Any], Rows | None]:
        """float32 rows (n, d_model) as they are kept, and each row's scale (n,) where there is one.

        Raises EncodingError on a non-finite value, or one beyond `largest` (65,504 under fp16); the message names the
        first such value and its channel, the error its row, so that the caller can say which token it was.
        """
        if not (rows.size == 0 or max(rows.max(), -rows.min()) <= self.largest):  # a NaN compares false
            raise self.does_not_fit(rows, np.abs(rows) <= self.largest)
        if self.needs_channels and channels is None:
            raise ValueError(f"{self.name} needs the channels' means and deviations")
        return self.keep(rows, channels)

    def keep(self, rows: Rows, channels: Channels | None) -> tuple[NDArray[Any], Rows | None]:
        """`encode`, for rows whose values are in range; `channels` are given where `needs_channels`."""
        return rows, None

    def decode(
        self,
        kept: NDArray[Any],
        scale: Rows | None = None,
        channels: Channels | None = None,
        out: Rows | None = None,
    ) -> NDArray[Any]:
        """What `encode` kept, as float32: in `out` when given and values are computed from kept rows alone."""
        return kept

    def does_not_fit(self, rows: Rows, fits: NDArray[np.bool_]) -> EncodingError:
        """The error that names the first value of (n, d_model) rows that does not fit."""
        row, channel = (int(i) for i in np.argwhere(~fits)[0])
        value = rows[row, channel]
        remedy = "bf16 keeps up to 3.39e38, fp32 any finite value." if np.isfinite(value) else "the model gave it."
        return EncodingError(f"value {value} in channel {channel} does not fit {self.name}; {remedy}", row)
