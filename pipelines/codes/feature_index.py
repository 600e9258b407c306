"""The feature index of a code store: every firing of a feature, strongest first, in one contiguous read.

Three arrays in the group `data.zarr/index`: `starts` (F + 1,), and entry by entry `rows` and `values`; the entries of
feature f are [starts[f], starts[f + 1]), by falling value, ties by row. A row's number counts all rows of the
store: segment after segment, in each the training part and then the held-out one. docs/FORMAT.md, section 8.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from actstore import paths
from actstore.arrays import Unreadable, read_table
from actstore.errors import DamagedStore, IncompleteStore, InputError
from actstore.files import object_entry
from actstore.index_record import IndexRecord
from actstore.layout import Layout
from actstore.reader import Shard
from actstore.schema import PARTS, RowArray
from actstore.shard_chunks import ShardChunks
from pipelines.codes.code_store import CodeStore

SHARD_ENTRIES, CHUNK_ENTRIES = 1 << 21, 4096
STARTS = "starts"


class Firings(NamedTuple):
    """One feature's rows (n,) and values (n,), by falling value, ties by row."""

    rows: NDArray[np.int64]
    values: NDArray[np.float32]


class RowPlaces(NamedTuple):
    """Where rows stand, (n,) each; `token_index` is the place in the segment's token table, -1 at a start of text."""

    segment: NDArray[np.int64]
    window: NDArray[np.int64]
    position: NDArray[np.int64]
    token_index: NDArray[np.int64]
    token: NDArray[np.int64]
    document: NDArray[np.int64]


