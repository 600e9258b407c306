"""Create, append, commit: the only code that adds to a store.

The protocol: the manifest makes a store, a segment record makes a segment, a commit record makes a shard. Objects are
published first, whole and flushed. The record that states their length and sha256 comes last; it is put only where no
other record lies. An object without a record does not exist: a kill at any moment leaves a store that reads true and can
be continued. A shard is written whole, by any process that computed it: its bytes are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore import paths
from actstore.arrays import segment_objects, shard_entry, shard_object
from actstore.errors import DamagedStore, IdentityMismatch, LockedStore, OutputExists
from actstore.files import Entry, object_entry, record_bytes
from actstore.folder import LOCK
from actstore.lease import LEASES
from actstore.open_place import open_place
from actstore.place import Place
from actstore.records import Records, Seal, read_manifest
from actstore.schema import Manifest, differing_fields
from actstore.segment_record import SegmentRecord


class StoreWriter:
    """One process's right to add to a store.

    >>> with StoreWriter.open(path, manifest, tokenizer_files) as writer:  # doctest: +SKIP
    ...     segment = writer.add_segment(record, tables)
    ...     for part, shard in writer.missing_shards(segment):
    ...         write_shard(writer.place, manifest, segment, part, shard, arrays, statistics)
    ...     writer.seal(segment)
    """

    def __init__(self, place: Place, manifest: Manifest):
        self.place = place
        self.manifest = manifest
        self._records: Records | None = None

    @classmethod
    @contextmanager
    def open(cls, url: str | Path | Place, manifest: Manifest, tokenizer_files: dict[str, bytes]) -> Iterator[StoreWriter]:
        """Create the store, or continue one of the same identity, and hold its lock.

        Raises OutputExists when something else is at `url`, IdentityMismatch (naming the fields) when a store of
        another identity is, LockedStore while another process writes it.
        """
        place = open_place(url)
        require_store_place(place)
        with place.lock():
            place.clear_leftovers()
            try:
                yield cls(place, _published_manifest(place, manifest, tokenizer_files))
            finally:
                place.clear_leftovers()  # of worker processes that were killed, or stopped in the midst

    def records(self) -> Records:
        """The records that are there now."""
        self._records = Records(self.place, self._records)
        return self._records

    def segments(self) -> list[SegmentRecord]:
        """The published segments, in order."""
        return self.records().segments

    def add_segment(self, record: SegmentRecord, tables: dict[str, NDArray[Any]]) -> SegmentRecord:
        """Publish a segment's tables and the metadata of its row arrays, and then its record with all their hashes.

        `tables` maps array names below the segment (`tokens/ids`, `train/windows/token_start`, ...) to arrays. Raises
        LockedStore when the text does not go on where the segments that are there end.
        """
        objects = segment_objects(self.manifest, record, tables)
        published = replace(record, objects={name: object_entry(data) for name, data in sorted(objects.items())})
        segments = self.segments()  # as late as can be: who was taken for dead must not touch what another writes
        if record.index != len(segments):
            raise ValueError(f"segment {record.index} is not the next one")
        end = (segments[-1].next_document, segments[-1].next_token) if segments else (0, 0)
        if (record.first_document, record.first_token) != end:
            raise LockedStore(
                f"{self.place}: ends before document {end[0]}, token {end[1]}; a segment from document "
                f"{record.first_document}, token {record.first_token} does not go on there: another process added to the "
                "store meanwhile; run the command again."
            )
        self._remove_leftovers(published)
        there = self.place.names(paths.DATA)
        for name, data in objects.items():
            if name not in there or _read(self.place, name) != data:  # earlier segments share the groups above them
                self.place.publish(name, data)
        _publish_record(self.place, paths.segment_record(record.index), published.to_bytes())
        return published

    def put_segment(self, record: SegmentRecord, tables: Callable[[], dict[str, NDArray[Any]]]) -> SegmentRecord:
        """The segment with a record's index: added, or there already, in which case its missing tables are published again.

        Raises what `add_segment` and `restore_segment` raise; `tables` is called only where something is published.
        """
        there = self.segments()
        if record.index >= len(there):
            return self.add_segment(record, tables())
        segment = there[record.index]
        if self.missing_objects(segment):
            self.restore_segment(segment, tables())
        return segment

    def restore_segment(self, segment: SegmentRecord, tables: dict[str, NDArray[Any]]) -> None:
        """Publish again what is missing of a segment's tables and metadata.

        Raises DamagedStore, before anything is published, when what the tables give is not what was there.
        """
        objects, missing = segment_objects(self.manifest, segment, tables), self.missing_objects(segment)
        for name in missing:
            if object_entry(objects.get(name, b"")) != segment.objects[name]:
                raise DamagedStore(
                    f"{self.place}: {name} cannot be made again, since its source is no longer the same; restore it from a "
                    "copy, or begin another store."
                )
        for name in missing:
            self.place.publish(name, objects[name])

    def missing_objects(self, segment: SegmentRecord) -> list[str]:
        """The tables and metadata of a segment that are not there."""
        there = self.place.names(paths.DATA)
        return [name for name in segment.objects if name not in there]

    def missing_shards(self, segment: SegmentRecord) -> list[tuple[str, int]]:
        """(part, shard) of every shard of a segment that has no commit record."""
        records = self.records()
        committed = {part: set(records.shards(segment, part)) for part in segment.parts}
        return [
            (part, shard)
            for part, record in segment.parts.items()
            for shard in range(record.layout.n_shards)
            if shard not in committed[part]
        ]

    def is_sealed(self, segment: SegmentRecord) -> bool:
        return self.place.exists(paths.sealed_record(segment.index))

    def seal(self, segment: SegmentRecord) -> None:
        """Publish the list of a finished segment's records: from now on a missing or changed one is a fault."""
        if self.missing_shards(segment):
            raise ValueError(f"segment {segment.index} is not complete")
        own = paths.sealed_record(segment.index)  # which another, who took this writer for dead, may have put by now
        names = [name for name in self.place.names(paths.commits(segment.index)) if name.endswith(".json") and name != own]
        seal = Seal(
            {name: object_entry(self.place.read(name)) for name in names},
            manifest=self.manifest.to_bytes().decode(),
            segment=segment.to_bytes().decode(),
        )
        _publish_record(self.place, own, seal.to_bytes())

    def _remove_leftovers(self, segment: SegmentRecord) -> None:
        """Remove what a killed attempt at this segment left. Committed shards stay: they are there when a lost segment
        record is made again. Raises IdentityMismatch when they are not shards of this segment."""
        records, kept = self.records(), set(segment.objects)
        for part in segment.parts:
            for shard in records.shards(segment, part):
                committed = records.shard(segment.index, part, shard)
                if committed.segment != segment.content_id:
                    raise IdentityMismatch(
                        f"{self.place}: segment {segment.index} has shards of other text; ask for as many --tokens as when "
                        "it was begun, or begin another store."
                    )
                kept |= set(committed.objects)
        for name in set(self.place.names(paths.array(segment.index, "").rstrip("/"))) - kept:
            self.place.remove(name)


