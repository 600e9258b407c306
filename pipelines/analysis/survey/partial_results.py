"""Several arrays as one object of a place: whole or absent, readable in part, and checked wherever it is read.

The object is a prefix (the header's length and crc32c), a JSON header (name -> type, length, offset), the arrays' bytes, and
a crc32c of each 64 KiB of every array: a part of an array is checked by the blocks that it lies in.
"""

from __future__ import annotations

import json
import struct
from itertools import accumulate
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from actstore.errors import DamagedStore
from actstore.place import Place

BLOCK_BYTES = 1 << 16
PREFIX = struct.Struct("<QI")


def publish_bundle(place: Place, name: str, arrays: dict[str, NDArray[Any]]) -> None:
    """Put one-dimensional arrays under one name, at once."""
    data = [np.ascontiguousarray(array).view(np.uint8) for array in arrays.values()]
    offsets = accumulate(map(len, data), initial=0)
    entries = {key: [array.dtype.str, len(array), at] for (key, array), at in zip(arrays.items(), offsets, strict=False)}
    header = json.dumps(entries).encode()
    prefix = PREFIX.pack(len(header), google_crc32c.value(header))
    checks = [_checks(own).view(np.uint8) for own in data]
    place.publish(name, b"".join([prefix, header, *(own.data for own in data + checks)]))


def _checks(data: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """The crc32c of each block."""
    data = data.view()
    data.flags.writeable = False  # the library takes no other
    blocks = (data[start : start + BLOCK_BYTES] for start in range(0, len(data), BLOCK_BYTES))
    return np.fromiter((google_crc32c.value(block) for block in blocks), "<u4")


class Bundle:
    """A bundle opened for reading. Raises FileNotFoundError when there is none, DamagedStore when it is not as written."""

    def __init__(self, place: Place, name: str):
        self._place, self._name = place, name
        n_bytes, check = PREFIX.unpack(self._bytes(0, PREFIX.size).tobytes())
        self._data = PREFIX.size + n_bytes
        whole = place.n_bytes(name) or 0
        header = self._bytes(PREFIX.size, n_bytes if self._data <= whole else 0).tobytes()
        if google_crc32c.value(header) != check:
            raise self._damaged()
        self._entries: dict[str, tuple[np.dtype[Any], int, int]] = {
            key: (np.dtype(dtype), n, offset) for key, (dtype, n, offset) in json.loads(header).items()
        }
        sizes = [dtype.itemsize * n for dtype, n, _ in self._entries.values()]
        n_checks = [-(-size // BLOCK_BYTES) for size in sizes]
        if whole != self._data + sum(sizes) + 4 * sum(n_checks):
            raise self._damaged()
        self._checks_at = dict(zip(self._entries, accumulate(n_checks, initial=0), strict=False))
        self._checks = self._bytes(self._data + sum(sizes), 4 * sum(n_checks)).view("<u4")

    @property
    def names(self) -> list[str]:
        """The names of the arrays."""
        return list(self._entries)

    def read(self, key: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Elements [start, stop) of an array."""
        dtype, n, _ = self._entries[key]
        stop = n if stop is None else stop
        first = start * dtype.itemsize // BLOCK_BYTES * BLOCK_BYTES
        last = min(-(-stop * dtype.itemsize // BLOCK_BYTES) * BLOCK_BYTES, n * dtype.itemsize)
        blocks = np.empty(max(last - first, 0), np.uint8)
        self._fill(blocks, key, first)
        return blocks[start * dtype.itemsize - first : stop * dtype.itemsize - first].view(dtype)

    def read_into(self, out: NDArray[Any], key: str) -> None:
        """Fill `out`, contiguous and of the array's type and length."""
        self._fill(out.reshape(-1).view(np.uint8), key, 0)

    def _fill(self, out: NDArray[np.uint8], key: str, first: int) -> None:
        """Read whole blocks of an array, from byte `first` of it on."""
        check = self._checks_at[key] + first // BLOCK_BYTES
        self._read(out, self._data + self._entries[key][2] + first)
        checks = _checks(out)
        if (checks != self._checks[check : check + len(checks)]).any():
            raise self._damaged()

    def _bytes(self, at: int, n_bytes: int) -> NDArray[np.uint8]:
        out = np.empty(n_bytes, np.uint8)
        self._read(out, at)
        return out

    def _read(self, out: NDArray[np.uint8], at: int) -> None:
        if out.nbytes and self._place.read_into(self._name, at, out.data) != out.nbytes:
            raise self._damaged()

    def _damaged(self) -> DamagedStore:
        return DamagedStore(
            f"{self._place}/{self._name}: a partial result that is not as it was written; remove it and run `analyze` again."
        )
