"""Verify a store, and drop what is damaged so that the command that wrote it can fill exactly that in again.

Three levels: `meta` reads every record and looks for every object and its length; `crc` reads every chunk, too, and
checks its crc32c; `full` compares the sha256 of every object with what was committed. Nothing here raises over what it
finds: a fault is a value that names the object, the shard and the array.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from actstore import paths
from actstore.arrays import CRC_BYTES, Unreadable, check_chunk, index_bytes, neighbours, read_index
from actstore.errors import DamagedStore, NotAStore
from actstore.files import Entry, object_entry, parse_record
from actstore.index_record import IndexRecord
from actstore.layout import Layout
from actstore.place import Place
from actstore.records import Seal
from actstore.schema import Manifest
from actstore.segment_record import SegmentRecord, ShardRecord

LEVELS = ("meta", "crc", "full")
UNREADABLE = (DamagedStore, NotAStore, OSError)
"""The errors of reading a record: its bytes are no record, or the disk does not return them."""
PIECE_BYTES = 4 << 20
SHARD_OBJECT = re.compile(r"/(rows|values)/c/\d+$")
"""An object of the feature index that has chunks, each with its crc32c."""

ShardKey = tuple[int, str, int]
"""(segment, part, shard)."""


@dataclass(frozen=True)
class Fault:
    """An object that differs from what was committed."""

    name: str
    what: str
    shard: ShardKey | None = None

    def __str__(self) -> str:
        if self.shard is None:
            return f"{self.name}: {self.what}"
        segment, part, shard = self.shard
        return f"segment {segment}, {part} shard {shard}: {self.name}: {self.what}"


@dataclass(frozen=True)
class _Check:
    """An object that a record names, and how its bytes are checked."""

    name: str
    entry: Entry
    shard: ShardKey | None = None
    layout: Layout | None = None
    """How the shard's part is cut into shards and chunks; None for an object that is no shard."""


