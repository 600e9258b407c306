"""Shuffled batches out of core: runs the plan of `actstore.plan` over a store, in bounded memory.

A stream is the endless sequence of epochs 0, 1, 2, ...; each holds every committed row of the split once, in an
order that is a pure function of (seed, epoch, round). Its whole state is the number of rows already given out. Of
several ranks, each streams its own share of every epoch's chunks.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from threading import Lock, local
from typing import Any
from weakref import ref

import numpy as np
from numpy.typing import NDArray

from actstore.codecs import decode_rows
from actstore.errors import IdentityMismatch, InputError
from actstore.layout import ROUND_BUDGET_BYTES
from actstore.plan import chunk_sequence, round_order, rounds
from actstore.reader import ActivationStore, Shard

Ints = NDArray[np.int64]
NORMALISATIONS = ("none", "standardise", "mean_norm")


@dataclass(frozen=True)
class Scaling:
    """What rows are normalised by: (row - shift) * factor, each (d_model,) or a number."""

    shift: Any
    factor: Any

    @classmethod
    def recorded(cls, store: ActivationStore, site: str, normalise: str) -> Scaling | None:
        """From the statistics that the store records of its training rows.

        `standardise`: mean 0 and deviation 1 in every channel. `mean_norm`: one factor, so that the mean Euclidean norm
        of a row is sqrt(d_model). `none`: None.
        """
        if normalise not in NORMALISATIONS:
            raise InputError(f"normalise {normalise!r}: choose from {', '.join(NORMALISATIONS)}.")
        if normalise == "none":
            return None
        found = store.statistics(site)
        if normalise == "mean_norm":
            return cls(np.float32(0), np.float32(np.sqrt(len(found.mean)) / found.mean_norm))
        deviation = np.where(found.deviation > 0, found.deviation, 1)
        return cls(found.mean.astype(np.float32), (1 / deviation).astype(np.float32))


class BatchStream:
    """Endless batches (batch_rows, d_model) of one site, float32.

    A round pools the next G chunks, as many as `budget_bytes` holds as float32 but no more than there are shards, and
    permutes the pool; the next round is read while this one is consumed. Batches run on over round and epoch ends: no
    row is skipped or repeated, and none is short but, with `epochs`, the last. Memory: `memory_bytes`, and the
    batches that the caller keeps; one of fp32, of int8 or `as_kept` is a view, and keeps the pool it looks at.

    `as_kept` gives rows as they lie on disk (float16, float32, or uint16 with the bits of a bfloat16), without
    a copy. `rank` of `n_ranks` gets a share of its own of every epoch.

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
        epochs: int | None = None,
        normalise: str = "none",
        as_kept: bool = False,
        rank: int = 0,
        n_ranks: int = 1,
    ):
        if batch_rows < 1 or not 0 <= rank < n_ranks:
            raise InputError(
                f"batch rows {batch_rows}, rank {rank} of {n_ranks}: at least 1, and a rank below their number."
            )
        self.store, self.site, self.batch_rows, self.seed = store, site, batch_rows, seed
        self.array = store.manifest.array(f"acts/{site}")
        self.part, self.shards = part, store.shards(part)
        self.rank, self.n_ranks, self.epochs = rank, n_ranks, epochs
        self.n_rows = sum(shard.n_rows for shard in self.shards)
        if not self.n_rows:
            raise InputError(f"{store.place}: has no {part} rows to stream; collect more tokens.")
        self.d_model = self.array.width
        self.as_kept = as_kept
        self.scaling = Scaling.recorded(store, site, normalise)
        if as_kept and (self.scaling is not None or self.array.encoding == "int8"):
            raise InputError("as_kept: int8 rows and normalised ones are computed; leave as_kept out.")
        n_chunks = sum(shard.n_chunks for shard in self.shards)
        if n_ranks > n_chunks:
            raise InputError(f"{store.place}: has {n_chunks} {part} chunks for {n_ranks} ranks; use fewer, or collect more.")
        chunk_bytes = max(shard.chunk_rows for shard in self.shards) * self.d_model * 4
        self.chunks_per_round = max(1, min(len(self.shards), budget_bytes // chunk_bytes))
        self._next_row = 0
        largest_round = self.chunks_per_round * max(shard.chunk_rows for shard in self.shards)
        self._pools = _Pools(largest_round * self.d_model * self._pool_dtype.itemsize)
        self._scratch = local()

    @property
    def memory_bytes(self) -> int:
        """Upper bound of what the stream holds: four pools (a batch, and one that runs on, can pin two while the next two
        are used and read), some chunks for each reader, and a batch as it is kept and as it is given out."""
        chunk_rows = max(shard.chunk_rows for shard in self.shards)
        rows_held = 4 * self.chunks_per_round * chunk_rows + 3 * self.store.place.readers * chunk_rows
        row_bytes = self.d_model * self._pool_dtype.itemsize
        return rows_held * row_bytes + self.batch_rows * self.d_model * 8 + 40 * self.chunks_per_round * chunk_rows

    @property
    def _pool_dtype(self) -> np.dtype[Any]:
        """int8 rows are pooled decoded, all others as they are kept."""
        return np.dtype(np.float32 if self.array.encoding == "int8" else self.array.dtype)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands: rows given out, and everything their order depends on."""
        return {
            "row": self._next_row,
            "seed": self.seed,
            "snapshot": self.store.snapshot,
            "part": self.part,
            "chunks_per_round": self.chunks_per_round,
            "rank": self.rank,
            "n_ranks": self.n_ranks,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken. Raises IdentityMismatch for other rows or another order.

        A store that has grown since is opened as it was with `ActivationStore(path, snapshot=state["snapshot"])`.
        """
        for key, ours in self.state_dict().items():
            if key != "row" and state[key] != ours:
                raise IdentityMismatch(
                    f"{self.store.place}: the state was taken with {key} {state[key]}, this stream has {ours}; "
                    "open the same rows (snapshot=...) with the same seed, budget and ranks."
                )
        self._next_row = state["row"]

    def __iter__(self) -> Iterator[NDArray[Any]]:
        """Batches from where the stream stands; closing the iterator stops the prefetch."""
        with ThreadPoolExecutor(2 + self.store.place.readers, thread_name_prefix="actstore-stream") as threads:
            pieces: list[NDArray[Any]] = []
            n_held = 0
            for pool in self._prefetched(threads):
                used = 0
                while used < len(pool):
                    pieces.append(pool[used : used + self.batch_rows - n_held])
                    n_taken = len(pieces[-1])
                    n_held, used = n_held + n_taken, used + n_taken
                    if n_held == self.batch_rows:
                        batch, pieces, n_held = self._batch(pieces), [], 0
                        self._next_row += self.batch_rows
                        yield batch
                        del batch
                del pool  # so that the next round but one can have its memory
            if n_held:
                batch, pieces = self._batch(pieces), []
                self._next_row += n_held
                yield batch

    def _batch(self, pieces: list[NDArray[Any]]) -> NDArray[Any]:
        """One batch from pieces of one or more pools; a view of the pool where nothing has to be computed."""
        kept = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        is_ready = self.as_kept or self.array.encoding == "int8"  # which is decoded as it is read
        rows = kept if is_ready else decode_rows(kept, self.array.encoding)
        if self.scaling is not None:  # in place: no other batch has these rows
            rows -= self.scaling.shift
            rows *= self.scaling.factor
        return rows

    def _prefetched(self, threads: ThreadPoolExecutor) -> Iterator[NDArray[Any]]:
        """The pools, in emission order, each read while the one before it is consumed."""
        pending: Future[NDArray[Any]] | None = None
        for chosen in self._rounds():
            upcoming = threads.submit(self._read_round, threads, chosen)
            if pending is not None:
                yield pending.result()
            pending = upcoming
        if pending is not None:
            yield pending.result()

    def _rounds(self) -> Iterator[_Round]:
        """Every round from where the stream stands."""
        epoch, before = 0, 0
        if self.n_ranks == 1:  # every epoch has as many rows
            epoch = self._next_row // self.n_rows
            before = epoch * self.n_rows
        while self.epochs is None or epoch < self.epochs:
            sequence = chunk_sequence(self.seed, epoch, [shard.n_chunks for shard in self.shards])
            for index, chosen in enumerate(rounds(sequence, self.chunks_per_round, self.rank, self.n_ranks)):
                chunks = chosen.tolist()
                rows = [self.shards[shard].n_chunk_rows(chunk) for shard, chunk in chunks]
                end = before + sum(rows)
                if end > self._next_row:
                    yield _Round(epoch, index, chunks, rows, max(0, self._next_row - before))
                before = end
            epoch += 1

    def _read_round(self, threads: ThreadPoolExecutor, chosen: _Round) -> NDArray[Any]:
        """The rows of a round in the order in which they are emitted."""
        order = round_order(self.seed, chosen.epoch, chosen.index, sum(chosen.chunk_rows), self.rank)
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        dtype = self._pool_dtype
        pool = self._pools.take(len(order) * self.d_model * dtype.itemsize).view(dtype).reshape(len(order), self.d_model)
        whole_rows = pool.view(f"V{self.d_model * dtype.itemsize}")[:, 0]
        starts, n_readers = [0, *accumulate(chosen.chunk_rows)], self.store.place.readers

        def read(first: int) -> None:
            for k in range(first, len(chosen.chunks), n_readers):
                shard, chunk = chosen.chunks[k]
                rows = self._read_chunk(self.shards[shard], chunk)
                whole_rows[place[starts[k] : starts[k + 1]]] = rows.view(whole_rows.dtype)[:, 0]

        for _ in threads.map(read, range(n_readers)):
            pass
        return pool[chosen.skip :]

    def _read_chunk(self, shard: Shard, chunk: int) -> NDArray[Any]:
        """A chunk in the form that pools hold, in memory of this thread that its next chunk overwrites."""
        if self.array.encoding == "int8":
            return self.store.read_chunk(shard, self.array.name, chunk)
        scratch = getattr(self._scratch, "rows", None)
        if scratch is None or len(scratch) != shard.chunk_rows:
            scratch = self._scratch.rows = np.empty((shard.chunk_rows, self.d_model), self.array.dtype)
        return self.store.read_kept_chunk(shard, self.array.name, chunk, scratch)


@dataclass(frozen=True)
class _Round:
    """Which chunks one round pools, and how many of its rows were given out before."""

    epoch: int
    index: int
    chunks: list[tuple[int, int]]
    chunk_rows: list[int]
    skip: int


class _Pools:
    """Memory of pools, used again when nobody holds a batch of it any more: new memory costs as much as reading.

    All of one size, so that any can be used again, and mapped, so that the heap is not torn up.
    """

    def __init__(self, n_bytes: int) -> None:
        self._n_bytes = n_bytes
        self._lent: list[tuple[NDArray[np.uint8], ref[Any]]] = []
        self._lock = Lock()

    def take(self, n_bytes: int) -> NDArray[np.uint8]:
        with self._lock:  # an iterator that was left may still be reading
            memory = self._free()
            lent = np.frombuffer(memory.data, np.uint8)
            self._lent.append((memory, ref(lent.base)))  # every array that looks at the memory keeps this base alive
            return lent[:n_bytes]

    def _free(self) -> NDArray[np.uint8]:
        """Memory that nothing looks at; what is still looked at is left to those who do."""
        looked_at, free = [], []
        for memory, watched in self._lent:
            if watched() is not None:
                looked_at.append((memory, watched))
            else:
                free.append(memory)
        self._lent = looked_at
        return free[0] if free else _mapped(self._n_bytes)


def _mapped(n_bytes: int) -> NDArray[np.uint8]:
    """New memory, in huge pages where there are some: rows are scattered all over it."""
    memory = mmap.mmap(-1, n_bytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)
