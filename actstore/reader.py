"""Open a store, count and read its committed rows, and find the text behind a row.

Readers trust commit records, never an array's shape: only committed shards exist. A committed object that is
missing or has another length is an error, never fill values, and every chunk's crc32c is checked as it is read; tables
are compared with the segment's record when they are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore import paths
from actstore.arrays import (
    CRC_BYTES,
    TABLE_CHUNK,
    Unreadable,
    check_chunk,
    index_bytes,
    is_compressed,
    neighbours,
    read_index,
    read_table,
    unpack_chunk,
)
from actstore.codecs import Channels, decode_rows
from actstore.errors import DamagedStore, IdentityMismatch, IncompleteStore, InputError, NotAStore
from actstore.files import content_hash, object_entry
from actstore.open_place import absolute, open_place
from actstore.place import Place
from actstore.records import Records, read_manifest
from actstore.schema import PARTS, RowArray, SegmentRecord

READ_BYTES, READ_CHUNKS = 16 << 20, 256
"""How much of a shard is asked for in one read, and in how many chunks."""


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


@dataclass(frozen=True)
class SiteStatistics:
    """Of a site's rows as the model gave them: how many, mean and second moment (d_model,), mean Euclidean norm."""

    n_rows: int
    mean: NDArray[np.float64]
    second_moment: NDArray[np.float64]
    mean_norm: float

    @property
    def deviation(self) -> NDArray[np.float64]:
        """(d_model,) standard deviation of each channel."""
        return np.sqrt(np.maximum(self.second_moment - np.square(self.mean), 0))


