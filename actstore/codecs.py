"""How a row is kept: fp32, fp16, bf16, and the plain integers of tables and codes.

An encoding turns float32 rows into what Zarr stores, and back. fp16 and fp32 are stored raw, since compressing
fp16 without loss saves 7 to 14 % and costs more time than reading it; bf16 is stored as uint16 (Zarr has no
bfloat16) and compressed. Every chunk of every array ends in a crc32c.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore.errors import EncodingError

LARGEST = {"fp16": 65504.0, "bf16": float.fromhex("0x1.fep127"), "fp32": float(np.finfo(np.float32).max)}
"""The largest magnitude each encoding of activations keeps."""


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
        Encoding("raw", "", compressed=False),
        Encoding("packed", "", compressed=True),
    )
}
ACTIVATION_ENCODINGS = ("fp16", "fp32", "bf16")
"""What `collect --encoding` offers; `raw` and `packed` keep integer and code arrays as they are."""


def encode_rows(rows: NDArray[np.float32], encoding: str) -> NDArray[Any]:
    """float32 rows as the encoding keeps them.

    Raises EncodingError on a non-finite value, or one beyond the encoding's largest (65,504 under fp16); the message
    names the first such value and its (row, channel), so that the caller can say which token it was.
    """
    bad = ~(np.abs(rows) <= LARGEST[encoding])
    if bad.any():
        row, channel = (int(i) for i in np.argwhere(bad)[0])
        raise EncodingError(
            f"value {rows[row, channel]} at row {row}, channel {channel} does not fit {encoding}"
            + (
                "; bf16 keeps up to 3.39e38, fp32 any finite value."
                if np.isfinite(rows[row, channel])
                else "; the model gave it."
            ),
            row,
        )
    if encoding == "fp32":
        return rows
    if encoding == "fp16":
        return rows.astype(np.float16)
    return _to_bf16(rows)


def decode_rows(kept: NDArray[Any], encoding: str) -> NDArray[Any]:
    """What `encode_rows` kept, as float32; `raw` and `packed` arrays as they are."""
    if encoding in ("fp32", "fp16"):
        return kept.astype(np.float32, copy=False)
    if encoding == "bf16":
        return (kept.astype(np.uint32) << 16).view(np.float32)
    return kept


def _to_bf16(rows: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round to nearest even, the upper half of the float32 bits."""
    bits = np.ascontiguousarray(rows).view(np.uint32)
    rounded = bits + (0x7FFF + ((bits >> 16) & 1))
    return (rounded >> 16).astype(np.uint16)
