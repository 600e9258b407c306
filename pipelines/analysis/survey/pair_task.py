"""Co-occurrence at scale: a tile of features against all, over a group of shards; tiles of groups add up.

What counts as together is `within`: "row" (both fire in the row), a number of tokens w (b fires in a row of the same window
and document at most w places away: in how many rows of a), or "document" (in how many documents both fire).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from actstore import paths
from actstore.open_place import open_place
from actstore.reader import Shard
from pipelines.analysis.arrays import ColumnWriter, create_arrays
from pipelines.analysis.survey.held_codes import row_blocks
from pipelines.analysis.survey.job import Job, row_columns, shard_name
from pipelines.analysis.survey.partial_results import Bundle, publish_bundle
from pipelines.statistics.association import npmi
from pipelines.statistics.pairs import PairTile, count_bytes, count_type, firings_of, marked_codes

TILE_BYTES = 64 << 20
"""Most bytes of a tile's dense counts; two tiles that are added take 128 MiB."""
TILES_OF = 4
"""The number of tiles is a multiple of this, and tiles are of like size, so that two or four workers share them evenly."""
LEAST_TASKS, GROUP_ROWS = 8, 1 << 24
WRITTEN_COUNTS = 1 << 19
"""Counts of a tile that are compared with the threshold at a time; a pair takes up to 100 bytes meanwhile."""
STRONGEST, LEAST_TOGETHER = 10, 5
"""Most partners of each feature in the table of pairs, and the least number of rows together."""


