"""How a row is kept: fp32, fp16, bf16, int8, and the plain integers of tables and codes.

An encoding turns float32 rows into what Zarr stores, and back. fp16 and fp32 are stored raw, since compressing
fp16 without loss saves 7 to 14 % and costs more time than reading it; bf16 is stored as uint16 (Zarr has no
bfloat16) and compressed; int8 keeps each row's deviations from the channels' means, in units of their deviations,
as multiples of a scale of the row's own, and is compressed. Every chunk of every array ends in a crc32c.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore.errors import EncodingError

Rows = NDArray[np.float32]

FLOAT32 = np.finfo(np.float32)
LARGEST = {
    "fp32": float(FLOAT32.max),
    "fp16": 65504.0,
    "bf16": float.fromhex("0x1.fep127"),
    "int8": float(FLOAT32.max) / 4,  # so that differences from a mean are in range, too
}
"""The largest magnitude each encoding of activations keeps."""
INT8_STEPS, INT8_STEPS_PER_RMS = 127, 29
INT8_FURTHEST = 1e16
"""Deviations from a channel's mean: what is further away has no place in the row's mean square."""
FP16_BLOCK_ROWS = 256


@dataclass(frozen=True)
class Encoding:
    """One way to keep a row: its name in a manifest, the dtype on disk, and whether chunks are compressed."""

    name: str
    dtype: str
    compressed: bool

    @property
    def itemsize(self) -> int:
        """Bytes one value takes before compression."""
        return np.dtype(self.dtype).itemsize


ENCODINGS = {
    encoding.name: encoding
    for encoding in (
        Encoding("fp32", "float32", compressed=False),
        Encoding("fp16", "float16", compressed=False),
        Encoding("bf16", "uint16", compressed=True),
        Encoding("int8", "int8", compressed=True),
        Encoding("raw", "", compressed=False),
        Encoding("packed", "", compressed=True),
    )
}
ACTIVATION_ENCODINGS = ("fp16", "fp32", "bf16", "int8")
"""What `collect --encoding` offers; `raw` and `packed` keep integer and code arrays as they are."""


@dataclass(frozen=True)
class Channels:
    """What int8 measures rows by: mean and deviation (d_model,) of each channel, fixed for a segment."""

    mean: Rows
    deviation: Rows

    @classmethod
    def of_moments(cls, mean: NDArray[np.float64], second: NDArray[np.float64]) -> Channels:
        """From the mean and the second moment of some rows; a channel that does not vary gets deviation 1."""
        deviation = np.sqrt(np.maximum(second - np.square(mean), 0)).astype(np.float32)
        return cls(mean.astype(np.float32), np.where(deviation > 0, deviation, np.float32(1)))

    @classmethod
    def from_table(cls, table: Rows) -> Channels:
        return cls(table[0], table[1])

    @property
    def table(self) -> Rows:
        """(2, d_model): as a store keeps it."""
        return np.stack([self.mean, self.deviation])


def encode_rows(rows: Rows, encoding: str, channels: Channels | None = None) -> tuple[NDArray[Any], Rows | None]:
    """float32 rows (n, d_model) as the encoding keeps them, and for int8 each row's scale (n,).

    Raises EncodingError on a non-finite value, or one beyond the encoding's largest (65,504 under fp16); the message
    names the first such value and its channel, the error its row, so that the caller can say which token it was.
    """
    if not (rows.size == 0 or max(rows.max(), -rows.min()) <= LARGEST[encoding]):  # a NaN compares false
        raise _does_not_fit(rows, encoding, np.abs(rows) <= LARGEST[encoding])
    if encoding == "fp32":
        return rows, None
    if encoding == "fp16":
        return rows.astype(np.float16), None
    if encoding == "bf16":
        return _to_bf16(rows), None
    if channels is None:
        raise ValueError("int8 needs the channels' means and deviations")
    return _to_int8(rows, channels)


def decode_rows(
    kept: NDArray[Any],
    encoding: str,
    scale: Rows | None = None,
    channels: Channels | None = None,
    out: Rows | None = None,
) -> NDArray[Any]:
    """What `encode_rows` kept, as float32; `raw` and `packed` arrays as they are. fp16 and bf16 in `out` when given."""
    if encoding == "fp32":
        return kept
    if encoding == "fp16":
        return _from_fp16(kept, out)
    if encoding == "bf16":
        out = np.empty(kept.shape, np.float32) if out is None else out
        bits = out.view(np.uint32)
        bits[...] = kept
        bits <<= 16
        return out
    if encoding == "int8":
        if scale is None or channels is None:
            raise ValueError("int8 needs the rows' scales and the channels' means and deviations")
        rows = kept.astype(np.float32)
        rows *= scale[:, None]
        rows *= channels.deviation
        rows += channels.mean
        return rows
    return kept


def _does_not_fit(rows: Rows, encoding: str, fits: NDArray[np.bool_]) -> EncodingError:
    row, channel = (int(i) for i in np.argwhere(~fits)[0])
    value = rows[row, channel]
    remedy = "bf16 keeps up to 3.39e38, fp32 any finite value." if np.isfinite(value) else "the model gave it."
    return EncodingError(f"value {value} in channel {channel} does not fit {encoding}; {remedy}", row)


def _to_bf16(rows: Rows) -> NDArray[np.uint16]:
    """Round to nearest even, the upper half of the float32 bits."""
    bits = np.ascontiguousarray(rows).view(np.uint32)
    rounded = bits + (0x7FFF + ((bits >> 16) & 1))
    return (rounded >> 16).astype(np.uint16)


def _from_fp16(kept: NDArray[np.float16], out: Rows | None = None) -> Rows:
    """Exactly `kept.astype(float32)` for finite values, several times as fast: its bits, moved, times a power of two.

    An fp16's exponent and fraction, read as those of a float32, give its value times 2^-112, subnormals included.
    """
    out = np.empty(kept.shape, np.float32) if out is None else out
    bits = out.view(np.int32)
    for start in range(0, len(kept), FP16_BLOCK_ROWS):  # a block at a time stays in the cache
        block = slice(start, start + FP16_BLOCK_ROWS)
        here = bits[block]
        here[...] = kept[block].view(np.int16)  # by itself: an operation that widens as well goes through a buffer
        here <<= 13
        here &= np.int32(-0x70002000)
        out[block] *= np.float32(2.0**112)
    return out


def _to_int8(rows: Rows, channels: Channels) -> tuple[NDArray[np.int8], Rows]:
    """(n, d) multiples of each row's scale, and the scales (n,).

    A scale is as fine as 127 steps allow, but no finer than a 29th of the row's root mean square: an error of
    1 / 29² / 12 = 1e-4 of the variance, and at most log2(29 sqrt(2πe)) = 6.9 bits a value when compressed.
    """
    with np.errstate(over="ignore"):
        standard = (rows - channels.mean) / channels.deviation
    largest = np.abs(standard).max(axis=1)
    if not (largest <= INT8_FURTHEST).all():
        raise _does_not_fit(rows, "int8", np.abs(standard) <= INT8_FURTHEST)
    root_mean_square = np.sqrt(np.square(standard).mean(axis=1))
    scale = np.maximum(largest / np.float32(INT8_STEPS), root_mean_square / np.float32(INT8_STEPS_PER_RMS))
    scale[scale < FLOAT32.tiny] = 1  # a scale below that would have no precision left
    return np.rint(standard / scale[:, None]).astype(np.int8), scale
