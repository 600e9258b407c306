"""What the records of a segment say: of its text and parts, of each of its shards, and of it as a whole when it is finished.

Every field is checked when a record is read, and so is what one field says of another: what a record lists bounds what
a reader allocates. docs/FORMAT.md, section 6, is the normative description of the JSON.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Annotated, Any, TypedDict

from actstore import paths
from actstore.checked_json import Count, Hex16, Positive, checked, one_of
from actstore.errors import DamagedStore
from actstore.files import Entry, content_hash, parse_record, record_bytes
from actstore.layout import Layout
from actstore.schema import PARTS, TABLE_CHUNK, Manifest

PartName = Annotated[str, one_of(*PARTS)]


@dataclass(frozen=True)
class PartRecord:
    """One split of a segment: how many windows and rows it has and how the rows are cut."""

    n_windows: Count
    n_rows: Count
    shard_rows: Positive
    chunk_rows: Positive

    @property
    def layout(self) -> Layout:
        return Layout(self.n_rows, self.shard_rows, self.chunk_rows)


@dataclass(frozen=True)
class SegmentRecord:
    """A segment whose token tables are complete; published before its first row is written.

    The text begins with document `first_document` of the corpus, behind the first `first_token` tokens of it, and goes
    on to document `next_document`, behind `next_token` tokens of that. `objects` maps every table object to its length
    and sha256. `environment` says what computed the rows.
    """

    store_id: Hex16
    index: Count
    first_document: Count
    first_token: Count
    next_document: Count
    next_token: Count
    n_documents: Count
    n_tokens: Count
    heldout_modulus: Count
    parts: dict[PartName, PartRecord]
    environment: dict[str, Any]
    objects: dict[paths.ObjectName, Entry]

    @cached_property
    def content_id(self) -> str:
        """Sixteen hex digits naming the text, the windows and the cut into shards: what a shard's bytes depend on."""
        parts = {name: asdict(part) for name, part in self.parts.items()}
        return content_hash([self.store_id, self.index, parts, self.objects])[:16]

    def to_bytes(self) -> bytes:
        return record_bytes(asdict(self))

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> SegmentRecord:
        """Raises DamagedStore when it was changed after it was written, or states what no segment can have."""
        segment = checked(parse_record(data, where), cls, where)
        if what := segment._contradiction():
            raise DamagedStore(f"{where}: {what}; restore it from a copy.")
        return segment

    def _contradiction(self) -> str:
        """What in a record of the right fields cannot be; empty when nothing is.

        Tables are whole objects of 2^20 values that the record lists. So what the record lists bounds its tokens, tokens
        bound windows, and both bound rows and shards.
        """
        ids = f"{paths.array(self.index, paths.TOKEN_IDS)}/c/"
        n_table, n_listed = self.n_tokens + self.n_documents, sum(name.startswith(ids) for name in self.objects)
        if set(self.parts) != set(PARTS):
            return f"parts {', '.join(self.parts)}, not {' and '.join(PARTS)}"
        if n_listed != max(1, -(-n_table // TABLE_CHUNK)):
            return f"{n_table:,} tokens in {n_listed} objects of {TABLE_CHUNK:,}"
        for name, part in self.parts.items():
            if part.shard_rows % part.chunk_rows:
                return f"{name}: shards of {part.shard_rows:,} rows in chunks of {part.chunk_rows:,}"
            if part.n_windows > n_table or part.n_rows > n_table + part.n_windows:
                return f"{name}: {part.n_windows:,} windows and {part.n_rows:,} rows of {n_table:,} tokens"
        return ""


class SiteRecord(TypedDict):
    """What a shard's record states of a site: means over its rows of x, x² (d_model,) and ‖x‖."""

    mean: list[float]
    second_moment: list[float]
    mean_norm: float


@dataclass(frozen=True)
class ShardRecord:
    """What publishes a shard: the content id of its segment, its rows, its objects, and what is known of its rows.

    Only activations have `stats` of sites and `probe_crc32c`, only codes `rows_cut` and `codes_cut`.
    """

    segment: Hex16
    rows: tuple[Count, Count]
    objects: dict[paths.ObjectName, Entry]
    stats: dict[paths.SiteName, SiteRecord]
    probe_crc32c: str | None = None
    rows_cut: Count | None = None
    codes_cut: Count | None = None

    @property
    def notes(self) -> dict[str, Any]:
        """What the record says besides its segment, rows and objects."""
        notes = {name: getattr(self, name) for name in ("stats", "probe_crc32c", "rows_cut", "codes_cut")}
        return {name: value for name, value in notes.items() if value is not None}

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> ShardRecord:
        """Raises DamagedStore when it was changed after it was written."""
        return checked(parse_record(data, where), cls, where)

    def is_of(self, manifest: Manifest, segment: SegmentRecord, part: str, shard: int) -> bool:
        """Whether it is the record of this shard of this segment: its rows, its objects, statistics of its sites."""
        layout = segment.parts[part].layout
        names = {
            paths.shard_object(segment.index, part, array.name, shard, 1 + len(array.tail)) for array in manifest.arrays
        }
        n_digits = 8 * layout.n_chunks(shard)
        return (
            self.segment == segment.content_id
            and self.rows == layout.shard_range(shard)
            and set(self.objects) == names
            and all(len(entry.get("chunk_crc32c", "")) == n_digits for entry in self.objects.values())
            and set(self.stats) == set(manifest.sites)
            and all(
                len(own["mean"]) == len(own["second_moment"]) == manifest.d_model(site) for site, own in self.stats.items()
            )
        )
