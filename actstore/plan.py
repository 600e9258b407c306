"""Where rows lie and in which order they are read: pure functions of (seed, indices), no I/O, no state.

Every random choice is drawn from Philox 4x64, a counter-based generator, keyed by (seed, purpose) with the indices
in its counter, and only through its raw 64-bit words, whose values NumPy guarantees. So any shard and any round can
be computed by anyone, at any time, in any order. docs/FORMAT.md writes the same rules out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actstore.layout import Layout

Ints = NDArray[np.int64]

WINDOW_ORDER, ROW_ORDER, CHUNK_ORDER, CHUNK_PHASE, ROUND_ORDER, DOCUMENT_ORDER, SAMPLE = range(1, 8)
"""Purposes: the second word of the generator's key."""


def raw_words(n: int, seed: int, purpose: int, *index: int) -> NDArray[np.uint64]:
    """`n` random 64-bit words of the stream (seed, purpose, index...), at most three indices."""
    counter = [0, *index, *([0] * (3 - len(index)))]
    generator = np.random.Philox(key=np.array([seed, purpose], np.uint64), counter=np.array(counter, np.uint64))
    return np.asarray(generator.random_raw(n), np.uint64)


def permutation(n: int, seed: int, purpose: int, *index: int) -> Ints:
    """A uniform permutation of range(n): the stable argsort of `n` words."""
    words = raw_words(n, seed, purpose, *index)
    low = np.uint64((1 << n.bit_length()) - 1)
    ranked = (words & ~low) | np.arange(n, dtype=np.uint64)  # high bits of a word, and its place: faster than an argsort
    ranked.sort()
    high = ranked & ~low
    if (high[1:] != high[:-1]).all():
        return (ranked & low).view(np.int64)
    order = np.argsort(words)  # several times faster than the stable sort, and the same unless two words are equal
    ranked = words[order]
    if (ranked[1:] == ranked[:-1]).any():
        order = np.argsort(words, kind="stable")
    return order.astype(np.int64, copy=False)


@dataclass(frozen=True)
class PartPlan:
    """Which rows shard s of a part holds, in disk order.

    Windows are permuted over the whole part; their kept rows, numbered in that order, are cut into shards; inside a
    shard rows are permuted again. `kept_counts` is the number of kept rows of each window, in window order.
    """

    seed: int
    segment: int
    part: int
    layout: Layout
    window_order: Ints
    row_bounds: Ints
    """(n_windows + 1,): rows before the p-th window of the order; the last entry is `layout.n_rows`."""

    @classmethod
    def build(cls, seed: int, segment: int, part: int, layout: Layout, kept_counts: NDArray[np.integer]) -> PartPlan:
        order = permutation(len(kept_counts), seed, WINDOW_ORDER, segment, part)
        bounds = np.concatenate([[0], np.cumsum(kept_counts[order], dtype=np.int64)])
        if bounds[-1] != layout.n_rows:
            raise ValueError(f"the windows keep {bounds[-1]} rows, the layout has {layout.n_rows}")
        return cls(seed, segment, part, layout, order, bounds)

    @property
    def first_rows(self) -> Ints:
        """(n_windows,), in window order: the plan row of each window's first kept row."""
        first = np.empty(len(self.window_order), np.int64)
        first[self.window_order] = self.row_bounds[:-1]
        return first

    def shard_windows(self, shard: int) -> tuple[Ints, slice]:
        """The windows that touch a shard, in plan order, and which of their kept rows are the shard's."""
        start, stop = self.layout.shard_range(shard)
        first = int(np.searchsorted(self.row_bounds, start, side="right")) - 1
        last = int(np.searchsorted(self.row_bounds, stop, side="left"))
        offset = int(self.row_bounds[first])
        return self.window_order[first:last], slice(start - offset, stop - offset)

    def row_order(self, shard: int) -> Ints:
        """Disk row i of the shard is the row_order[i]-th of its rows in plan order."""
        start, stop = self.layout.shard_range(shard)
        return permutation(stop - start, self.seed, ROW_ORDER, self.segment, self.part, shard)


def chunk_sequence(seed: int, epoch: int, chunks_per_shard: Sequence[int]) -> Ints:
    """(n_chunks, 2): every (shard, chunk) of an epoch once, so that any run of n_shards chunks mixes all shards.

    Chunk j of shard s gets the key (π_s(j) + u_s) / n_s with a random permutation π_s and one uniform phase u_s a
    shard; chunks are read by key. With equal shards, each round of n_shards chunks takes one of every shard.
    """
    keys, pairs = [], []
    for shard, n_chunks in enumerate(chunks_per_shard):
        ranks = permutation(n_chunks, seed, CHUNK_ORDER, epoch, shard)
        phase = float(raw_words(1, seed, CHUNK_PHASE, epoch, shard)[0] >> np.uint64(11)) * 2.0**-53
        keys.append((ranks + phase) / max(n_chunks, 1))
        pairs.append(np.stack([np.full(n_chunks, shard, np.int64), np.arange(n_chunks, dtype=np.int64)], axis=1))
    if not keys:
        return np.empty((0, 2), np.int64)
    return np.concatenate(pairs)[np.argsort(np.concatenate(keys), kind="stable")]


def rounds(sequence: Ints, chunks_per_round: int, rank: int = 0, n_ranks: int = 1) -> list[Ints]:
    """The chunks of each round of one of several ranks; all ranks together read every chunk of the sequence once.

    The sequence is cut into near-equal runs of at most n_ranks · chunks_per_round chunks, each run into one near-equal
    block a rank: a rank's round is a run of the sequence, so that it mixes shards as a single stream's does. The ranks
    take turns in having the longer blocks, so that over an epoch no two of them differ by more than one chunk.
    """
    n_runs = -(-len(sequence) // (chunks_per_round * n_ranks))
    mine, first = [], 0
    for run in np.array_split(sequence, max(n_runs, 1)):
        mine.append(np.array_split(run, n_ranks)[(rank - first) % n_ranks])  # the first blocks are the longer ones
        first += len(run) % n_ranks
    return mine


def round_order(seed: int, epoch: int, round_index: int, n_rows: int, rank: int = 0) -> Ints:
    """The order in which the pooled rows of one round are emitted, as places in the pool."""
    return permutation(n_rows, seed, ROUND_ORDER, epoch, round_index, rank)