@dataclass(frozen=True)
class _ShardObject:
    """Where the chunks of one array of a shard lie: (offset, length) in the object `key`."""

    key: str
    array: RowArray
    is_compressed: bool
    chunks: list[tuple[int, int]]


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
        self._shards = [self._segment_shards(segment) for segment in self.segments]
        self._objects: dict[Shard, dict[str, dict[str, Any]]] = {}
        self._opened: dict[tuple[Shard, str], _ShardObject] = {}
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
        """Forget the segments that were added since a snapshot was taken."""
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

    def text_tables(self, segment: int) -> dict[str, NDArray[Any]]:
        """The tables that say which text a segment holds, in which windows: what a store of other rows of it takes over."""
        names = [*paths.TABLES, *(f"{part}/windows/{name}" for part in PARTS for name in paths.WINDOW_TABLES)]
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
        if array.encoding != "int8":
            return decode_rows(kept, array.encoding)
        scale = self._kept_rows(shard, self.manifest.array(scale_array(name)), start, stop)
        return decode_rows(kept, array.encoding, scale, self.channels(shard.segment, name))

    def read_chunk(self, shard: Shard, name: str, chunk: int) -> NDArray[Any]:
        """One chunk of a shard, decoded."""
        return self.read(shard, name, chunk * shard.chunk_rows, (chunk + 1) * shard.chunk_rows)

    def read_kept_chunk(self, shard: Shard, name: str, chunk: int, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """One chunk of a shard as its encoding keeps it, checked; in `out`, (chunk_rows, width), when given."""
        found = self._object(shard, name)
        if out is None:
            out = np.empty((shard.chunk_rows, *found.array.tail), found.array.dtype)
        self._read_chunks(found, chunk, chunk + 1, out)
        return out[: shard.n_chunk_rows(chunk)]

    def channels(self, segment: int, name: str) -> Channels:
        """What the int8 rows of an array are measured by in a segment."""
        if (segment, name) not in self._channels:
            self._channels[segment, name] = Channels.from_table(self.table(segment, channels_table(name)))
        return self._channels[segment, name]

    def token_ids(self, shard: Shard) -> NDArray[np.int64]:
        """(n_rows,) the token each row of a shard stands at."""
        index = self.token_index(shard)
        ids = self.table(shard.segment, "tokens/ids")[index].astype(np.int64)
        return np.where(index >= 0, ids, self.manifest.policy.bos_token_id)

    def token_index(self, shard: Shard) -> NDArray[np.int64]:
        """(n_rows,) each row's place in the segment's token table; -1 for a start-of-text position."""
        return self._places(shard)[2]

    def documents(self, shard: Shard) -> NDArray[np.int64]:
        """(n_rows,) the document of its segment that each row stands in; a start of text, in that of the token after it."""
        return self.documents_of(shard.segment, self._places(shard)[3])

    def documents_of(self, segment: int, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """(n,) the document in which each of n places of a segment's token table lies."""
        offsets = self.table(segment, "documents/offsets")
        return np.asarray(np.searchsorted(offsets, tokens, side="right") - 1, np.int64)

    def document_names(self, segment: int) -> list[str]:
        return bytes(self.table(segment, "documents/source")).decode().split("\n")

    def locate(self, row: int, part: str = "train") -> RowOrigin:
        """Where the row-th committed row of a split comes from. Raises InputError when there are not so many."""
        before = 0
        for shard in self.shards(part):
            if before <= row < before + shard.n_rows:
                window, position, index, token = self._places(shard, row - before, row - before + 1)
                document = int(self.documents_of(shard.segment, token)[0])
                offsets = self.table(shard.segment, "documents/offsets")
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
        total, mean, second, norm = 0, np.zeros(0), np.zeros(0), 0.0
        for shard, own in zip(self.shards(part), self._site_records(site, part), strict=True):
            weight = shard.n_rows / (total + shard.n_rows)
            own_mean, own_second = np.asarray(own["mean"]), np.asarray(own["second_moment"])
            mean = own_mean if not total else mean + (own_mean - mean) * weight
            second = own_second if not total else second + (own_second - second) * weight
            norm += (own["mean_norm"] - norm) * weight
            total += shard.n_rows
        return SiteStatistics(total, mean, second, norm)

    def objects(self, shard: Shard) -> dict[str, dict[str, Any]]:
        """The entry, `{bytes, sha256}`, of each object that a shard's commit record names."""
        if shard not in self._objects:
            self._objects[shard] = self._record(shard)["objects"]
        return self._objects[shard]

    def notes(self, shard: Shard) -> dict[str, Any]:
        """What a shard's commit record says besides its rows and objects: statistics, and what computed them."""
        record = self._record(shard)
        return {key: value for key, value in record.items() if key not in ("rows", "objects", "segment")}

    def _site_records(self, site: str, part: str) -> Iterator[dict[str, Any]]:
        """What each shard's record says of a site; from a server, several are read at a time."""
        with ThreadPoolExecutor(self.place.readers) as pool:
            yield from pool.map(lambda shard: self._record(shard)["stats"][site], self.shards(part))

    def _places(self, shard: Shard, start: int = 0, stop: int | None = None) -> tuple[NDArray[np.int64], ...]:
        """Of rows [start, stop) of a shard, (n,) each: window, position, token index, and token to tell the document by.

        A start-of-text position has index -1, and is in the document of the token after it.
        """
        window = self.read(shard, "rows/window", start, stop).astype(np.int64)
        position = self.read(shard, "rows/position", start, stop).astype(np.int64)
        starts = self.table(shard.segment, f"{shard.part}/windows/token_start")
        offset = position - int(self.manifest.policy.bos)
        token = starts[window] + np.maximum(offset, 0)
        return window, position, np.where(offset >= 0, token, -1), token

    def _record(self, shard: Shard) -> dict[str, Any]:
        """A shard's commit record. Raises DamagedStore when it is that of another shard."""
        record = self._records.shard(shard.segment, shard.part, shard.index)
        if not self.segments[shard.segment].is_record_of(record, shard.part, shard.index):
            raise self._damaged(paths.shard_record(shard.segment, shard.part, shard.index), "is of another shard")
        return record

    def _kept_rows(self, shard: Shard, array: RowArray, start: int, stop: int) -> NDArray[Any]:
        """Rows [start, stop) of a shard as the encoding keeps them."""
        if start >= stop:
            return np.empty((0, *array.tail), array.dtype)
        found, size = self._object(shard, array.name), shard.chunk_rows
        first, last = start // size, -(-stop // size)
        kept = np.empty(((last - first) * size, *array.tail), array.dtype)
        self._read_chunks(found, first, last, kept)
        return kept[start - first * size : stop - first * size]

    def _read_chunks(self, found: _ShardObject, first: int, last: int, out: NDArray[Any]) -> None:
        """Whole chunks [first, last) into `out`, checked; those that lie one behind another in one read."""
        parts = iter(out.reshape(last - first, -1).view(np.uint8))
        try:
            for together in neighbours(found.chunks[first:last], READ_BYTES, READ_CHUNKS):
                pieces = []
                for part, (_, n_bytes) in zip(islice(parts, len(together)), together, strict=True):
                    data = np.empty(n_bytes - CRC_BYTES, np.uint8) if found.is_compressed else part
                    pieces.append((part, data, bytearray(CRC_BYTES)))
                buffers = [buffer for _, data, crc in pieces for buffer in (data.data, memoryview(crc))]
                n_bytes = sum(buffer.nbytes for buffer in buffers)
                if (n_found := self.place.read_into(found.key, together[0][0], *buffers)) != n_bytes:
                    raise Unreadable(f"{n_bytes} bytes of chunks were expected, {n_found} are there")
                for part, data, crc in pieces:
                    check_chunk(data, crc)
                    if found.is_compressed:
                        unpack_chunk(data, part)
        except (Unreadable, FileNotFoundError) as error:
            raise self._damaged(found.key, error) from error

    def _object(self, shard: Shard, name: str) -> _ShardObject:
        """A shard's object of an array, once it has been found to be as long as was committed."""
        if (shard, name) not in self._opened:
            array = self.manifest.array(name)
            key = paths.shard_object(shard.segment, shard.part, name, shard.index, 1 + len(array.tail))
            committed = self.objects(shard)[key]["bytes"]
            n_bytes = self.place.n_bytes(key)
            if n_bytes is None:
                raise self._damaged(key, "it is missing")
            if n_bytes != committed:
                raise self._damaged(key, f"it has {n_bytes} bytes, {committed} were committed")
            index = bytearray(index_bytes(self.segments[shard.segment].parts[shard.part].layout))
            try:
                self.place.read_into(key, n_bytes - len(index), memoryview(index))
                chunks = [(offset, length) for offset, length in read_index(bytes(index), shard.n_chunks).tolist()]
            except (Unreadable, FileNotFoundError) as error:
                raise self._damaged(key, error) from error
            self._opened[shard, name] = _ShardObject(key, array, is_compressed(array), chunks)
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
        return self.manifest.array(f"acts/{site}").width


def _fits(site: str, name: str | None, layer: int | None) -> bool:
    own_name, _, own_layer = site.rpartition(".")
    return name in (None, own_name) and str(layer) in ("None", own_layer)


def scale_array(name: str) -> str:
    """The array of row scales beside an int8 `acts/<site>`."""
    return name.replace("acts/", "scales/", 1)


def channels_table(name: str) -> str:
    """The table of channel means and deviations of an int8 `acts/<site>`."""
    return name.replace("acts/", "channels/", 1)


def channel_tables(channels: dict[str, Channels]) -> dict[str, NDArray[Any]]:
    """The tables that keep what int8 sites are measured by."""
    return {channels_table(f"acts/{site}"): found.table for site, found in channels.items()}


def _open_pinned(kind: type[Store], url: str, snapshot: str) -> Store:
    return kind(url, snapshot=snapshot)
