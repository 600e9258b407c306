"""Open a store, count and read its committed rows, find the text behind a row, verify every byte.

Readers trust commit records, never an array's shape: only committed shards exist. A committed object that is
missing or has another length is an error, never fill values, and every chunk's crc32c is checked as it is read; array
metadata and tables are compared with the segment's record when first used.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from actstore import paths
from actstore.codecs import decode_rows
from actstore.errors import DamagedStore, IncompleteStore, InputError, NotAStore
from actstore.files import content_hash, object_record, read_json
from actstore.schema import PARTS, Manifest, RowArray, SegmentRecord
from actstore.writer import read_segments


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


class Store:
    """A store opened for reading, pinned to the shards that are committed now.

    Raises NotAStore when `path` holds none, or one of another kind than `kind`; IncompleteStore unless every shard
    is committed or `partial` is given.
    """

    kind: str | None = None

    def __init__(self, path: str | Path, *, partial: bool = False):
        self.path = Path(path)
        manifest_file = self.path / paths.MANIFEST
        if not manifest_file.exists():
            raise NotAStore(
                f"{self.path}: not a store (no {paths.MANIFEST}); pass a folder that `collect` or `encode` wrote."
            )
        self.manifest = Manifest.from_json(read_json(manifest_file), str(self.path))
        if self.kind is not None and self.manifest.kind != self.kind:
            raise NotAStore(f"{self.path}: holds {self.manifest.kind}, {self.kind} are needed; pass the other folder.")
        self.segments = read_segments(self.path)
        self._arrays: dict[Path, Any] = {}
        self._commits: dict[Shard, dict[str, Any]] = {}
        self._shards = [self._segment_shards(segment) for segment in self.segments]
        if not partial:
            self._require_complete()

    def _segment_shards(self, segment: SegmentRecord) -> dict[str, list[Shard]]:
        found: dict[str, list[Shard]] = {}
        sealed = paths.sealed_record(self.path, segment.index).exists()
        for part, record in segment.parts.items():
            layout = record.layout
            found[part] = []
            for index in range(layout.n_shards):
                if paths.shard_record(self.path, segment.index, part, index).exists():
                    found[part].append(Shard(segment.index, part, index, *layout.shard_range(index), layout.chunk_rows))
                elif sealed:
                    raise DamagedStore(
                        f"{self.path}: segment {segment.index} is sealed but the commit record of {part} shard {index} is "
                        "missing; restore it from a copy, or collect the store again."
                    )
        return found

    def _require_complete(self) -> None:
        committed = sum(len(shards) for parts in self._shards for shards in parts.values())
        planned = sum(record.layout.n_shards for segment in self.segments for record in segment.parts.values())
        if not self.segments or committed < planned:
            raise IncompleteStore(
                f"{self.path}: half-written, {committed} of {planned or 'its'} shards are committed; run the command that "
                "was writing it again with the same arguments to finish it."
            )

    @property
    def store_id(self) -> str:
        return self.manifest.store_id

    @cached_property
    def snapshot(self) -> str:
        """Sixteen hex digits naming exactly the committed shards, of this store, that this reader sees."""
        shards = [[shard.segment, shard.part, shard.index] for part in PARTS for shard in self.shards(part)]
        return content_hash([self.store_id, shards])[:16]

    def shards(self, part: str = "train") -> list[Shard]:
        """The committed shards of a split, in order."""
        return [shard for parts in self._shards for shard in parts.get(part, [])]

    def n_rows(self, part: str = "train") -> int:
        """Committed rows of a split."""
        return sum(shard.n_rows for shard in self.shards(part))

    @property
    def disk_bytes(self) -> int:
        """Bytes of every file of the store."""
        return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())

    def table(self, segment: int, name: str) -> NDArray[Any]:
        """A whole 1-D table of a segment, such as `tokens/ids` or `train/windows/token_start`.

        Raises DamagedStore when an object of it is missing or differs from what was recorded.
        """
        return np.asarray(self._array(segment, name)[:])

    def read(self, shard: Shard, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Rows [start, stop) of a shard, decoded: float32 for activations, the plain integers for tables.

        Raises DamagedStore when the object is missing, has another length than committed, or fails its checksum.
        """
        array = self.manifest.array(name)
        opened = self._array(shard.segment, f"{shard.part}/{name}")
        file = self._whole_object(shard, array)
        first = shard.start + start
        last = shard.start + (shard.n_rows if stop is None else stop)
        try:
            kept = np.asarray(opened[first:last])
        except (ValueError, OSError, RuntimeError) as error:
            raise self._damaged(file, error) from error
        return decode_rows(kept, array.encoding)

    def read_chunk(self, shard: Shard, name: str, chunk: int) -> NDArray[Any]:
        """One chunk of a shard, decoded."""
        start = chunk * shard.chunk_rows
        return self.read(shard, name, start, min(start + shard.chunk_rows, shard.n_rows))

    def token_ids(self, shard: Shard) -> NDArray[np.int64]:
        """(n_rows,) the token each row of a shard stands at."""
        index = self.token_index(shard)
        ids = self.table(shard.segment, "tokens/ids")[index].astype(np.int64)
        return np.where(index >= 0, ids, self.manifest.policy.bos_token_id)

    def token_index(self, shard: Shard) -> NDArray[np.int64]:
        """(n_rows,) each row's place in the segment's token table; -1 for a start-of-text position."""
        window = self.read(shard, "rows/window").astype(np.int64)
        position = self.read(shard, "rows/position").astype(np.int64)
        starts = self.table(shard.segment, f"{shard.part}/windows/token_start")
        offset = position - int(self.manifest.policy.bos)
        return np.where(offset >= 0, starts[window] + offset, -1)

    def document_names(self, segment: int) -> list[str]:
        return bytes(self.table(segment, "documents/source")).decode().split("\n")

    def moments(self, site: str, part: str = "train") -> tuple[int, NDArray[np.float64], NDArray[np.float64]]:
        """(n, mean (d,), second moment (d,)) of a site's rows, from the records of the committed shards."""
        total, first, second = 0, np.zeros(0), np.zeros(0)
        for shard in self.shards(part):
            mean, moment = np.asarray(self._commit(shard)["stats"][f"stats/{site}"])
            weight = shard.n_rows / (total + shard.n_rows)
            first = mean if not total else first + (mean - first) * weight
            second = moment if not total else second + (moment - second) * weight
            total += shard.n_rows
        return total, first, second

    def objects(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(relative name, {bytes, sha256}) of every object that the manifest and the records name."""
        for name, expected in self.manifest.provenance.get("tokenizer_files", {}).items():
            yield f"{paths.TOKENIZER}/{name}", expected
        yield from self._sealed_records.items()
        for segment in self.segments:
            yield from segment.objects.items()
        for part in PARTS:
            for shard in self.shards(part):
                if self._record_fault(shard) is None:
                    yield from self._commit(shard)["objects"].items()

    def verify(self) -> list[str]:
        """Read every committed object and compare its length and sha256; one line for each fault."""
        objects = dict(self.objects())
        return [fault for name, expected in objects.items() if (fault := self._fault(name, expected))]

    @cached_property
    def _sealed_records(self) -> dict[str, dict[str, Any]]:
        """What the sealed segments say of their records: object entries by name."""
        files = [paths.sealed_record(self.path, segment.index) for segment in self.segments]
        return {name: entry for file in files if file.exists() for name, entry in read_json(file)["records"].items()}

    def _record_fault(self, shard: Shard) -> str | None:
        """What is wrong with a shard's commit record, if its segment is sealed."""
        file = paths.shard_record(self.path, shard.segment, shard.part, shard.index)
        name = file.relative_to(self.path).as_posix()
        return self._fault(name, self._sealed_records[name]) if name in self._sealed_records else None

    def _fault(self, name: str, expected: dict[str, Any]) -> str | None:
        file = self.path / name
        if not file.exists():
            return f"{name}: missing"
        found = object_record(file)
        if found == expected:
            return None
        return (
            f"{name}: {found['bytes']} bytes, sha256 {found['sha256'][:12]}; "
            f"committed were {expected['bytes']} bytes, sha256 {expected['sha256'][:12]}"
        )

    def _commit(self, shard: Shard) -> dict[str, Any]:
        if shard not in self._commits:
            if fault := self._record_fault(shard):
                raise self._damaged(self.path, fault)
            self._commits[shard] = read_json(paths.shard_record(self.path, shard.segment, shard.part, shard.index))
        return self._commits[shard]

    def _array(self, segment: int, name: str) -> Any:
        """A segment's array; at first use, the objects that the segment's record names of it are compared with it."""
        folder = paths.array(self.path, segment, name)
        if folder not in self._arrays:
            prefix = folder.relative_to(self.path).as_posix() + "/"
            for object_name, expected in self.segments[segment].objects.items():
                if object_name.startswith(prefix) and (fault := self._fault(object_name, expected)):
                    raise self._damaged(self.path, fault)
            self._arrays[folder] = zarr.open_array(folder, mode="r")
        return self._arrays[folder]

    def _whole_object(self, shard: Shard, array: RowArray) -> Path:
        """A missing shard would read as fill values, so look before reading."""
        folder = paths.array(self.path, shard.segment, f"{shard.part}/{array.name}")
        file = paths.shard_object(folder, shard.index, 1 + len(array.tail))
        if not file.exists():
            raise self._damaged(file, "the object is missing")
        committed = self._commit(shard)["objects"][file.relative_to(self.path).as_posix()]["bytes"]
        if (found := file.stat().st_size) != committed:
            raise self._damaged(file, f"the object has {found} bytes, {committed} were committed")
        return file

    def _damaged(self, where: Path, what: object) -> DamagedStore:
        return DamagedStore(f"{where}: {what}; `verify {self.path}` lists every fault, then collect the store again.")


class ActivationStore(Store):
    """A store of residual-stream rows."""

    kind = "activations"

    @property
    def sites(self) -> list[str]:
        """The collected sites, such as `resid_post.3`."""
        return [array.name.removeprefix("acts/") for array in self.manifest.arrays if array.name.startswith("acts/")]

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
            f"{self.path}: {what} {asked}; it holds {', '.join(self.sites)}: choose one with --layer and --site."
        )

    def d_model(self, site: str) -> int:
        return self.manifest.array(f"acts/{site}").width


def _fits(site: str, name: str | None, layer: int | None) -> bool:
    own_name, _, own_layer = site.rpartition(".")
    return name in (None, own_name) and str(layer) in ("None", own_layer)
