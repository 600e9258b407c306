"""The records of a store, read and checked: its manifest, segments, seals and committed shards.

A record carries the hash of its own content; the seal of a segment carries the hash of each of its records, and a copy
of the manifest and of the segment's record. So a record of a finished segment that was changed, exchanged
or lost is noticed, unless all records of the last segment are lost at once.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

from actstore import paths
from actstore.checked_json import checked
from actstore.errors import DamagedStore
from actstore.files import Entry, object_entry, parse_record, record_bytes
from actstore.kind import not_a
from actstore.place import Place
from actstore.schema import Manifest
from actstore.segment_record import SegmentRecord, ShardRecord


@dataclass(frozen=True)
class Seal:
    """What a finished segment consists of: the entry of every record, and copies of the two that say what it is."""

    records: dict[paths.RecordName, Entry]
    manifest: str
    segment: str

    def to_bytes(self) -> bytes:
        return record_bytes({"records": self.records, "manifest": self.manifest, "segment": self.segment})

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Seal:
        """Raises DamagedStore when it was changed after it was written."""
        return checked(parse_record(data, where), cls, where)


class Records:
    """The records at a place, as many as there were when this was made.

    Everything raises DamagedStore for a record that is missing or is not the one that was written. Since a record never
    changes, the segments and seals that `before` has read are not read again.
    """

    def __init__(self, place: Place, before: Records | None = None):
        self.place = place
        self.names = place.names(paths.COMMITS)
        self._seals: dict[int, Seal] = before._seals if before else {}
        self._segments: list[SegmentRecord] = before._segments if before else []

    @cached_property
    def segments(self) -> list[SegmentRecord]:
        """The published segments, in order."""
        for index in itertools.count():
            name, seal = paths.segment_record(index), self.seal(index)
            if name not in self.names:
                if seal is not None:
                    raise DamagedStore(f"{self.place}: {name} is missing, though its segment is sealed{REMEDY}")
                break
            if index == len(self._segments):
                self._segments.append(SegmentRecord.from_bytes(self._checked(name, seal), f"{self.place}: {name}"))
        return self._segments[:index]

    def seal(self, segment: int) -> Seal | None:
        """The seal of a segment; None when it is not finished."""
        name = paths.sealed_record(segment)
        if name not in self.names:
            return None
        if segment not in self._seals:
            self._seals[segment] = Seal.from_bytes(self._read(name), f"{self.place}: {name}")
        return self._seals[segment]

    def shards(self, segment: SegmentRecord, part: str) -> list[int]:
        """The committed shards of a part, in order."""
        seal = self.seal(segment.index)
        n_shards = segment.parts[part].layout.n_shards
        committed = paths.shards_of_records(self.names, segment.index, part, n_shards)
        if seal is not None and len(committed) < n_shards:
            lost = next(shard for shard in itertools.count() if shard >= len(committed) or committed[shard] != shard)
            raise DamagedStore(
                f"{self.place}: segment {segment.index} is sealed but the commit record of {part} shard {lost} is missing"
                f"{REMEDY}"
            )
        return committed

    def shard(self, segment: int, part: str, shard: int) -> ShardRecord:
        """The commit record of a shard."""
        name = paths.shard_record(segment, part, shard)
        return ShardRecord.from_bytes(self._checked(name, self.seal(segment)), f"{self.place}: {name}")

    def _checked(self, name: str, seal: Seal | None) -> bytes:
        data = self._read(name)
        if seal is not None and seal.records.get(name) != object_entry(data):
            raise DamagedStore(f"{self.place}: {name} is not the record that was sealed{REMEDY}")
        return data

    def _read(self, name: str) -> bytes:
        try:
            return self.place.read(name)
        except FileNotFoundError as error:  # it was listed: another process removed it since
            raise DamagedStore(f"{self.place}: {name} is missing{REMEDY}") from error


REMEDY = "; `actstore repair` drops what is damaged, and the command that wrote the store then fills it in again."


def read_manifest(place: Place) -> Manifest:
    """Raises NotAStore when there is none, or one of another format."""
    try:
        data = place.read(paths.MANIFEST)
    except (FileNotFoundError, NotADirectoryError) as error:
        if place.names(paths.COMMITS):
            raise DamagedStore(f"{place}: {paths.MANIFEST} is missing{REMEDY}") from error
        raise not_a(place, f"a store (no {paths.MANIFEST})", "pass a folder that `collect` or `encode` wrote.") from error
    return Manifest.from_bytes(data, str(place))