class Inspection:
    """All objects that the records of a place name, and the faults of the records themselves."""

    def __init__(self, place: Place):
        self.place = place
        self.there = place.names()
        self.faults: list[Fault] = []
        self.checks: list[_Check] = []
        self._objects: set[tuple[str, str]] = set()
        self.seals: dict[int, Seal] = {}
        self.segments: dict[int, SegmentRecord] = {}
        folders = {name.split("/")[1] for name in self.there if name.startswith(f"{paths.COMMITS}/")}
        n_segments = 1 + max((int(folder) for folder in folders if folder.isdecimal()), default=-1)
        for segment in range(n_segments):
            self._read_seal(segment)
        self.manifest = self._read_manifest()
        for segment in range(n_segments):
            self._read_segment(segment)
        self._read_index()

    def find(self, level: str, progress: Callable[[int], object]) -> list[Fault]:
        """Every fault, in the order of the records; `progress` is told the bytes of each object that was checked."""

        def run(check: _Check) -> Fault | None:
            what = _fault_of(self.place, check, self.there.get(check.name), level)
            progress(check.entry["bytes"])
            return None if what is None else Fault(check.name, what, check.shard)

        with ThreadPoolExecutor(self.place.readers) as pool:
            return self.faults + [fault for fault in pool.map(run, self.checks) if fault is not None]

    @property
    def n_bytes(self) -> int:
        """Bytes of all objects that will be checked."""
        return sum(check.entry["bytes"] for check in self.checks)

    def _fault(self, name: str, what: str, shard: ShardKey | None = None) -> None:
        self.faults.append(Fault(name, what, shard))

    def _read_seal(self, segment: int) -> None:
        name = paths.sealed_record(segment)
        if name in self.there:
            try:
                self.seals[segment] = Seal.from_bytes(self.place.read(name), name)
            except UNREADABLE as error:
                self._fault(name, _without(str(error), name))

    def _read_manifest(self) -> Manifest | None:
        """The manifest; where the manifest is damaged, the copy in a seal."""
        manifest, copy = None, next((seal.manifest.encode() for seal in self.seals.values()), None)
        try:
            data = self.place.read(paths.MANIFEST)
            manifest = Manifest.from_bytes(data, paths.MANIFEST)
        except FileNotFoundError:
            self._fault(paths.MANIFEST, "missing")
        except UNREADABLE as error:
            self._fault(paths.MANIFEST, _without(str(error), paths.MANIFEST))
        else:
            if copy is not None and copy != data:
                self._fault(paths.MANIFEST, "is not the manifest that was sealed")
        if copy is not None:
            manifest = Manifest.from_bytes(copy, paths.MANIFEST)
        if manifest is not None:
            self._add_tokenizer(manifest)
        return manifest

    def _add_tokenizer(self, manifest: Manifest) -> None:
        for name, entry in manifest.provenance["tokenizer_files"].items():
            self._add_check(f"{paths.TOKENIZER}/{name}", entry)

    def _add_check(self, name: str, entry: Entry, shard: ShardKey | None = None, layout: Layout | None = None) -> None:
        """An object to look at, unless another record has named it: segments share the groups above them."""
        if (name, entry["sha256"]) not in self._objects:
            self._objects.add((name, entry["sha256"]))
            self.checks.append(_Check(name, entry, shard, layout))

    def _read_segment(self, index: int) -> None:
        seal, name = self.seals.get(index), paths.segment_record(index)
        segment = self._record(name, seal, None, partial(SegmentRecord.from_bytes, where=name))
        if segment is None and seal is not None:
            segment = SegmentRecord.from_bytes(seal.segment.encode(), name)
        if segment is None:
            if name not in self.there:
                self._fault(name, "missing, though shards of the segment are committed")
            return
        if self.manifest is not None and segment.store_id != self.manifest.store_id:
            self._fault(name, f"is of store {segment.store_id}, the manifest is of {self.manifest.store_id}")
        self.segments[index] = segment
        for key, entry in segment.objects.items():
            self._add_check(key, entry)
        is_complete = True
        for part, record in segment.parts.items():
            there = paths.shards_of_records(self.there, index, part, record.layout.n_shards)
            is_complete &= len(there) == record.layout.n_shards
            for shard in range(record.layout.n_shards) if seal is not None else there:
                self._read_shard(segment, part, shard, seal)
        for extra in sorted(set(self.there) | set(seal.records if seal else ())):
            if extra.startswith(f"{paths.commits(index)}/mixed-"):
                self._record(extra, seal, None, partial(parse_record, where=extra))
        if is_complete and seal is None and paths.sealed_record(index) not in self.there:
            self._fault(paths.sealed_record(index), "missing, though every shard is committed")

    def _read_shard(self, segment: SegmentRecord, part: str, shard: int, seal: Seal | None) -> None:
        name, key = paths.shard_record(segment.index, part, shard), (segment.index, part, shard)
        if name not in self.there:
            self._fault(name, "missing", key)
            return
        record = self._record(name, seal, key, partial(ShardRecord.from_bytes, where=name))
        if record is not None and self.manifest is not None and not record.is_of(self.manifest, segment, part, shard):
            self._fault(name, "is of another shard", key)
        elif record is not None:
            for object_name, entry in record.objects.items():
                self._add_check(object_name, entry, key, segment.parts[part].layout)

    def _read_index(self) -> None:
        """The feature index of a code store, where it has one."""
        name = paths.INDEX_RECORD
        record = self._record(name, None, None, partial(IndexRecord.from_bytes, where=name))
        if record is None:
            return
        if self.manifest is not None and record.store_id != self.manifest.store_id:
            self._fault(name, f"is of store {record.store_id}, the manifest is of {self.manifest.store_id}")
        for object_name, entry in record.objects.items():
            self._add_check(object_name, entry, None, record.layout if SHARD_OBJECT.search(object_name) else None)

    def _record(self, name: str, seal: Seal | None, key: ShardKey | None, parse: Callable[[bytes], Any]) -> Any:
        """The record, or None and a fault where the record is missing or damaged."""
        if name not in self.there:
            if seal is not None:
                self._fault(name, "missing", key)
            return None
        try:
            data = self.place.read(name)
            record = parse(data)
        except UNREADABLE as error:
            self._fault(name, _without(str(error), name), key)
            return None
        if seal is not None and seal.records.get(name) != object_entry(data):
            self._fault(name, "is not the record that was sealed", key)
            return None
        return record


def find_faults(place: Place, level: str = "full", progress: Callable[[int], object] = lambda n: None) -> list[Fault]:
    """Every fault of a place; an empty list when there is none."""
    return Inspection(place).find(level, progress)


@dataclass(frozen=True)
class Repair:
    """What `repair` did: how many faults there were, what was put back from a seal's copy, what was dropped, and the
    shards that have to be computed again."""

    faults: int
    restored: list[str]
    dropped: list[str]
    shards: list[ShardKey]


