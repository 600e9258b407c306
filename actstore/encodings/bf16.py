"""bf16: the upper half of a float32, stored as uint16, since Zarr has no bfloat16, and compressed."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore.encodings.base import Encoding, Rows
from actstore.encodings.channels import Channels


class Bf16(Encoding):
    """Each value rounded to nearest even."""

    def keep(self, rows: Rows, channels: Channels | None) -> tuple[NDArray[Any], Rows | None]:
        bits = np.ascontiguousarray(rows).view(np.uint32)
        rounded = bits + (0x7FFF + ((bits >> 16) & 1))
        return (rounded >> 16).astype(np.uint16), None

    def decode(
        self, kept: NDArray[Any], scale: Rows | None = None, channels: Channels | None = None, out: Rows | None = None
    ) -> NDArray[Any]:
        out = np.empty(kept.shape, np.float32) if out is None else out
        bits = out.view(np.uint32)
        bits[...] = kept
        bits <<= 16
        return out


ENCODING = Bf16("bf16", "uint16", compressed=True, largest=float.fromhex("0x1.fep127"), float_dtype="bfloat16", offered=3)
