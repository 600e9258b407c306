"""Several arrays as one object of a place: whole or absent, and readable in part.

The object is 8 bytes (the length of a header), a JSON header (name -> type, length, offset), and the arrays' bytes.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore.errors import DamagedStore
from actstore.place import Place


def publish_bundle(place: Place, name: str, arrays: dict[str, NDArray[Any]]) -> None:
    """Put one-dimensional arrays under one name, at once."""
    offset, entries = 0, {}
    for key, array in arrays.items():
        entries[key] = [array.dtype.str, len(array), offset]
        offset += array.nbytes
    header = json.dumps(entries).encode()
    data = [len(header).to_bytes(8, "little"), header, *(np.ascontiguousarray(array).tobytes() for array in arrays.values())]
    place.publish(name, b"".join(data))


class Bundle:
    """A bundle opened for reading. Raises FileNotFoundError when there is none, DamagedStore when it is not whole."""

    def __init__(self, place: Place, name: str):
        self._place, self._name = place, name
        length = np.zeros(1, np.uint64)
        place.read_into(name, 0, length.view(np.uint8).data)
        header = bytearray(min(int(length[0]), 1 << 20))
        place.read_into(name, 8, memoryview(header))
        self._data = 8 + len(header)
        try:
            self._entries: dict[str, tuple[str, int, int]] = json.loads(header)
            dtype, n, offset = max(
                self._entries.values(), key=lambda entry: entry[2] + entry[1] * np.dtype(entry[0]).itemsize
            )
        except (ValueError, TypeError) as error:
            raise self._damaged() from error
        if place.n_bytes(name) != self._data + offset + n * np.dtype(dtype).itemsize:
            raise self._damaged()

    def read(self, key: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Elements [start, stop) of an array."""
        dtype, n, _ = self._entries[key]
        found = np.empty((n if stop is None else stop) - start, np.dtype(dtype))
        self.read_into(found, key, start)
        return found

    def read_into(self, out: NDArray[Any], key: str, start: int = 0) -> None:
        """Fill `out`, of the array's type and contiguous, with as many elements from `start` on."""
        offset = self._entries[key][2] + start * out.itemsize
        if out.nbytes:
            n_bytes = self._place.read_into(self._name, self._data + offset, out.reshape(-1).view(np.uint8).data)
            if n_bytes != out.nbytes:
                raise self._damaged()

    def _damaged(self) -> DamagedStore:
        return DamagedStore(
            f"{self._place}/{self._name}: a partial result that is not whole; remove it and run `analyze` again."
        )