def repair(
    place: Place,
    level: str = "full",
    progress: Callable[[int], object] = lambda n: None,
    expect: Callable[[int], object] = lambda n: None,
) -> Repair:
    """Drop what is damaged, so that what the records name is whole again and the rest is "not yet".

    A manifest or segment record is put back from the seal's copy. A damaged shard loses its record first, then its
    objects; its segment is no longer sealed. A feature index at fault loses its record. Good shards are not touched.
    Raises LockedStore while the store is written.
    `expect` is told the bytes of which `progress` will be told.
    """
    with place.lock():
        inspection = Inspection(place)
        expect(inspection.n_bytes)
        faults = inspection.find(level, progress)
        restored, dropped = [], []
        shards = sorted({fault.shard for fault in faults if fault.shard is not None})
        if paths.INDEX_RECORD in inspection.there and any(_is_of_index(fault.name) for fault in faults):
            place.remove(paths.INDEX_RECORD)
            dropped.append(paths.INDEX_RECORD)
        for fault in faults:
            copy = _sealed_copy(fault.name, inspection)
            if fault.shard is not None:
                continue
            if copy is not None:
                place.publish(fault.name, copy)
                restored.append(fault.name)
            elif fault.name in inspection.there and fault.name not in dropped:
                place.remove(fault.name)
                dropped.append(fault.name)
        mixed = {int(fault.name.split("/")[1]) for fault in faults if "/mixed-" in fault.name}
        for segment in sorted({segment for segment, _, _ in shards} | mixed):
            place.remove(paths.sealed_record(segment))
        for key in shards:
            dropped += _drop_shard(place, inspection, key)
        return Repair(len(faults), restored, dropped, shards)


def _drop_shard(place: Place, inspection: Inspection, key: ShardKey) -> Iterator[str]:
    segment, part, shard = key
    arrays = inspection.manifest.arrays if inspection.manifest else ()
    names = [paths.shard_record(*key)]
    names += [paths.shard_object(segment, part, array.name, shard, 1 + len(array.tail)) for array in arrays]
    for name in names:
        if name in inspection.there:
            place.remove(name)
            yield name


def _is_of_index(name: str) -> bool:
    return name == paths.INDEX_RECORD or name.startswith(f"{paths.INDEX}/")


def _sealed_copy(name: str, inspection: Inspection) -> bytes | None:
    if name == paths.MANIFEST:
        return next((seal.manifest.encode() for seal in inspection.seals.values()), None)
    for index, seal in inspection.seals.items():
        if name == paths.segment_record(index):
            return seal.segment.encode()
    return None


def _fault_of(place: Place, check: _Check, n_bytes: int | None, level: str) -> str | None:
    """What is wrong with an object, or None."""
    if n_bytes is None:
        return "missing"
    if n_bytes != check.entry["bytes"]:
        return f"{n_bytes:,} bytes, {check.entry['bytes']:,} were committed"
    if level == "meta":
        return None
    try:
        if level == "crc" and check.layout is not None:
            _check_chunks(place, check.name, n_bytes, check.layout, bytes.fromhex(check.entry.get("chunk_crc32c", "")))
            return None
        digest = hashlib.sha256()
        for piece in read_in_pieces(place, check.name, n_bytes):
            digest.update(piece)
    except (Unreadable, OSError) as error:
        return str(error)
    if digest.hexdigest() == check.entry["sha256"]:
        return None
    return f"sha256 {digest.hexdigest()[:12]}, {check.entry['sha256'][:12]} was committed"


def _check_chunks(place: Place, name: str, n_bytes: int, layout: Layout, committed: bytes) -> None:
    """Read a shard's index and every chunk that it names, and compare those that hold rows with the crc32c that were
    committed, four bytes each. Raises Unreadable."""
    index = bytearray(index_bytes(layout))
    place.read_into(name, max(0, n_bytes - len(index)), memoryview(index))
    chunks, number = read_index(bytes(index), len(index) // 16, may_be_absent=True), 0
    if (chunks[:, 1] < CRC_BYTES).any() or (chunks.sum(axis=1) > n_bytes - len(index)).any():
        raise Unreadable("the shard's index names a chunk that is not in it")
    if len(chunks) < len(committed) // CRC_BYTES:
        raise Unreadable(f"{len(chunks)} chunks, {len(committed) // CRC_BYTES} were committed")
    for together in neighbours(chunks.tolist(), PIECE_BYTES, len(chunks)):
        start, n_read = together[0][0], sum(length for _, length in together)
        data = np.empty(n_read, np.uint8)
        if place.read_into(name, start, data.data) != n_read:
            raise Unreadable("a chunk ends early")
        for offset, length in together:
            chunk = data[offset - start : offset - start + length]
            stored = chunk[-CRC_BYTES:].tobytes()
            check_chunk(chunk[:-CRC_BYTES], stored, committed[CRC_BYTES * number :][:CRC_BYTES] or stored)
            number += 1


def read_in_pieces(place: Place, name: str, n_bytes: int) -> Iterator[memoryview]:
    """The bytes of an object, some MB at a time: each piece is good until the next is asked for."""
    buffer = memoryview(bytearray(min(PIECE_BYTES, n_bytes)))
    for start in range(0, n_bytes, PIECE_BYTES):
        n_read = place.read_into(name, start, buffer[: min(PIECE_BYTES, n_bytes - start)])
        yield buffer[:n_read]


def _without(message: str, name: str) -> str:
    """A message that does not say the object's name again."""
    return message.removeprefix(f"{name}: ")
