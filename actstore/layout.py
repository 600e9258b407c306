"""Row <-> chunk <-> shard arithmetic: pure integers, no I/O.

A part of a segment has `n_rows` rows. Shard s holds rows [s·S, (s+1)·S); inside it chunk j holds rows
[j·c, (j+1)·c) of the shard. The last shard, and the last chunk of it, may be short.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_CHUNK_ROWS = 1024
MIN_CHUNK_ROWS = 128
MIN_SHARDS = 16
SHARD_BUDGET_BYTES = 512 << 20
ROUND_BUDGET_BYTES = 256 << 20


@dataclass(frozen=True)
class Layout:
    """How `n_rows` rows are cut into shards and chunks.

    >>> layout = Layout(n_rows=1000, shard_rows=256, chunk_rows=128)
    >>> layout.n_shards, layout.shard_range(3), layout.n_chunks(3), layout.chunk_range(3, 1)
    (4, (768, 1000), 2, (896, 1000))
    """

    n_rows: int
    shard_rows: int
    chunk_rows: int

    def __post_init__(self) -> None:
        if self.n_rows < 0 or self.chunk_rows < 1 or self.shard_rows % self.chunk_rows or self.shard_rows < 1:
            raise ValueError(f"not a layout: {self}")

    @property
    def n_shards(self) -> int:
        return -(-self.n_rows // self.shard_rows)

    def shard_range(self, shard: int) -> tuple[int, int]:
        """First and one-past-last row of a shard."""
        start = shard * self.shard_rows
        return start, min(start + self.shard_rows, self.n_rows)

    def n_chunks(self, shard: int) -> int:
        start, stop = self.shard_range(shard)
        return -(-(stop - start) // self.chunk_rows)

    def chunk_range(self, shard: int, chunk: int) -> tuple[int, int]:
        """First and one-past-last row, counted in the part, of one chunk of a shard."""
        start, stop = self.shard_range(shard)
        first = start + chunk * self.chunk_rows
        return first, min(first + self.chunk_rows, stop)


def choose_layout(n_rows: int, row_bytes_all_sites: int, pooled_row_bytes: int) -> Layout:
    """The layout a new segment gets, from what a row takes on disk over all sites and what a stream holds of it.

    Shards: the largest multiple of the chunk with at most 512 MiB over all sites that still leaves at least 16
    whole shards. Chunks: 1,024 rows, halved (down to 128) while one chunk of every shard would pass the 256 MiB that a
    round of the stream pools, or while a shard could not hold one chunk.

    >>> choose_layout(1_000_000, 384, 384)
    Layout(n_rows=1000000, shard_rows=62464, chunk_rows=1024)
    """
    chunk_rows = MAX_CHUNK_ROWS
    while True:
        by_bytes = SHARD_BUDGET_BYTES // max(row_bytes_all_sites, 1) // chunk_rows * chunk_rows
        by_count = n_rows // MIN_SHARDS // chunk_rows * chunk_rows
        shard_rows = min(by_bytes, by_count)
        if chunk_rows == MIN_CHUNK_ROWS:
            return Layout(n_rows, max(shard_rows, chunk_rows), chunk_rows)
        if shard_rows:
            layout = Layout(n_rows, shard_rows, chunk_rows)
            if layout.n_shards * chunk_rows * pooled_row_bytes <= ROUND_BUDGET_BYTES:
                return layout
        chunk_rows //= 2