def pair_tiles(fires: NDArray[np.int64], tile_bytes: int = TILE_BYTES) -> list[tuple[int, int]]:
    """Features [start, stop) of each tile, of like numbers of bytes. A feature's counts are as wide as its firings ask for.

    >>> pair_tiles(np.array([300, 2, 2, 2]), 8)
    [(0, 1), (1, 3), (3, 4)]
    >>> pair_tiles(np.array([300, 2, 2, 2]), 20)
    [(0, 4)]
    """
    widths = count_bytes(fires) * len(fires)
    n_tiles = -(-int(widths.sum()) // tile_bytes)
    if n_tiles > 1:
        n_tiles = min(-(-n_tiles // TILES_OF) * TILES_OF, len(fires))
    ends = np.cumsum(widths)
    # Feature f goes where the middle of its bytes lies: a tile is at most one feature larger than its share.
    edges = np.searchsorted(ends - widths / 2, ends[-1] * np.arange(1, n_tiles) / n_tiles).tolist()
    cuts = sorted({0, *edges, len(fires)})
    return list(pairwise(cuts))


def heaviest_first(tiles: list[tuple[int, int]], fires: NDArray[np.int64]) -> list[int]:
    """The numbers of tiles by falling firings. Firings take the time, so that in this order all workers end together.

    >>> heaviest_first([(0, 2), (2, 3)], np.array([1, 1, 5]))
    [1, 0]
    """
    return sorted(range(len(tiles)), key=lambda tile: -int(fires[slice(*tiles[tile])].sum()))


def shard_groups(n_shards: int, n_tiles: int, n_rows: int = 0, least_tasks: int = LEAST_TASKS) -> list[range]:
    """Shards counted together: few, for each group fills tiles of its own; more where tiles are few, and for many rows.

    The number of workers does not change the groups.

    >>> [len(group) for group in shard_groups(5, 4)]
    [3, 2]
    """
    n_groups = min(n_shards, max(-(-least_tasks // n_tiles), -(-n_rows // GROUP_ROWS)))
    edges = [-(-n_shards * i // n_groups) for i in range(n_groups + 1)]
    return [range(edges[i], edges[i + 1]) for i in range(n_groups)]


def count_pairs(job: Job, tile: int, start: int, largest: NDArray[np.int64], shards: list[Shard]) -> PairTile | None:
    """Counts of the features from `start` on, of a group of shards; None when the tile has been written already.

    `largest` says how often each of them can count at most, over all groups.
    """
    if open_place(job.work_url).exists(done(tile)):
        return None
    pair_tile = PairTile(start, job.extent.n_features, largest)
    if job.within == "document":
        pair_tile.add_counts(_count_documents(job, pair_tile.start, pair_tile.stop))
    elif job.within == "row":
        for codes, firings in row_blocks(job, shards, pair_tile.start, pair_tile.stop):
            pair_tile.add(codes, firings)
            del firings  # before the next block's are made
    else:
        for shard in shards:
            indices, fired, near, near_fired = widened(job, shard, int(job.within))
            codes, others = (marked_codes(*pair, job.extent.n_features) for pair in ((indices, fired), (near, near_fired)))
            pair_tile.add(others, firings_of(codes, job.extent.n_features)[pair_tile.start : pair_tile.stop])
    return pair_tile


def add_pairs(left: PairTile | None, right: PairTile | None) -> PairTile | None:
    """The sum of two groups' counts, in their types, which hold the counts of all rows."""
    return None if left is None or right is None else left.plus(right)


def write_pairs(job: Job, tile: int, each: NDArray[np.int64], n_total: int, counts: PairTile | None) -> dict[str, int]:
    """Write a tile's pairs that are together at least `min_together` times, without a feature's pair with itself.

    `each` (F,) are the firings of every feature (or its documents) and `n_total` all rows (or documents): by them the
    strongest partners of each feature are chosen, for the table of pairs.
    """
    work = open_place(job.work_url)
    if counts is not None:
        least = max(job.min_together, 1)
        lengths, n_pairs, largest = [np.zeros(1, np.int64)], 0, 0
        for _, piece in _without_themselves(counts):
            n_pairs += int(np.count_nonzero(piece))
            lengths.append(np.count_nonzero(piece >= least, axis=1))
            largest = max(largest, int(piece.max(initial=0)))
        starts = np.cumsum(np.concatenate(lengths), dtype=np.int64)
        group, n_kept = f"cooccurrence/tiles/{tile:06d}", int(starts[-1])
        create_arrays(job.result_url, group, {"starts": starts})
        dtypes = {"columns": np.min_scalar_type(job.extent.n_features - 1), "count": count_type(largest if n_kept else 0)}
        writer, best = ColumnWriter(job.result_url, group, dtypes, n_kept), []
        for first, piece in _without_themselves(counts):
            row, column = np.nonzero(piece >= least)
            together = piece[row, column]
            writer.add(columns=column, count=together)
            best.append(_strongest(job, row + first, column, together, each, n_total))
        strongest = np.concatenate(best)
        facts = {"pairs": np.array([n_pairs]), "kept": starts[-1:]}
        names = ("feature", "partner", "together")
        publish_bundle(work, done(tile), facts | {name: strongest[:, i] for i, name in enumerate(names)})
    bundle = Bundle(work, done(tile))
    return {name: int(bundle.read(name)[0]) for name in ("pairs", "kept")}


def _without_themselves(counts: PairTile) -> Iterator[tuple[int, NDArray[Any]]]:
    """(first feature, (n, F) counts with all others) of some features of a tile after others."""
    step = max(1, WRITTEN_COUNTS // counts.n_features)
    for first in range(0, counts.stop - counts.start, step):
        piece = counts.rows(first, first + step)
        features = np.arange(len(piece)) + counts.start + first
        piece[np.arange(len(piece)), features] = 0
        yield counts.start + first, piece


def _strongest(
    job: Job, feature: NDArray[Any], partner: NDArray[Any], together: NDArray[Any], each: NDArray[np.int64], n_total: int
) -> NDArray[np.int64]:
    """(n, 3) feature, partner and count of each feature's pairs with the largest NPMI (by count for `within` N)."""
    enough = np.flatnonzero(together >= LEAST_TOGETHER)
    feature, partner, together = feature[enough], partner[enough], together[enough].astype(np.int64)
    strength = together.astype(np.float64)
    if job.within in ("row", "document"):
        strength = npmi(together, each[feature], each[partner], n_total)
    starts = np.flatnonzero(np.diff(feature, prepend=-1)).tolist()  # features rise
    strong = []
    for first, last in pairwise([*starts, len(feature)]):
        own = strength[first:last]
        least = np.partition(own, -STRONGEST)[-STRONGEST] if len(own) > STRONGEST else -np.inf
        strong.append(first + np.flatnonzero(~(own < least)))  # ties of the last one too: the smallest partners of them stay
    near = np.concatenate(strong) if strong else np.empty(0, np.int64)
    order = near[np.lexsort((partner[near], -strength[near], feature[near]))]
    place = np.arange(len(order)) - np.searchsorted(feature[order], feature[order])
    chosen = order[place < STRONGEST]
    return np.stack([feature[chosen], partner[chosen], together[chosen]], axis=1)


def widened(job: Job, shard: Shard, reach: int) -> tuple[NDArray[Any], NDArray[np.bool_], NDArray[Any], NDArray[np.bool_]]:
    """A shard's (indices, fired) (n, k), and (n, K) of all features in the rows up to `reach` places away, each once.

    Rows of one window may lie in several shards: those that hold rows of this shard's windows are read too.
    """
    codes = job.open()
    record = codes.segments[shard.segment].parts[shard.part]
    first_row = codes.table(shard.segment, paths.window_table(shard.part, paths.FIRST_ROW)).astype(np.int64)
    bounds = np.append(np.sort(first_row), record.n_rows)
    begin = bounds[np.searchsorted(bounds, shard.start, side="right") - 1]
    end = bounds[np.searchsorted(bounds, shard.stop - 1, side="right")]
    others = [
        other
        for other in codes.shards(shard.part)
        if other.segment == shard.segment and other.start < end and other.stop > begin
    ]
    columns = [row_columns(job, other) for other in others]
    window, position, document = (
        np.concatenate([column[name] for column in columns]) for name in ("windows", "positions", "documents")
    )
    indices, values = (np.concatenate([codes.read(o, f"codes/{name}") for o in others]) for name in ("index", "value"))
    fired = values > 0
    stride = codes.manifest.policy.context + 2 * reach  # so that a place outside a window is in no other
    key = window * stride + position + reach
    order = np.argsort(key, kind="stable")
    own = np.concatenate([np.full(o.n_rows, o == shard) for o in others])
    mine = np.flatnonzero(own)
    near, near_fired = [], []
    for step in range(-reach, reach + 1):
        place = np.minimum(np.searchsorted(key[order], key[mine] + step), len(order) - 1)
        row = order[place]
        is_there = (key[row] == key[mine] + step) & (document[row] == document[mine])
        near.append(indices[row])
        near_fired.append(fired[row] & is_there[:, None])
    wide = np.where(np.concatenate(near_fired, axis=1), np.concatenate(near, axis=1).astype(np.int64), job.extent.n_features)
    wide.sort(axis=1)
    once = wide < job.extent.n_features
    once[:, 1:] &= wide[:, 1:] != wide[:, :-1]
    return indices[mine], fired[mine], np.where(once, wide, 0).astype(indices.dtype), once


def _count_documents(job: Job, start: int, stop: int) -> NDArray[Any]:
    """(stop - start, F) documents in which both fire. Holds every (feature, document) pair of the corpus."""
    work = open_place(job.work_url)
    features, documents = [], []
    for shard in [s for part in ("train", "heldout") for s in job.open().shards(part)]:
        bundle = Bundle(work, shard_name(shard))
        features.append(np.repeat(np.arange(job.extent.n_features), np.diff(bundle.read("documents/starts"))))
        documents.append(bundle.read("documents/columns"))
    place = (np.concatenate(documents).astype(np.int64), np.concatenate(features))
    fired = sp.csr_array((np.ones(len(place[0]), np.int32), place), shape=(job.extent.n_documents, job.extent.n_features))
    fired.data[:] = 1  # fires there, however often and in however many shards
    tile = sp.csr_array(fired[:, start:stop])
    return np.asarray((tile.T @ fired).toarray())


def done(tile: int) -> str:
    """The name of a written tile's facts."""
    return f"pairs/{tile:06d}"
