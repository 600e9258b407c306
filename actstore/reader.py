"""Open a store, count and read its committed rows, and find the text behind a row.

Readers trust commit records, never an array's shape: only committed shards exist. A committed object that is
missing or has another length is an error, never fill values, and every chunk's crc32c is checked as it is read; tables
are compared with the segment's record when they are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore import paths
from actstore.arrays import Unreadable, read_table
from actstore.encodings.channels import Channels
from actstore.errors import DamagedStore, IdentityMismatch, IncompleteStore, InputError, NotAStore
from actstore.files import Entry, content_hash, object_entry
from actstore.moments import SiteStatistics
from actstore.open_place import absolute, open_place
from actstore.place import Place
from actstore.records import Records, read_manifest
from actstore.schema import PARTS, TABLE_CHUNK, RowArray
from actstore.segment_record import SegmentRecord, ShardRecord, SiteRecord
from actstore.shard_chunks import ShardChunks
from actstore.tables import Tables, document_names


@dataclass(frozen=True)
class Shard:
    """A committed shard: the unit of work of everything that scans a store."""

    segment: int
    part: str
    index: int
    start: int
    stop: int
    chunk_rows: int

    @property
    def n_rows(self) -> int:
        return self.stop - self.start

    @property
    def n_chunks(self) -> int:
        return -(-self.n_rows // self.chunk_rows)

    def n_chunk_rows(self, chunk: int) -> int:
        """Rows of one chunk; the last of a shard may be short."""
        return min(self.chunk_rows, self.n_rows - chunk * self.chunk_rows)


@dataclass(frozen=True)
class RowOrigin:
    """Where a row comes from: its token, and the document that holds it."""

    segment: int
    shard: int
    window: int
    position: int
    token_index: int
    """Place in the segment's token table; -1 for a start-of-text position."""
    document: int
    document_name: str
    document_start: int
    document_stop: int


