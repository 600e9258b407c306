"""Shuffled batches out of core: runs the plan of `plan.chunk_sequence` over a store, in bounded memory.

A stream is the endless sequence of epochs 0, 1, 2, ...; each holds every committed row of the split once, in an
order that is a pure function of (seed, epoch, round). Its whole state is the number of rows already given out.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore.errors import IdentityMismatch, InputError
from actstore.layout import ROUND_BUDGET_BYTES
from actstore.plan import chunk_sequence, round_order
from actstore.reader import ActivationStore

Rows = NDArray[np.float32]


class BatchStream:
    """Endless float32 batches (batch_rows, d_model) of one site.

    A round pools the next G chunks, as many as `budget_bytes` holds but no more than there are shards, and permutes
    the pool; the next round is read while this one is consumed, so peak memory is about two rounds of float32
    rows. Batches run on over round and epoch ends: none is short, no row is skipped or repeated.

    >>> stream = BatchStream(store, "resid_post.3", batch_rows=4096, seed=0)  # doctest: +SKIP
    >>> next(iter(stream)).shape  # doctest: +SKIP
    (4096, 192)
    """

    def __init__(
        self,
        store: ActivationStore,
        site: str,
        batch_rows: int,
        *,
        seed: int = 0,
        part: str = "train",
        budget_bytes: int = ROUND_BUDGET_BYTES,
    ):
        self.store, self.array, self.batch_rows, self.seed = store, f"acts/{site}", batch_rows, seed
        self.part, self.shards = part, store.shards(part)
        self.n_rows = sum(shard.n_rows for shard in self.shards)
        if not self.n_rows:
            raise InputError(f"{store.path}: has no {part} rows to stream; collect more tokens.")
        self.d_model = store.d_model(site)
        chunk_bytes = max(shard.chunk_rows for shard in self.shards) * self.d_model * 4
        self.chunks_per_round = max(1, min(len(self.shards), budget_bytes // chunk_bytes))
        self._next_row = 0

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands: rows given out, and everything their order depends on."""
        return {
            "row": self._next_row,
            "seed": self.seed,
            "snapshot": self.store.snapshot,
            "part": self.part,
            "chunks_per_round": self.chunks_per_round,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken. Raises IdentityMismatch for other rows or another order."""
        for key, ours in self.state_dict().items():
            if key != "row" and state[key] != ours:
                raise IdentityMismatch(
                    f"{self.store.path}: the state was taken with {key} {state[key]}, this stream has {ours}; "
                    "open the same rows with the same seed and budget."
                )
        self._next_row = state["row"]

    def __iter__(self) -> Iterator[Rows]:
        """Batches from where the stream stands; closing the iterator stops the prefetch."""
        with ThreadPoolExecutor(1, thread_name_prefix="actstore-stream") as pool:
            batch, filled = np.empty((self.batch_rows, self.d_model), np.float32), 0
            for rows in self._prefetched(pool):
                used = 0
                while used < len(rows):
                    n_taken = min(self.batch_rows - filled, len(rows) - used)
                    batch[filled : filled + n_taken] = rows[used : used + n_taken]
                    filled, used = filled + n_taken, used + n_taken
                    if filled == self.batch_rows:
                        self._next_row += self.batch_rows
                        yield batch
                        batch, filled = np.empty_like(batch), 0
                del rows  # before another round is read: two are enough in memory

    def _prefetched(self, pool: ThreadPoolExecutor) -> Iterator[Rows]:
        epoch, skip = divmod(self._next_row, self.n_rows)
        pending: Future[Rows] | None = None
        while True:
            chunks = chunk_sequence(self.seed, epoch, [shard.n_chunks for shard in self.shards])
            starts = range(0, len(chunks), self.chunks_per_round)
            sizes = [self._round_rows(chunks[start : start + self.chunks_per_round]) for start in starts]
            for index, (start, end_row) in enumerate(zip(starts, accumulate(sizes), strict=True)):
                if end_row <= skip:
                    continue
                first = max(0, skip - (end_row - sizes[index]))
                chosen = chunks[start : start + self.chunks_per_round]
                following = pool.submit(self._read_round, epoch, index, chosen, first)
                if pending is not None:
                    yield pending.result()
                pending = following
            epoch, skip = epoch + 1, 0

    def _round_rows(self, chunks: NDArray[np.int64]) -> int:
        return sum(
            min(self.shards[s].chunk_rows, self.shards[s].n_rows - c * self.shards[s].chunk_rows) for s, c in chunks.tolist()
        )

    def _read_round(self, epoch: int, index: int, chunks: NDArray[np.int64], first: int) -> Rows:
        order = round_order(self.seed, epoch, index, self._round_rows(chunks))
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        rows: Rows = np.empty((len(order), self.d_model), np.float32)
        filled = 0
        for s, c in chunks.tolist():
            chunk = self.store.read_chunk(self.shards[s], self.array, c)
            rows[place[filled : filled + len(chunk)]] = chunk
            filled += len(chunk)
        return rows[first:]
