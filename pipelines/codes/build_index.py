"""Making a code store's feature index: an external sort of all firings, as Dask tasks.

First one task a shard sorts its firings and publishes them as runs, and tells every so-many-th key of each. From these
samples follows between which places of the runs the entries of each object of the index must lie; then one task an
object reads those, merges them, and keeps exactly its own. So memory depends on the sizes of a run and an object, not on
the number of rows, and the bytes on neither: the order of (feature, falling value, row) is total.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore import paths
from actstore.arrays import group_objects, shard_entry, shard_object
from actstore.errors import DamagedStore
from actstore.files import Entry, object_entry, record_bytes
from actstore.layout import Layout
from actstore.open_place import absolute, open_place
from actstore.reader import Shard
from pipelines.codes.code_store import CodeStore, open_codes, read_codes
from pipelines.codes.feature_index import SHARD_ENTRIES, STARTS, RowNumbers, index_arrays, index_layout, read_index_record
from pipelines.shared.cluster import run_tasks

RUN_ENTRIES = 1 << 22
"""Firings of one run: 32 MiB."""
VALUE_BITS = 31
VALUE_MASK = (1 << VALUE_BITS) - 1
MOST_BETWEEN, LEAST_BETWEEN = 1024, 256
"""Entries from one sample of a run to the next."""

Keys = NDArray[np.uint64]


@dataclass(frozen=True)
class Run:
    """Some rows' firings as one sorted object: how many, the number of the first row, and a sample of the keys."""

    name: str
    n_entries: int
    first_row: int
    samples: Keys


@dataclass(frozen=True)
class SortedShard:
    """What sorting a shard gave: its runs, (F,) firings of each feature, and a checksum of all entries."""

    runs: list[Run]
    fires: NDArray[np.int64]
    checksum: int


