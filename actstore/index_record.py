"""`commits/index.json`, the record that publishes a code store's feature index. docs/FORMAT.md, section 8.1."""

from __future__ import annotations

from dataclasses import dataclass

from actstore import paths
from actstore.checked_json import Count, Hex16, Positive, checked
from actstore.errors import DamagedStore
from actstore.files import Entry, parse_record
from actstore.layout import Layout


@dataclass(frozen=True)
class IndexRecord:
    """The codes that the index is of, how its entries are cut into objects and chunks, and the entry of every object."""

    store_id: Hex16
    snapshot: Hex16
    rows: Count
    entries: Count
    shard_entries: Positive
    chunk_entries: Positive
    objects: dict[paths.ObjectName, Entry]

    @property
    def layout(self) -> Layout:
        return Layout(self.entries, self.shard_entries, self.chunk_entries)

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> IndexRecord:
        """Raises DamagedStore when it was changed after it was written, or states what no index can have."""
        record = checked(parse_record(data, where), cls, where)
        if record.shard_entries % record.chunk_entries:
            raise DamagedStore(f"{where}: shards of {record.shard_entries:,} entries in chunks of {record.chunk_entries:,}")
        if not all(name.startswith(f"{paths.INDEX}/") for name in record.objects):
            raise DamagedStore(f"{where}: names objects that are not below {paths.INDEX}/")
        n_listed = sum(name.startswith(f"{paths.INDEX}/rows/c/") for name in record.objects)
        if n_listed != record.layout.n_shards:
            raise DamagedStore(f"{where}: {record.entries:,} entries in {n_listed} objects of {record.shard_entries:,}")
        return record