def write_shard(
    place: Place,
    manifest: Manifest,
    segment: SegmentRecord,
    part: str,
    shard: int,
    arrays: dict[str, NDArray[Any]],
    notes: dict[str, Any],
) -> None:
    """Publish one whole shard of every row array, and then its commit record.

    `arrays` maps each array's name to what its encoding keeps, (rows of the shard, width). `notes` are further fields of the
    record: statistics of the rows, and what computed them. A shard that another process has committed meanwhile stays."""
    record_name = paths.shard_record(segment.index, part, shard)
    if place.exists(record_name):
        return
    layout = segment.parts[part].layout
    start, stop = layout.shard_range(shard)
    objects = {}
    for array in manifest.arrays:
        kept = arrays[array.name]
        if kept.shape != (stop - start, *array.tail) or kept.dtype != np.dtype(array.dtype):
            raise ValueError(f"{array.name}: {kept.shape} {kept.dtype} is not shard {shard}'s {stop - start} rows")
        name = paths.shard_object(segment.index, part, array.name, shard, kept.ndim)
        data = shard_object(array, layout, kept)
        place.publish(name, data)
        objects[name] = shard_entry(data, layout, len(kept))
    record = record_bytes({**notes, "segment": segment.content_id, "rows": [start, stop], "objects": objects})
    _publish_record(place, record_name, record)


