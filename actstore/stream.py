"""Shuffled batches out of core: runs the plan of `actstore.plan` over a store, in bounded memory.

A stream is the endless sequence of epochs 0, 1, 2, ...; each holds every committed row of the split once, in an
order that is a pure function of (seed, epoch, round). Its whole state is the number of rows already given out. Each
of several ranks streams its own share of every epoch's chunks.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, cycle
from typing import Any
from weakref import ref

import numpy as np
from numpy.typing import NDArray

from actstore import paths
from actstore.encodings.registry import computed_encodings
from actstore.errors import IdentityMismatch, InputError
from actstore.layout import ROUND_BUDGET_BYTES
from actstore.plan import chunk_sequence, round_order, rounds
from actstore.reader import ActivationStore

Ints = NDArray[np.int64]
BLOCK_ROWS = 1024
"""Rows that are decoded and normalised at a time. Threads wait for each other at every step, so not too few."""
LENT_BATCHES = 3
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
        recorded = store.statistics(site)
        if normalise == "mean_norm":
            return cls(np.float32(0), np.float32(np.sqrt(len(recorded.mean)) / recorded.mean_norm))
        deviation = np.where(recorded.deviation > 0, recorded.deviation, 1)
        return cls(recorded.mean.astype(np.float32), (1 / deviation).astype(np.float32))


class BatchStream:
    """Endless batches (batch_rows, d_model) of one site, float32.

    A round pools the next G chunks, as many as `budget_bytes` holds as float32 but no more than there are shards, and
    gives their rows out in a random order; the next round is read while this one is consumed. Batches run on over
    round and epoch ends: no row is skipped or repeated, and none is short but, with `epochs`, the last. A batch is a
    copy, in memory that is reused only after the caller has dropped the batch: a batch that is kept never changes.
    Memory: `memory_bytes`, and the batches that the caller keeps.

    `as_kept` gives rows as they lie on disk: float16, float32, or uint16 with the bits of a bfloat16. `rank` of
    `n_ranks` gets a share of its own of every epoch.

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
        self.array = store.manifest.array(paths.acts(site))
        self.encoding = self.array.kept_as
        self.part, self.shards = part, store.shards(part)
        self.rank, self.n_ranks, self.epochs = rank, n_ranks, epochs
        self.n_rows = sum(shard.n_rows for shard in self.shards)
        if not self.n_rows:
            raise InputError(f"{store.place}: has no {part} rows to stream; collect more tokens.")
        self.d_model = self.array.width
        self.as_kept = as_kept
        self.scaling = Scaling.recorded(store, site, normalise)
        if as_kept and (self.scaling is not None or self.encoding.float_dtype is None):
            names = ", ".join(computed_encodings())
            raise InputError(f"as_kept: {names} rows and normalised ones are computed; leave as_kept out.")
        n_chunks = sum(shard.n_chunks for shard in self.shards)
        if n_ranks > n_chunks:
            raise InputError(f"{store.place}: has {n_chunks} {part} chunks for {n_ranks} ranks; use fewer, or collect more.")
        chunk_bytes = max(shard.chunk_rows for shard in self.shards) * self.d_model * 4
        self.chunks_per_round = max(1, min(len(self.shards), budget_bytes // chunk_bytes))
        self._next_row = 0
        self._round_rows = self.chunks_per_round * max(shard.chunk_rows for shard in self.shards)
        self._n_threads = max(1, store.place.readers - 1)  # the consumer reads as well while it would have to wait

    def __repr__(self) -> str:
        """What is streamed, and how far the stream is, on one line."""
        of_ranks = f", rank {self.rank} of {self.n_ranks}" if self.n_ranks > 1 else ""
        return (
            f"<BatchStream of {self.store.url}, {self.site}: batches of {self.batch_rows:,} x {self.d_model}, epochs of "
            f"{self.n_rows:,} {self.part} rows, {self._next_row:,} rows given, seed {self.seed}{of_ranks}; snapshot "
            f"{self.store.snapshot}>"
        )

    @property
    def memory_bytes(self) -> int:
        """Upper bound of what the stream holds: two pools, one used and one read, the order of their rows, two chunks for
        each thread that reads, three batches, and a block of rows on their way into one."""
        chunk_rows = max(shard.chunk_rows for shard in self.shards)
        kept_rows = 2 * self._round_rows + 2 * (self._n_threads + 1) * chunk_rows + BLOCK_ROWS
        kept_bytes = kept_rows * self._pool_dtype.itemsize + LENT_BATCHES * self._batch_rows * self._batch_dtype.itemsize
        return kept_bytes * self.d_model + 48 * self._round_rows

    @property
    def _pool_dtype(self) -> np.dtype[Any]:
        """Rows that need more than themselves to be decoded, as under int8, are pooled decoded, all others as kept."""
        return np.dtype(self.array.dtype if self.encoding.is_alone else np.float32)

    @property
    def _decodes(self) -> bool:
        """Whether rows of a pool are decoded on their way into a batch."""
        return self.encoding.is_alone and self.encoding.float_dtype != "float32" and not self.as_kept

    @property
    def _batch_dtype(self) -> np.dtype[Any]:
        return self._pool_dtype if self.as_kept else np.dtype(np.float32)

    @property
    def _batch_rows(self) -> int:
        """The rows of a batch, at most all rows."""
        return self.batch_rows if self.epochs is None else min(self.batch_rows, max(1, self.epochs * self.n_rows))

    def state_dict(self) -> dict[str, Any]:
        """The stream's position: the number of rows given out, and everything that their order depends on."""
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
        batches = _Batches(self._batch_rows, self.d_model, self._batch_dtype)
        block = np.empty((BLOCK_ROWS, self.d_model), self._pool_dtype)
        batch, n_held = batches.take(), 0
        with ThreadPoolExecutor(self._n_threads, thread_name_prefix="actstore-stream") as threads:
            for pool, order in self._pooled(threads):
                used = 0
                while used < len(order):
                    places = order[used : used + self.batch_rows - n_held]
                    self._emit(pool, places, batch[n_held : n_held + len(places)], block)
                    n_held, used = n_held + len(places), used + len(places)
                    if n_held == self.batch_rows:
                        self._next_row += n_held
                        yield batch
                        del batch  # so that the next one but one can have its memory
                        batch, n_held = batches.take(), 0
            if n_held:
                self._next_row += n_held
                yield batch[:n_held]

    def _emit(self, pool: NDArray[Any], places: Ints, out: NDArray[Any], block: NDArray[Any]) -> None:
        """The rows at `places` of a pool into `out`; those to be computed a block at a time, which stays in the cache."""
        decodes = self._decodes
        if self.scaling is None and not decodes:
            _gather(pool, places, out)
            return
        for start in range(0, len(places), BLOCK_ROWS):
            chosen, rows = places[start : start + BLOCK_ROWS], out[start : start + BLOCK_ROWS]
            kept = block[: len(chosen)] if decodes else rows
            _gather(pool, chosen, kept)
            if decodes:
                self.encoding.decode(kept, out=rows)
            if self.scaling is not None:
                rows -= self.scaling.shift
                rows *= self.scaling.factor

    def _pooled(self, threads: ThreadPoolExecutor) -> Iterator[tuple[NDArray[Any], Ints]]:
        """The pool of every round, and the places of its rows in the order of emission. There are two pools: the
        next round is read into one while the other is consumed."""
        if self.encoding.needs_channels:
            for segment in {shard.segment for shard in self.shards}:
                self.store.channels(segment, self.array.name)  # once, before several threads want them
        pools = cycle([np.empty((self._round_rows, self.d_model), self._pool_dtype) for _ in range(2)])
        pending: _Reading | None = None
        for chosen, pool in zip(self._rounds(), pools, strict=False):
            upcoming = _Reading(self, chosen, pool, threads)
            if pending is not None:
                yield pending.pool, pending.finish()
            pending = upcoming
        if pending is not None:
            yield pending.pool, pending.finish()

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

    def read_chunk(self, chunk: tuple[int, int], out: NDArray[Any]) -> None:
        """One chunk, named by its shard's place among the shards and its number there, into its rows of a pool."""
        shard, number = self.shards[chunk[0]], chunk[1]
        if not self.encoding.is_alone:
            out[:] = self.store.read_chunk(shard, self.array.name, number)
        elif len(out) < shard.chunk_rows:  # on disk it has its full length
            out[:] = self.store.read_kept_chunk(shard, self.array.name, number)
        else:
            self.store.read_kept_chunk(shard, self.array.name, number, out)


@dataclass(frozen=True)
class _Round:
    """Which chunks one round pools, and how many of its rows were given out before."""

    epoch: int
    index: int
    chunks: list[tuple[int, int]]
    chunk_rows: list[int]
    skip: int


class _Reading:
    """A round that is being read into a pool. Other threads read its chunks from the first on; a thread that waits for the
    round reads chunks from the last on, which keeps one more core busy."""

    def __init__(self, stream: BatchStream, chosen: _Round, pool: NDArray[Any], threads: ThreadPoolExecutor) -> None:
        stops = accumulate(chosen.chunk_rows)
        parts = [pool[stop - n : stop] for stop, n in zip(stops, chosen.chunk_rows, strict=True)]
        self.pool, self._read, self._skip = pool, stream.read_chunk, chosen.skip
        n_rows = sum(chosen.chunk_rows)  # none where a rank has no chunk in a round
        self._order = threads.submit(round_order, stream.seed, chosen.epoch, chosen.index, n_rows, stream.rank)
        self._chunks = list(zip(chosen.chunks, parts, strict=True))
        self._reads = [threads.submit(self._read, *chunk) for chunk in self._chunks]

    def finish(self) -> Ints:
        """The places in the pool of the rows that are still to be emitted, once all of them have been read."""
        for read, chunk in zip(reversed(self._reads), reversed(self._chunks), strict=True):
            if read.cancel():
                self._read(*chunk)
        for read in self._reads:
            if not read.cancelled():
                read.result()
        return self._order.result()[self._skip :]


class _Batches:
    """Memory of batches, reused once no array refers to it: new memory costs as much as reading. A buffer still in use after
    `LENT_BATCHES` newer batches is given up to its user."""

    def __init__(self, n_rows: int, width: int, dtype: np.dtype[Any]) -> None:
        self._shape, self._dtype = (n_rows, width), dtype
        self._lent: list[tuple[NDArray[Any], ref[Any]]] = []

    def take(self) -> NDArray[Any]:
        """A buffer that no array refers to."""
        looked_at, free = [], []
        for memory, watched in self._lent:
            if watched() is not None:
                looked_at.append((memory, watched))
            else:
                free.append(memory)
        memory = free[0] if free else np.empty(self._shape, self._dtype)
        lent = np.frombuffer(memory.data, self._dtype)
        looked_at.append((memory, ref(lent.base)))  # every array that looks at the memory keeps this base alive
        self._lent = looked_at[-LENT_BATCHES:]
        return lent.reshape(self._shape)


def _gather(pool: NDArray[Any], places: Ints, out: NDArray[Any]) -> None:
    """Rows of a pool into `out`, each copied whole."""
    row = f"V{pool.shape[1] * pool.itemsize}"
    np.take(pool.view(row)[:, 0], places, out=out.view(row)[:, 0], mode="clip")  # the other modes copy `out`
