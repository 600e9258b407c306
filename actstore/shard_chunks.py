"""The chunks of one array of a shard, read out of their object and checked: a tenth of the time that Zarr takes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore.arrays import CRC_BYTES, Unreadable, check_chunk, index_bytes, neighbours, read_index, unpack_chunk
from actstore.files import Entry
from actstore.layout import Layout
from actstore.place import Place
from actstore.schema import RowArray

READ_BYTES, READ_CHUNKS = 16 << 20, 256
"""How much of a shard is asked for in one read, and in how many chunks."""


@dataclass(frozen=True)
class ShardChunks:
    """Where the chunks of one array of a shard lie, (offset, length) in the object `key`, and the committed crc32c."""

    place: Place
    key: str
    array: RowArray
    chunks: list[tuple[int, int]]
    crc32c: bytes
    """Four bytes a chunk."""

    @classmethod
    def open(cls, place: Place, key: str, array: RowArray, committed: Entry, layout: Layout, shard: int) -> ShardChunks:
        """Read the shard's index.

        Raises Unreadable when the object is not as long as was committed, when the index fails its checksum, or when it
        names a chunk that cannot be one.
        """
        n_bytes, n_chunks = place.n_bytes(key), layout.n_chunks(shard)
        if n_bytes is None:
            raise Unreadable("it is missing")
        if n_bytes != committed["bytes"]:
            raise Unreadable(f"it has {n_bytes} bytes, {committed['bytes']} were committed")
        index = bytearray(index_bytes(layout))
        if place.read_into(key, max(0, n_bytes - len(index)), memoryview(index)) != len(index):
            raise Unreadable(f"{n_bytes} bytes are too few for the index of {n_chunks} chunks")
        chunks = [(offset, length) for offset, length in read_index(bytes(index), n_chunks).tolist()]
        crc32c = bytes.fromhex(committed.get("chunk_crc32c", ""))
        if len(crc32c) != CRC_BYTES * len(chunks):
            raise Unreadable(f"its record lists {len(crc32c) // CRC_BYTES} chunks, its index {len(chunks)}")
        n_plain, n_data = layout.chunk_rows * array.row_bytes + CRC_BYTES, n_bytes - len(index)
        for offset, length in chunks:
            if offset + length > n_data or not (length > CRC_BYTES if array.kept_as.compressed else length == n_plain):
                raise Unreadable(f"its index names a chunk of {length} bytes at {offset}; it has {n_data}")
        return cls(place, key, array, chunks, crc32c)

    def read(self, first: int, last: int, out: NDArray[Any]) -> None:
        """Whole chunks [first, last) into `out`, checked; those that lie one behind another in one read.

        Raises Unreadable when bytes are missing, fail their crc32c, or are not those that were committed.
        """
        is_compressed = self.array.kept_as.compressed
        parts = iter(out.reshape(last - first, -1).view(np.uint8))
        number = first
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
                check_chunk(data, bytes(crc), self.crc32c[CRC_BYTES * number : CRC_BYTES * (number + 1)])
                number += 1
                if is_compressed:
                    unpack_chunk(data, part)