@dataclass(frozen=True)
class KeyForm:
    """A firing's key of 64 bits: feature, the value's bits inverted (so that larger ones come first), row inside its run.

    The bits of positive float32s, as integers, are in the order of the floats.
    """

    n_features: int
    run_rows: int

    @classmethod
    def choose(cls, n_features: int, k: int) -> KeyForm:
        feature_bits = max(1, (n_features - 1).bit_length())
        return cls(n_features, max(1, min(1 << (64 - VALUE_BITS - feature_bits), RUN_ENTRIES // k)))

    @property
    def row_bits(self) -> int:
        return (self.run_rows - 1).bit_length()

    def pack(self, feature: NDArray[np.int64], value: NDArray[np.float32], row: NDArray[np.int64]) -> Keys:
        key = feature.astype(np.uint64) << np.uint64(VALUE_BITS)
        key |= np.uint64(VALUE_MASK) - value.view(np.uint32).astype(np.uint64)
        key <<= np.uint64(self.row_bits)
        key |= row.astype(np.uint64)
        return key

    def key(self, packed: Keys) -> Keys:
        """The keys without their row."""
        return packed >> np.uint64(self.row_bits)

    def row(self, packed: Keys) -> NDArray[np.int64]:
        return (packed & np.uint64((1 << self.row_bits) - 1)).astype(np.int64)


def value_of(key: Keys) -> NDArray[np.float32]:
    """The value that a key without its row holds."""
    return (np.uint64(VALUE_MASK) - (key & np.uint64(VALUE_MASK))).astype(np.uint32).view(np.float32)


def has_index(codes: CodeStore) -> bool:
    """Whether the index of exactly these codes exists, each object with the committed length."""
    try:
        record = read_index_record(codes)
    except DamagedStore:
        return False
    if record is None or record.snapshot != codes.snapshot:
        return False
    there = codes.place.names(paths.INDEX)
    return all(there.get(name) == entry["bytes"] for name, entry in record.objects.items())


def build_index(codes: CodeStore, client: Any) -> None:
    """Make the feature index of a finished code store, unless it is there. The caller holds the store's lock. Leftovers of
    an earlier attempt are removed first. Raises NoSpace, and DamagedStore when entries were changed on the way."""
    place = codes.place
    for name in place.names(paths.INDEX_RUNS):
        place.remove(name)
    if has_index(codes):
        return
    place.remove(paths.INDEX_RECORD)
    for name in place.names(paths.INDEX):
        place.remove(name)
    numbers, form = RowNumbers.of(codes), KeyForm.choose(codes.n_features, codes.k)
    between = samples_between(numbers.n_rows, form.run_rows)
    place.require_space(index_bytes_of(numbers.n_rows * codes.k), f"the feature index of {numbers.n_rows:,} rows")
    where = (absolute(codes.url), codes.snapshot)
    tasks = [
        (*where, shard, first, form, between) for shard, first in zip(numbers.shards, numbers.first.tolist(), strict=True)
    ]
    done: list[SortedShard] = run_tasks(client, "index, sort", sort_shard, tasks)
    runs = [run for shard in done for run in shard.runs]
    fires = sum((shard.fires for shard in done), np.zeros(codes.n_features, np.int64))
    layout = index_layout(int(fires.sum()))
    merges = [
        (*where, form, number, layout, pieces, skipped)
        for number, (pieces, skipped) in enumerate(plan_merges(runs, layout, between))
    ]
    merged = run_tasks(client, "index, merge", merge_shard, merges)
    if sum(checksum for _, checksum in merged) % (1 << 64) != sum(shard.checksum for shard in done) % (1 << 64):
        raise DamagedStore(
            f"{place}: firings were changed on the disk while they were sorted; check it, and run encode again."
        )
    _publish(codes, layout, numbers.n_rows, fires, {name: entry for entries, _ in merged for name, entry in entries.items()})
    for run in runs:
        place.remove(run.name)


def index_bytes_of(n_entries: int) -> int:
    """Bytes on disk while an index is made: runs of 8 bytes an entry, rows and values."""
    return n_entries * 16


def samples_between(n_rows: int, run_rows: int) -> int:
    """Entries from one sample to the next, chosen so that a task reads little more than its object's own entries."""
    n_runs = -(-n_rows // run_rows)
    return max(LEAST_BETWEEN, min(MOST_BETWEEN, SHARD_ENTRIES // (4 * max(n_runs, 1))))


def sort_shard(url: str, snapshot: str, shard: Shard, first_row: int, form: KeyForm, between: int) -> SortedShard:
    """Publish a shard's firings as sorted runs, of at most `form.run_rows` rows each. Runs on a worker."""
    codes = open_codes(url, snapshot)
    runs, fires, checksum = [], np.zeros(codes.n_features, np.int64), 0
    for start in range(0, shard.n_rows, form.run_rows):
        indices, values = read_codes(codes, shard, start, start + form.run_rows)
        row, slot = np.nonzero(values > 0)
        feature = indices[row, slot]
        packed = form.pack(feature, values[row, slot], row)
        packed.sort()
        fires += np.bincount(feature, minlength=len(fires))
        checksum += _checksum(form.key(packed), form.row(packed) + first_row + start)
        name = f"{paths.INDEX_RUNS}/{first_row + start:012d}"
        codes.place.publish(name, packed.astype("<u8", copy=False).tobytes())
        runs.append(Run(name, len(packed), first_row + start, form.key(packed[::between])))
    return SortedShard(runs, fires, checksum)


Piece = tuple[str, int, int, int]
"""Part of a run: its name, its first row's number, from which entry on, and to before which."""


def plan_merges(runs: list[Run], layout: Layout, between: int) -> list[tuple[list[Piece], int]]:
    """For each object of the index: the pieces of runs that hold all its entries, and how many entries lie before them.

    Samples in the order of (key, run, place in the run), which is that of (key, row), are what ranks are known of: with
    c_r of the first i samples in run r, between (c_r - 1) * `between` + 1 and c_r * `between` of its entries lie before
    sample i. Hence its rank is at most i * `between`, and at least (i - number of runs) * `between`.
    """
    run_of = np.repeat(np.arange(len(runs)), [len(run.samples) for run in runs])
    if not len(run_of):
        return []
    run_of = run_of[np.argsort(np.concatenate([run.samples for run in runs]), kind="stable")]
    ranges = [layout.shard_range(shard) for shard in range(layout.n_shards)]
    lowest = _counts(run_of, [first // between for first, _ in ranges], len(runs))
    highest = _counts(run_of, [-(-last // between) + len(runs) for _, last in ranges], len(runs))
    planned = []
    for low, high in zip(lowest, highest, strict=True):
        starts = np.maximum(low - 1, 0) * between
        stops = np.minimum(high * between, [run.n_entries for run in runs])
        pieces = [
            (run.name, run.first_row, start, stop)
            for run, start, stop in zip(runs, starts.tolist(), stops.tolist(), strict=True)
            if start < stop
        ]
        planned.append((pieces, int(starts.sum())))
    return planned


def _counts(run_of: NDArray[np.int64], bounds: list[int], n_runs: int) -> list[NDArray[np.int64]]:
    """For each of rising bounds i, (n_runs,) how many of the first i samples are of each run."""
    counts, before, counts_at = np.zeros(n_runs, np.int64), 0, []
    for bound in bounds:
        counts = counts + np.bincount(run_of[before:bound], minlength=n_runs)
        before = max(before, bound)
        counts_at.append(counts)
    return counts_at


def merge_shard(
    url: str, snapshot: str, form: KeyForm, number: int, layout: Layout, pieces: list[Piece], n_before: int
) -> tuple[dict[str, Entry], int]:
    """Publish one object of each array of the index; their entries, and a checksum. Runs on a worker.

    `n_before` entries of the whole index lie before those of the pieces.
    """
    place, codes = open_place(url), open_codes(url, snapshot)
    with ThreadPoolExecutor(place.readers) as pool:
        packed = np.concatenate(list(pool.map(partial(_read_piece, url), pieces)))
    key = form.key(packed)
    row = form.row(packed)
    row += np.repeat([piece[1] for piece in pieces], [piece[3] - piece[2] for piece in pieces])
    del packed
    first, last = layout.shard_range(number)
    order = np.argsort(key, kind="stable")[first - n_before : last - n_before]  # pieces are in the order of their rows
    key, row = key[order], row[order]
    entries = {}
    columns: tuple[NDArray[Any], ...] = (row, value_of(key))
    for array, kept in zip(index_arrays(codes, RowNumbers.of(codes).n_rows), columns, strict=True):
        name, data = paths.index_object(array.name, number), shard_object(array, layout, kept.astype(array.dtype))
        place.publish(name, data)
        entries[name] = shard_entry(data, layout, len(kept))
    return entries, _checksum(key, row)


def _read_piece(url: str, piece: Piece) -> Keys:
    name, _, start, stop = piece
    entries = np.empty(stop - start, "<u8")
    if open_place(url).read_into(name, 8 * start, entries.view(np.uint8).data) != entries.nbytes:
        raise DamagedStore(f"{url}: {name} ends early; run `encode` again to sort anew.")
    return entries.astype(np.uint64, copy=False)


def _checksum(key: Keys, row: NDArray[np.int64]) -> int:
    """The same for the same entries in any order, modulo 2^64: a sum of mixed bits (SplitMix64's finaliser)."""
    x = key * np.uint64(0x9E3779B97F4A7C15) + row.astype(np.uint64)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return int(x.sum(dtype=np.uint64))


def _publish(codes: CodeStore, layout: Layout, n_rows: int, fires: NDArray[np.int64], entries: dict[str, Entry]) -> None:
    """Metadata and starts, and last the record that makes the index exist."""
    starts = np.concatenate([[0], np.cumsum(fires)]).astype(np.int64)
    arrays = [(array.name, array, layout, layout.n_rows) for array in index_arrays(codes, n_rows)]
    group = paths.INDEX.removeprefix(f"{paths.DATA}/")
    dimensions = {STARTS: ("feature_bounds",)} | {array.name: ("entries",) for array in index_arrays(codes, n_rows)}
    for name, data in group_objects(group, {STARTS: starts}, arrays, dimensions).items():
        if name.startswith(f"{paths.INDEX}/"):  # the group above is the segments'
            codes.place.publish(name, data)
            entries[name] = object_entry(data)
    record = {"store_id": codes.store_id, "snapshot": codes.snapshot, "rows": n_rows, "entries": layout.n_rows}
    record |= {"shard_entries": layout.shard_rows, "chunk_entries": layout.chunk_rows, "objects": entries}
    codes.place.publish(paths.INDEX_RECORD, record_bytes(record))
