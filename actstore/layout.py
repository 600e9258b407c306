"""Row <-> chunk <-> shard arithmetic: pure integers, no I/O.

A part of a segment has `n_rows` rows. Shard s holds rows [s·S, (s+1)·S); inside it chunk j holds rows
[j·c, (j+1)·c) of the shard. The last shard, and the last chunk of it, may be short.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_CHUNK_ROWS = 1024
MIN_CHUNK_ROWS = 128
MIN_SHARDS = 16
MIN_SHARD_ROWS = 8192
SHARD_BUDGET_BYTES = 128 << 20
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


def choose_layout(
    n_rows: int,
    row_bytes_all_sites: int,
    pooled_row_bytes: int,
    *,
    shard_bytes: int = SHARD_BUDGET_BYTES,
    min_shards: int = MIN_SHARDS,
) -> Layout:
    """The layout a new part gets, from a row's bytes on disk over all sites, and its bytes in a stream.

    Near-equal shards, so that rounds mix evenly: as many as `shard_bytes` over all sites asks for, of at least
    8,192 rows (smaller ones mix worse, docs/SHUFFLE.md); at least `min_shards`, so that work can be shared out, but
    of 128 rows or more. Chunks of at most 1,024 rows, halved (down to 128) while one of every shard would pass the
    256 MiB that a round of the stream pools.

    >>> choose_layout(1_000_000, 384, 384)
    Layout(n_rows=1000000, shard_rows=62558, chunk_rows=1009)
    """
    by_bytes = min(-(-n_rows * row_bytes_all_sites // shard_bytes), n_rows // MIN_SHARD_ROWS)
    n_shards = max(1, by_bytes, min(min_shards, n_rows // MIN_CHUNK_ROWS))
    most_rows = MAX_CHUNK_ROWS
    while most_rows > MIN_CHUNK_ROWS and n_shards * most_rows * pooled_row_bytes > ROUND_BUDGET_BYTES:
        most_rows //= 2
    shard_rows = max(1, -(-n_rows // n_shards))
    n_chunks = -(-shard_rows // most_rows)
    chunk_rows = -(-shard_rows // n_chunks)
    return Layout(n_rows, n_chunks * chunk_rows, chunk_rows)