class Store:
    """A store opened for reading, pinned to the shards that are committed now.

    `url` is a path or such as s3://bucket/prefix. With `snapshot`, pinned to what that snapshot of this store named,
    however much was added since. Raises NotAStore when there is none, or one of another kind than `kind`; IncompleteStore
    unless every shard is committed or `partial` is given; IdentityMismatch when the snapshot is not of this store.
    """

    kind: str | None = None

    def __init__(self, url: str | Path | Place, *, partial: bool = False, snapshot: str | None = None):
        self.place = open_place(url)
        self.manifest = read_manifest(self.place)
        if self.kind is not None and self.manifest.kind != self.kind:
            raise NotAStore(f"{self.place}: holds {self.manifest.kind}, {self.kind} are needed; pass the other folder.")
        self._records = Records(self.place)
        self.segments = self._records.segments
        for segment in self.segments:
            if segment.store_id != self.store_id:
                raise self._damaged(paths.MANIFEST, f"is of store {self.store_id}, the segments of {segment.store_id}")
        seal = self._records.seal(0)
        if seal is not None and seal.manifest.encode() != self.manifest.to_bytes():
            raise self._damaged(paths.MANIFEST, "is not the manifest that was sealed")
        self._shards = [self._segment_shards(segment) for segment in self.segments]
        self._objects: dict[Shard, dict[str, Entry]] = {}
        self._opened: dict[tuple[Shard, str], ShardChunks] = {}
        self._tables: dict[tuple[int, str], NDArray[Any]] = {}
        self._channels: dict[tuple[int, str], Channels] = {}
        if snapshot is not None:
            self._pin(snapshot)
        elif not partial:
            self._require_complete()

    def _segment_shards(self, segment: SegmentRecord) -> dict[str, list[Shard]]:
        return {
            part: [
                Shard(segment.index, part, index, *record.layout.shard_range(index), record.chunk_rows)
                for index in self._records.shards(segment, part)
            ]
            for part, record in segment.parts.items()
        }

    def _require_complete(self) -> None:
        committed = sum(len(shards) for parts in self._shards for shards in parts.values())
        planned = sum(record.layout.n_shards for segment in self.segments for record in segment.parts.values())
        if not self.segments or committed < planned:
            raise IncompleteStore(
                f"{self.place}: half-written, {committed} of {planned or 'its'} shards are committed; run the command that "
                "was writing it again with the same arguments to finish it."
            )

    def _pin(self, snapshot: str) -> None:
        """Leave out the segments that were added after a snapshot."""
        everything = self.segments, self._shards
        for n_segments in range(len(everything[0]), -1, -1):
            self.segments, self._shards = everything[0][:n_segments], everything[1][:n_segments]
            if self.snapshot == snapshot:
                return
        self.segments, self._shards = everything
        raise IdentityMismatch(
            f"{self.place}: has snapshot {self.snapshot} and never had {snapshot}; pass the store that was meant, or show "
            "every worker the same disk."
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the same place, pinned to the same shards."""
        return (_open_pinned, (type(self), absolute(self.place.url), self.snapshot))

    def __repr__(self) -> str:
        """Place, rows, what is kept of a row, and the snapshot, on one line."""
        rows = " + ".join(f"{self.n_rows(part):,} {part}" for part in PARTS)
        kept = ", ".join(
            f"{paths.site_of(array.name)} ({array.width} x {array.encoding if paths.is_acts(array.name) else array.dtype})"
            for array in self.manifest.arrays
            if array.width
        )
        return f"<{type(self).__name__} {self.url}: {rows} rows of {kept}; snapshot {self.snapshot}>"

    @property
    def url(self) -> str:
        return self.place.url

    @property
    def store_id(self) -> str:
        return self.manifest.store_id

    @property
    def snapshot(self) -> str:
        """Sixteen hex digits naming exactly the committed shards, of this store, that this reader sees."""
        ids = [segment.content_id for segment in self.segments]
        shards = [[ids[shard.segment], shard.part, shard.index] for part in PARTS for shard in self.shards(part)]
        return content_hash([self.store_id, shards])[:16]

    def shards(self, part: str = "train") -> list[Shard]:
        """The committed shards of a split, in order."""
        return [shard for parts in self._shards for shard in parts.get(part, [])]

    def n_rows(self, part: str = "train") -> int:
        """Committed rows of a split."""
        return sum(shard.n_rows for shard in self.shards(part))

    @property
    def disk_bytes(self) -> int:
        """Bytes of every object of the store."""
        return sum(self.place.names().values())

    def table(self, segment: int, name: str) -> NDArray[Any]:
        """A whole table of a segment, such as `tokens/ids` or `train/windows/token_start`. Read-only.

        Raises DamagedStore when an object of it is missing or differs from what was recorded.
        """
        table = self._tables.get((segment, name))
        if table is None:
            table = self._read_table(segment, name)
            table.flags.writeable = False
            mine = {key: kept for key, kept in self._tables.items() if key[0] == segment}  # enough in memory
            self._tables = {**mine, (segment, name): table}  # a new one, since other threads may look at the old
        return table

    def table_at(self, segment: int, name: str, places: NDArray[np.int64]) -> NDArray[Any]:
        """The values at some places of a table of one dimension; only the chunks that hold them are read.

        Raises DamagedStore as `table` does.
        """
        if (table := self._tables.get((segment, name))) is not None:
            return np.asarray(table[places])
        return self._read_table(segment, name, places)

    def _read_table(self, segment: int, name: str, places: NDArray[np.int64] | None = None) -> NDArray[Any]:
        prefix = f"{paths.array(segment, name)}/"
        entries = {key: entry for key, entry in self.segments[segment].objects.items() if key.startswith(prefix)}
        if places is not None:
            needed = {"zarr.json", *(f"c/{chunk}" for chunk in np.unique(places // TABLE_CHUNK).tolist())}
            entries = {key: entry for key, entry in entries.items() if key.removeprefix(prefix) in needed}
        objects = {}
        for key, entry in entries.items():
            objects[key.removeprefix(prefix)] = data = self._read(key)
            if object_entry(data) != entry:
                raise self._damaged(key, "its bytes are not those that were committed")
        try:
            return read_table(objects, places)
        except Unreadable as error:
            raise self._damaged(prefix, error) from error

    def text_tables(self, segment: int) -> Tables:
        """The tables that say which text a segment holds, in which windows: what a store of other rows of it takes over."""
        names = [*paths.TABLES, *(paths.window_table(part, name) for part in PARTS for name in paths.WINDOW_TABLES)]
        return {name: self.table(segment, name) for name in names}

    def tokenizer_file(self, name: str = "tokenizer.json") -> bytes:
        """A file of the store's copy of the tokenizer. Raises DamagedStore when it is missing or was changed."""
        key = f"{paths.TOKENIZER}/{name}"
        data = self._read(key)
        if object_entry(data) != self.manifest.provenance["tokenizer_files"].get(name):
            raise self._damaged(key, "its bytes are not those that were committed")
        return data

    def tokenizer_files(self) -> dict[str, bytes]:
        """Every file of the store's copy of the tokenizer."""
        return {name: self.tokenizer_file(name) for name in self.manifest.provenance["tokenizer_files"]}

    def read(self, shard: Shard, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Rows [start, stop) of a shard, decoded: float32 for activations, the plain integers for tables.

        Raises DamagedStore when the object is missing, has another length than committed, or fails its checksum.
        """
        array = self.manifest.array(name)
        stop = shard.n_rows if stop is None else min(stop, shard.n_rows)
        kept = self._kept_rows(shard, array, start, stop)
        if array.kept_as.is_alone:
            return array.kept_as.decode(kept)
        scale = channels = None
        if array.kept_as.has_scale:
            scale = self._kept_rows(shard, self.manifest.array(paths.scales(paths.site_of(name))), start, stop)
        if array.kept_as.needs_channels:
            channels = self.channels(shard.segment, name)
        return array.kept_as.decode(kept, scale, channels)

    def read_chunk(self, shard: Shard, name: str, chunk: int) -> NDArray[Any]:
        """One chunk of a shard, decoded."""
        return self.read(shard, name, chunk * shard.chunk_rows, (chunk + 1) * shard.chunk_rows)

    def read_kept_chunk(self, shard: Shard, name: str, chunk: int, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """One chunk of a shard as its encoding keeps it, checked; in `out`, (chunk_rows, width), when given."""
        if out is None:
            array = self.manifest.array(name)
            out = np.empty((shard.chunk_rows, *array.tail), array.dtype)
        self._read_chunks(shard, name, chunk, chunk + 1, out)
        return out[: shard.n_chunk_rows(chunk)]

    def channels(self, segment: int, name: str) -> Channels:
        """What the rows of a site's array, such as `acts/resid_post.3`, are measured by in a segment."""
        if (segment, name) not in self._channels:
            self._channels[segment, name] = Channels.from_table(self.table(segment, paths.channels(paths.site_of(name))))
        return self._channels[segment, name]

    def token_ids(self, shard: Shard) -> NDArray[np.int64]:
        """(n_rows,) the token each row of a shard stands at."""
        index = self.token_index(shard)
        ids = self.table(shard.segment, paths.TOKEN_IDS)[index].astype(np.int64)
        return np.where(index >= 0, ids, self.manifest.policy.bos_token_id)

    def token_index(self, shard: Shard) -> NDArray[np.int64]:
        """(n_rows,) each row's place in the segment's token table; -1 for a start-of-text position."""
        return self._places(shard)[2]

    def documents(self, shard: Shard) -> NDArray[np.int64]:
        """(n_rows,) the document of its segment that each row stands in; a start of text, in that of the token after it."""
        return self.documents_of(shard.segment, self._places(shard)[3])

    def documents_of(self, segment: int, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """(n,) the document in which each of n places of a segment's token table lies."""
        offsets = self.table(segment, paths.DOCUMENT_OFFSETS)
        return np.asarray(np.searchsorted(offsets, tokens, side="right") - 1, np.int64)

    def document_names(self, segment: int) -> list[str]:
        return document_names(self.table(segment, paths.DOCUMENT_SOURCE))

    def document_keys(self, segment: int) -> NDArray[np.uint64]:
        """(n_documents,) the key of each document's whole text: equal texts have equal keys."""
        return np.asarray(self.table(segment, paths.DOCUMENT_KEYS), np.uint64)

    def locate(self, row: int, part: str = "train") -> RowOrigin:
        """Where the row-th committed row of a split comes from. Raises InputError when there are not so many."""
        before = 0
        for shard in self.shards(part):
            if before <= row < before + shard.n_rows:
                window, position, index, token = self._places(shard, row - before, row - before + 1)
                document = int(self.documents_of(shard.segment, token)[0])
                offsets = self.table(shard.segment, paths.DOCUMENT_OFFSETS)
                return RowOrigin(
                    segment=shard.segment,
                    shard=shard.index,
                    window=int(window[0]),
                    position=int(position[0]),
                    token_index=int(index[0]),
                    document=document,
                    document_name=self.document_names(shard.segment)[document],
                    document_start=int(offsets[document]),
                    document_stop=int(offsets[document + 1]),
                )
            before += shard.n_rows
        raise InputError(f"{self.place}: has {before:,} {part} rows, row {row:,} was asked for; count from 0.")

    def statistics(self, site: str, part: str = "train") -> SiteStatistics:
        """What is recorded of a site's rows, over the committed shards of a split."""
        shards = self.shards(part)
        return SiteStatistics.of_records(
            (shard.n_rows, own) for shard, own in zip(shards, self._site_records(site, part), strict=True)
        )

    def objects(self, shard: Shard) -> dict[str, Entry]:
        """The entry of each object that a shard's commit record names."""
        if shard not in self._objects:
            self._objects[shard] = self._record(shard).objects
        return self._objects[shard]

    def notes(self, shard: Shard) -> dict[str, Any]:
        """What a shard's commit record says besides its rows and objects: statistics, and what computed them."""
        return self._record(shard).notes

    def _site_records(self, site: str, part: str) -> Iterator[SiteRecord]:
        """What each shard's record says of a site; from a server, several are read at a time."""
        with ThreadPoolExecutor(self.place.readers) as pool:
            yield from pool.map(lambda shard: self._record(shard).stats[site], self.shards(part))

    def _places(self, shard: Shard, start: int = 0, stop: int | None = None) -> tuple[NDArray[np.int64], ...]:
        """Rows [start, stop) of a shard, (n,) each: window, position, token index, and token to tell the document by."""
        window, position = (self.read(shard, name, start, stop).astype(np.int64) for name in paths.ROW_PLACES)
        starts = self.table(shard.segment, paths.window_table(shard.part, paths.TOKEN_START))[window]
        policy = self.manifest.policy
        return window, position, policy.token_index(starts, position), policy.token_at(starts, position)

    def _record(self, shard: Shard) -> ShardRecord:
        """A shard's commit record. Raises DamagedStore when it is that of another shard."""
        record = self._records.shard(shard.segment, shard.part, shard.index)
        if not record.is_of(self.manifest, self.segments[shard.segment], shard.part, shard.index):
            raise self._damaged(paths.shard_record(shard.segment, shard.part, shard.index), "is of another shard")
        return record

    def _kept_rows(self, shard: Shard, array: RowArray, start: int, stop: int) -> NDArray[Any]:
        """Rows [start, stop) of a shard as the encoding keeps them."""
        if start >= stop:
            return np.empty((0, *array.tail), array.dtype)
        size = shard.chunk_rows
        first, last = start // size, -(-stop // size)
        kept = np.empty(((last - first) * size, *array.tail), array.dtype)
        self._read_chunks(shard, array.name, first, last, kept)
        return kept[start - first * size : stop - first * size]

    def _read_chunks(self, shard: Shard, name: str, first: int, last: int, out: NDArray[Any]) -> None:
        """Whole chunks [first, last) of an array of a shard into `out`, checked."""
        chunks = self._chunks(shard, name)
        try:
            chunks.read(first, last, out)
        except (Unreadable, FileNotFoundError) as error:
            raise self._damaged(chunks.key, error) from error

    def _chunks(self, shard: Shard, name: str) -> ShardChunks:
        """The chunks of an array of a shard, whose object is as long as was committed."""
        if (shard, name) not in self._opened:
            array = self.manifest.array(name)
            key = paths.shard_object(shard.segment, shard.part, name, shard.index, 1 + len(array.tail))
            committed = self.objects(shard)[key]
            layout = self.segments[shard.segment].parts[shard.part].layout
            try:
                self._opened[shard, name] = ShardChunks.open(self.place, key, array, committed, layout, shard.index)
            except (Unreadable, FileNotFoundError) as error:
                raise self._damaged(key, error) from error
        return self._opened[shard, name]

    def _read(self, key: str) -> bytes:
        try:
            return self.place.read(key)
        except FileNotFoundError as error:
            raise self._damaged(key, "it is missing") from error

    def _damaged(self, key: str, what: object) -> DamagedStore:
        return DamagedStore(
            f"{self.place}: {key}: {what}; `actstore verify` lists every fault, `actstore repair` drops what is damaged, "
            "and the command that wrote the store then fills it in again."
        )


class ActivationStore(Store):
    """A store of residual-stream rows."""

    kind = "activations"

    @property
    def sites(self) -> list[str]:
        """The collected sites, such as `resid_post.3`."""
        return self.manifest.sites

    def site(self, name: str | None = None, layer: int | None = None) -> str:
        """The one collected site of a name and a layer, where given.

        Raises InputError when none fits, or several do.
        """
        fitting = [site for site in self.sites if _fits(site, name, layer)]
        if len(fitting) == 1:
            return fitting[0]
        asked = ".".join(str(part) for part in (name, layer) if part is not None) or "what was asked"
        what = "several sites fit" if fitting else "has no site"
        raise InputError(
            f"{self.place}: {what} {asked}; it holds {', '.join(self.sites)}: choose one with --layer and --site."
        )

    def d_model(self, site: str) -> int:
        return self.manifest.d_model(site)


def _fits(site: str, name: str | None, layer: int | None) -> bool:
    own_name, _, own_layer = site.rpartition(".")
    return name in (None, own_name) and str(layer) in ("None", own_layer)


def _open_pinned(kind: type[Store], url: str, snapshot: str) -> Store:
    return kind(url, snapshot=snapshot)
