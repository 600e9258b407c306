"""The codes that pairs are counted from, and the rows of each feature: left by the survey, read block by block.

A block is as many shards as are counted at once. Tiles come one after another on a worker and read the same codes, so each
of its threads keeps the block that it read last: reading it for every tile anew was a tenth of the counting.
"""

from __future__ import annotations

from collections.abc import Iterator
from threading import get_ident
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from actstore.open_place import open_place
from actstore.place import Place
from actstore.reader import Shard
from pipelines.analysis.survey.job import Job, shard_name
from pipelines.analysis.survey.partial_results import Bundle
from pipelines.statistics.pairs import firing_lists, firings_of

BLOCK_CODES = 1 << 25
"""Most codes that a task holds at a time; a shard with more is held whole."""


def countable(codes: NDArray[Any], n_features: int) -> dict[str, NDArray[Any]]:
    """The arrays that `row_blocks` reads of a shard: the marked codes (n, k), and the rows of each feature."""
    firings = firings_of(codes, n_features)
    rows = firings.indices.astype(np.min_scalar_type(max(len(codes) - 1, 0)))
    return {"codes": codes.reshape(-1), "firings/rows": rows, "firings/starts": firings.indptr}


def row_blocks(job: Job, shards: list[Shard], start: int, stop: int) -> Iterator[tuple[NDArray[Any], sp.csr_array]]:
    """Shards one after another, in blocks of as many as are counted at once, as the survey left them.

    A block is its (n, k) codes, and the (stop - start, n) firings of the features [start, stop). The codes of all blocks
    are views of one buffer: each is gone when the next is asked for.
    """
    held = _held.setdefault(get_ident(), _HeldCodes())
    largest = max(shard.n_rows for shard in shards)
    n_rows = max(largest, min(sum(shard.n_rows for shard in shards), BLOCK_CODES // job.extent.k))
    work = open_place(job.work_url)
    for block in _blocks(shards, n_rows):
        yield held.read(job, work, block, n_rows), _firings(work, block, start, stop)


def forget_codes() -> None:
    """Free the codes that this process's threads keep from their last block."""
    _held.clear()


def _blocks(shards: list[Shard], n_rows: int) -> list[list[Shard]]:
    """Consecutive shards of `n_rows` rows together at most; no shard has more."""
    blocks, filled = list[list[Shard]](), n_rows
    for shard in shards:
        if filled + shard.n_rows > n_rows:
            blocks.append([])
            filled = 0
        blocks[-1].append(shard)
        filled += shard.n_rows
    return blocks


class _HeldCodes:
    """A block's codes, in one buffer for all blocks."""

    def __init__(self) -> None:
        self._whose: tuple[Job, list[Shard]] | None = None
        self._buffer = np.empty((0, 0), np.uint8)

    def read(self, job: Job, work: Place, shards: list[Shard], n_rows: int) -> NDArray[Any]:
        """(n, k) the codes of the shards, of at most `n_rows` rows; not read again if they were the last ones."""
        n = sum(shard.n_rows for shard in shards)
        if self._whose == (job, shards):
            return self._buffer[:n]
        self._whose = None  # until all of it is there
        shape, dtype = (n_rows, job.extent.k), np.min_scalar_type(job.extent.n_features)
        if (self._buffer.shape, self._buffer.dtype) != (shape, dtype):
            self._buffer = np.empty((0, 0), np.uint8)  # the old one goes before the new one is made
            self._buffer = np.empty(shape, dtype)
        filled = 0
        for shard in shards:
            Bundle(work, shard_name(shard)).read_into(self._buffer[filled : filled + shard.n_rows], "codes")
            filled += shard.n_rows
        self._whose = job, shards
        return self._buffer[:n]


_held: dict[int, _HeldCodes] = {}
"""By thread."""


def _firings(work: Place, shards: list[Shard], start: int, stop: int) -> sp.csr_array:
    """(stop - start, n) in which of the shards' rows each of the features fires."""
    firings = []
    for shard in shards:
        bundle = Bundle(work, shard_name(shard))
        starts = bundle.read("firings/starts", start, stop + 1)
        rows = bundle.read("firings/rows", int(starts[0]), int(starts[-1]))
        firings.append(firing_lists(rows, starts - starts[0], shard.n_rows))
    return sp.hstack(firings, format="csr")