def require_store_place(url: str | Path | Place) -> None:
    """Raises OutputExists unless the place is empty or holds a store, finished or not."""
    place = open_place(url)
    if place.exists(paths.MANIFEST):
        return
    ours = {LOCK, LEASES, paths.TOKENIZER, paths.COMMITS, paths.DATA}
    if any(name not in ours and not name.startswith(f".{paths.MANIFEST}.") for name in place.entries()):
        raise OutputExists(f"{place}: exists and is not a store; choose another --out, or move it away.")


def _published_manifest(place: Place, manifest: Manifest, tokenizer_files: dict[str, bytes]) -> Manifest:
    """The manifest that is there, if it is of this identity; else this one, published after the tokenizer."""
    entries = {name: object_entry(data) for name, data in tokenizer_files.items()}
    if place.exists(paths.MANIFEST):
        existing = read_manifest(place)
        if differences := differing_fields(existing, manifest):
            raise IdentityMismatch(
                f"{place}: holds another store (there / asked): {'; '.join(differences)}; "
                "choose another --out, or ask for what is there."
            )
        _publish_tokenizer(place, tokenizer_files, existing.provenance["tokenizer_files"])
        return existing
    records = Records(place)
    for segment in records.segments:
        if segment.store_id != manifest.store_id:
            raise IdentityMismatch(
                f"{place}: its manifest is missing, and its records are of store {segment.store_id}; what was asked for is "
                f"{manifest.store_id}: ask for what it was made with, or restore the manifest from a copy."
            )
        if (seal := records.seal(segment.index)) is not None:
            place.publish(paths.MANIFEST, seal.manifest.encode())
            return _published_manifest(place, manifest, tokenizer_files)
    for name in place.names(paths.TOKENIZER):
        if name.removeprefix(f"{paths.TOKENIZER}/") not in entries:  # of an attempt that ended before its manifest
            place.remove(name)
    _publish_tokenizer(place, tokenizer_files, entries)
    manifest = replace(manifest, provenance={**manifest.provenance, "tokenizer_files": entries})
    place.publish(paths.MANIFEST, manifest.to_bytes())
    return manifest


def _publish_tokenizer(place: Place, files: dict[str, bytes], entries: dict[str, Entry]) -> None:
    """Publish the files that a manifest names where they are missing, or others. Raises DamagedStore when it cannot."""
    for name, entry in entries.items():
        key = f"{paths.TOKENIZER}/{name}"
        if (there := _read(place, key)) is not None and object_entry(there) == entry:
            continue
        if object_entry(files.get(name, b"")) != entry:
            raise DamagedStore(
                f"{place}: {key} is not as it was committed and cannot be made again, since the model's tokenizer now gives "
                "another file; restore it from a copy, or begin another store."
            )
        place.publish(key, files[name])


def _read(place: Place, name: str) -> bytes | None:
    """An object's bytes; None where there is none, or none any more: a listing may be older than what it lists."""
    try:
        return place.read(name)
    except FileNotFoundError:
        return None


def _publish_record(place: Place, name: str, data: bytes) -> None:
    """Put a record that must be new, or be there with the same bytes."""
    if not place.create(name, data) and _read(place, name) != data:
        raise LockedStore(f"{place}: {name} was put by another writer meanwhile; run the command again to go on from there.")