@dataclass(frozen=True)
class RowNumbers:
    """Which row of the whole store is which row of which shard."""

    shards: list[Shard]
    first: NDArray[np.int64]
    """(n_shards,) the number of each shard's first row."""
    n_rows: int

    @classmethod
    def of(cls, codes: CodeStore) -> RowNumbers:
        order = {part: number for number, part in enumerate(PARTS)}
        shards = [shard for part in PARTS for shard in codes.shards(part)]
        shards.sort(key=lambda shard: (shard.segment, order[shard.part], shard.index))
        ends = np.cumsum([0, *(shard.n_rows for shard in shards)], dtype=np.int64)
        return cls(shards, ends[:-1], int(ends[-1]))

    def locate(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(n,) which of `shards` each row lies in, and its place there."""
        shard = np.searchsorted(self.first, rows, side="right") - 1
        return shard, rows - self.first[shard]


def index_layout(n_entries: int) -> Layout:
    """How that many entries are cut into objects and chunks.

    >>> index_layout(10), index_layout(10_000_000).n_shards
    (Layout(n_rows=10, shard_rows=4096, chunk_rows=4096), 5)
    """
    n_chunks = max(1, -(-n_entries // CHUNK_ENTRIES))
    return Layout(n_entries, min(SHARD_ENTRIES, n_chunks * CHUNK_ENTRIES), CHUNK_ENTRIES)


def index_arrays(codes: CodeStore, n_rows: int) -> tuple[RowArray, RowArray]:
    """`rows` and `values` of an index over that many rows."""
    row_dtype = np.min_scalar_type(max(n_rows - 1, 0)).name
    value_dtype = codes.manifest.array(paths.CODE_VALUE).dtype
    return RowArray("rows", 0, row_dtype, "packed"), RowArray("values", 0, value_dtype, "packed")


class FeatureIndex:
    """A code store's feature index, opened for reading; nothing but what is asked for is read.

    Raises IncompleteStore when the store has none, or one of other codes; DamagedStore when its record was changed.
    """

    def __init__(self, codes: CodeStore):
        self.codes = codes
        record = read_index_record(codes)
        if record is None:
            raise IncompleteStore(
                f"{codes.url}: has no feature index; run `encode` again with the same arguments to make it."
            )
        if record.snapshot != codes.snapshot:
            raise IncompleteStore(
                f"{codes.url}: its feature index is of snapshot {record.snapshot}, the codes are {codes.snapshot}; "
                "run `encode` again with the same arguments to make it anew."
            )
        self.record, self.layout = record, record.layout
        self._arrays = index_arrays(codes, self.numbers.n_rows)
        self._chunks: dict[str, ShardChunks] = {}

    @cached_property
    def numbers(self) -> RowNumbers:
        return RowNumbers.of(self.codes)

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """(F + 1,) where each feature's entries begin."""
        prefix = f"{paths.INDEX}/{STARTS}/"
        objects = {}
        for name, entry in self.record.objects.items():
            if name.startswith(prefix):
                objects[name.removeprefix(prefix)] = data = self._read(name)
                if object_entry(data) != entry:
                    raise self._damaged(name, "its bytes are not those that were committed")
        try:
            starts = np.asarray(read_table(objects), np.int64)
        except Unreadable as error:
            raise self._damaged(prefix, error) from error
        bounds = np.array([0, *starts, self.record.entries])
        if starts.shape != (self.codes.n_features + 1,) or (np.diff(bounds) < 0).any() or bounds[-1] != starts[-1]:
            raise self._damaged(prefix, f"{len(starts):,} starts do not divide {self.record.entries:,} entries")
        return starts

    def fires(self, feature: int) -> int:
        """In how many rows a feature fires. Raises InputError for an id that is not a feature's."""
        first, last = self._range(feature)
        return last - first

    def firings(self, feature: int) -> Firings:
        """Every firing of a feature, strongest first."""
        return self._entries(*self._range(feature))

    def top(self, feature: int, n: int) -> Firings:
        """A feature's n strongest firings, or as many as there are."""
        first, last = self._range(feature)
        return self._entries(first, min(first + n, last))

    def ranks(self, feature: int, first: int, last: int) -> Firings:
        """The firings from rank `first` to before rank `last`, rank 0 the strongest: what a stratum of values is."""
        start, stop = self._range(feature)
        return self._entries(min(start + first, stop), min(start + last, stop))

    def places(self, rows: NDArray[np.int64]) -> RowPlaces:
        """Where rows stand in the text. Reads a chunk of `rows/window` and `rows/position` for each that is touched."""
        n = len(rows)
        where = RowPlaces(*(np.zeros(n, np.int64) for _ in RowPlaces._fields))
        which, place = self.numbers.locate(rows)
        chunk = place // np.array([shard.chunk_rows for shard in self.numbers.shards])[which]
        for number, own in np.unique(np.stack([which, chunk], axis=1), axis=0).tolist():
            shard, mine = self.numbers.shards[number], np.flatnonzero((which == number) & (chunk == own))
            inside = place[mine] - own * shard.chunk_rows
            where.segment[mine] = shard.segment
            where.window[mine] = self.codes.read_chunk(shard, paths.WINDOW, own)[inside]
            where.position[mine] = self.codes.read_chunk(shard, paths.POSITION, own)[inside]
        parts = np.array([(shard.segment, PARTS.index(shard.part)) for shard in self.numbers.shards]).reshape(-1, 2)[which]
        for segment, part in np.unique(parts, axis=0).tolist():
            self._texts(segment, PARTS[part], where, np.flatnonzero((parts == (segment, part)).all(axis=1)))
        return where

    def _texts(self, segment: int, part: str, places: RowPlaces, mine: NDArray[np.int64]) -> None:
        """Fill in token and document of rows of one part whose window and position are known."""
        policy = self.codes.manifest.policy
        starts = self.codes.table_at(segment, paths.window_table(part, paths.TOKEN_START), places.window[mine])
        token = policy.token_at(starts, places.position[mine])
        ids = self.codes.table_at(segment, paths.TOKEN_IDS, token).astype(np.int64)
        places.token_index[mine] = index = policy.token_index(starts, places.position[mine])
        places.token[mine] = np.where(index >= 0, ids, policy.bos_token_id)
        places.document[mine] = self.codes.documents_of(segment, token)

    def _range(self, feature: int) -> tuple[int, int]:
        if not 0 <= feature < self.codes.n_features:
            raise InputError(
                f"feature {feature}: {self.codes.url} has {self.codes.n_features} features; "
                f"choose 0 to {self.codes.n_features - 1}."
            )
        return int(self.starts[feature]), int(self.starts[feature + 1])

    def _entries(self, first: int, last: int) -> Firings:
        rows, values = (self._slice(array, first, last) for array in self._arrays)
        return Firings(rows.astype(np.int64), values.astype(np.float32))

    def _slice(self, array: RowArray, first: int, last: int) -> NDArray[Any]:
        """Entries [first, last) of an array: the chunks that hold them, in one read of each object."""
        pieces = list(self._pieces(first, last))
        with ThreadPoolExecutor(self.codes.place.readers) as pool:
            parts = list(pool.map(lambda piece: self._piece(array, *piece), pieces))
        return np.concatenate(parts) if parts else np.empty(0, array.dtype)

    def _pieces(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """(shard, first, last) with entries counted in the shard."""
        size = self.layout.shard_rows
        for shard in range(first // size, -(-last // size)):
            if (stop := min(last - shard * size, size)) > (start := max(first - shard * size, 0)):
                yield shard, start, stop

    def _piece(self, array: RowArray, shard: int, first: int, last: int) -> NDArray[Any]:
        size, name = self.layout.chunk_rows, paths.index_object(array.name, shard)
        first_chunk, last_chunk = first // size, -(-last // size)
        kept = np.empty((last_chunk - first_chunk) * size, array.dtype)
        try:
            if name not in self._chunks:
                entry = self.record.objects[name]
                self._chunks[name] = ShardChunks.open(self.codes.place, name, array, entry, self.layout, shard)
            self._chunks[name].read(first_chunk, last_chunk, kept)
        except (Unreadable, FileNotFoundError, KeyError) as error:
            raise self._damaged(name, error) from error
        return kept[first - first_chunk * size : last - first_chunk * size]

    def _read(self, name: str) -> bytes:
        try:
            return self.codes.place.read(name)
        except FileNotFoundError as error:
            raise self._damaged(name, "it is missing") from error

    def _damaged(self, name: str, what: object) -> DamagedStore:
        return DamagedStore(
            f"{self.codes.url}: {name}: {what}; `actstore repair` drops the feature index, and `encode` then makes it again."
        )


def read_index_record(codes: CodeStore) -> IndexRecord | None:
    """The record of a finished index; None where there is no index."""
    try:
        data = codes.place.read(paths.INDEX_RECORD)
    except FileNotFoundError:
        return None
    return IndexRecord.from_bytes(data, f"{codes.url}: {paths.INDEX_RECORD}")
