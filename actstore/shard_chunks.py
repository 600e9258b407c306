"""The chunks of one array of a shard, read out of their object and checked: a tenth of the time that Zarr takes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore.arrays import CRC_BYTES, Unreadable, check_chunk, index_bytes, neighbours, read_index, unpack_chunk
from actstore.layout import Layout
from actstore.place import Place
from actstore.schema import RowArray

READ_BYTES, READ_CHUNKS = 16 << 20, 256
"""How much of a shard is asked for in one read, and in how many chunks."""


@dataclass(frozen=True)
class ShardChunks:
    """Where the chunks of one array of a shard lie: (offset, length) in the object `key`."""

    place: Place
    key: str
    array: RowArray
    chunks: list[tuple[int, int]]

    @classmethod
    def open(cls, place: Place, key: str, array: RowArray, committed: int, layout: Layout, n_chunks: int) -> ShardChunks:
        """Read the shard's index. Raises Unreadable when the object is not as long as was committed, or the index fails."""
        n_bytes = place.n_bytes(key)
        if n_bytes is None:
            raise Unreadable("it is missing")
        if n_bytes != committed:
            raise Unreadable(f"it has {n_bytes} bytes, {committed} were committed")
        index = bytearray(index_bytes(layout))
        place.read_into(key, n_bytes - len(index), memoryview(index))
        chunks = [(offset, length) for offset, length in read_index(bytes(index), n_chunks).tolist()]
        return cls(place, key, array, chunks)

    def read(self, first: int, last: int, out: NDArray[Any]) -> None:
        """Whole chunks [first, last) into `out`, checked; those that lie one behind another in one read.

        Raises Unreadable when bytes are missing or fail their crc32c.
        """
        is_compressed = self.array.kept_as.compressed
        parts = iter(out.reshape(last - first, -1).view(np.uint8))
        for together in neighbours(self.chunks[first:last], READ_BYTES, READ_CHUNKS):
            pieces = []
            for part, (_, n_bytes) in zip(islice(parts, len(together)), together, strict=True):
                data = np.empty(n_bytes - CRC_BYTES, np.uint8) if is_compressed else part
                pieces.append((part, data, bytearray(CRC_BYTES)))
            buffers = [buffer for _, data, crc in pieces for buffer in (data.data, memoryview(crc))]
            n_asked = sum(buffer.nbytes for buffer in buffers)
            if (n_read := self.place.read_into(self.key, together[0][0], *buffers)) != n_asked:
                raise Unreadable(f"{n_asked} bytes of chunks were expected, {n_read} are there")
            for part, data, crc in pieces:
                check_chunk(data, crc)
                if is_compressed:
                    unpack_chunk(data, part)
