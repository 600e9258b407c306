"""Create, append, commit: the only code that writes a store.

The protocol: the manifest makes a store, a segment record makes a segment, a commit record makes a shard. Objects
are written and flushed first, the record that names their length and sha256 is published last, atomically. What
has no record does not exist, so a kill at any moment leaves a store that reads true and can be continued. A shard
is written whole, by one writer; an uncommitted leftover of it is deleted before it is written again.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, BloscShuffle, Crc32cCodec
from zarr.core.array_spec import ArrayConfigParams

from actstore import paths
from actstore.codecs import ENCODINGS
from actstore.errors import DamagedStore, IdentityMismatch, LockedStore, OutputExists
from actstore.files import fsync_path, object_record, publish_bytes, publish_json, read_json
from actstore.layout import Layout
from actstore.schema import Manifest, RowArray, SegmentRecord, differing_fields

TABLE_CHUNK = 1 << 20
ALL_CHUNKS: ArrayConfigParams = {"write_empty_chunks": True}
"""Chunks of zeros are written too: what is missing is a fault. An opened array has to be told again."""


class StoreWriter:
    """One process's right to write a store: holds its lock while open.

    >>> with StoreWriter.open(path, manifest, tokenizer_files) as writer:  # doctest: +SKIP
    ...     writer.add_segment(record, tables)
    ...     for part, shard in writer.missing_shards(0):
    ...         write_shard(path, manifest, record, part, shard, arrays)
    ...     writer.seal(0)
    """

    def __init__(self, path: Path, manifest: Manifest, lock_descriptor: int):
        self.path = path
        self.manifest = manifest
        self._lock = lock_descriptor

    @classmethod
    def open(cls, path: Path, manifest: Manifest, tokenizer_files: dict[str, bytes]) -> StoreWriter:
        """Create the store, or continue one of the same identity.

        Raises OutputExists when something else is at `path`, IdentityMismatch (naming the fields) when a store of
        another identity is, LockedStore while another process writes it.
        """
        require_store_place(path)
        path.mkdir(parents=True, exist_ok=True)
        lock = _take_lock(path)
        try:
            if (path / paths.MANIFEST).exists():
                existing = Manifest.from_json(read_json(path / paths.MANIFEST), str(path))
                differences = differing_fields(existing, manifest)
                if differences:
                    raise IdentityMismatch(
                        f"{path}: holds another store (there / asked): {'; '.join(differences)}; "
                        "choose another --out, or ask for what is there."
                    )
                return cls(path, existing, lock)
            for name, data in tokenizer_files.items():
                publish_bytes(path / paths.TOKENIZER / name, data)
            records = {name: object_record(path / paths.TOKENIZER / name) for name in tokenizer_files}
            manifest = replace(manifest, provenance={**manifest.provenance, "tokenizer_files": records})
            publish_json(path / paths.MANIFEST, manifest.to_json())
            return cls(path, manifest, lock)
        except BaseException:
            os.close(lock)
            raise

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._lock)

    def segments(self) -> list[SegmentRecord]:
        """The published segments, in order."""
        return read_segments(self.path)

    def add_segment(self, record: SegmentRecord, tables: dict[str, NDArray[Any]]) -> SegmentRecord:
        """Write a segment's tables, create its row arrays, and publish its record with all their checksums.

        `tables` maps array names below the segment (`tokens/ids`, `train/windows/token_start`, ...) to 1-D arrays.
        What a killed attempt left of it is removed first.
        """
        if record.index != len(self.segments()):
            raise ValueError(f"segment {record.index} is not the next one: there are {len(self.segments())}")
        data = self.path / paths.DATA
        group = data / paths.segment_group(record.index)
        leftover = group if record.index else data
        if leftover.exists():
            shutil.rmtree(leftover)
        for unfinished in (*data.glob("*.partial"), *group.parent.glob("*.partial")):
            unfinished.unlink()
        for name, values in tables.items():
            _write_table(data, f"{paths.segment_group(record.index)}/{name}", values)
        for part, part_record in record.parts.items():
            for array in self.manifest.arrays:
                name = f"{paths.segment_group(record.index)}/{part}/{array.name}"
                _create_row_array(data, name, array, part_record.layout)
        objects = {}
        parents = (data, data / "zarr.json", group.parent, group.parent / "zarr.json")
        for path in sorted([self.path, *parents, group, *group.rglob("*")]):
            fsync_path(path)
            if path.is_file():
                objects[path.relative_to(self.path).as_posix()] = object_record(path)
        published = replace(record, objects=objects)
        publish_json(paths.segment_record(self.path, record.index), published.to_json())
        return published

    def missing_shards(self, segment: int) -> list[tuple[str, int]]:
        """(part, shard) of every shard of a segment that has no commit record."""
        record = self.segments()[segment]
        return [
            (part, shard)
            for part, part_record in record.parts.items()
            for shard in range(part_record.layout.n_shards)
            if not paths.shard_record(self.path, segment, part, shard).exists()
        ]

    def seal(self, segment: int) -> None:
        """Publish the list of a finished segment's records: from now on a missing or changed one is a fault."""
        if self.missing_shards(segment):
            raise ValueError(f"segment {segment} is not complete")
        files = [paths.segment_record(self.path, segment)] + [
            paths.shard_record(self.path, segment, part, shard)
            for part, record in self.segments()[segment].parts.items()
            for shard in range(record.layout.n_shards)
        ]
        records = {file.relative_to(self.path).as_posix(): object_record(file) for file in files}
        publish_json(paths.sealed_record(self.path, segment), {"records": records})


def write_shard(
    store: Path, manifest: Manifest, segment: SegmentRecord, part: str, shard: int, arrays: dict[str, NDArray[Any]]
) -> None:
    """Write one whole shard of every row array, flush it, and publish its commit record.

    `arrays` maps each array's name to what its encoding keeps, (rows of the shard, width); arrays named
    `stats/...` that the manifest does not list go into the record itself, as lists.
    """
    layout = segment.parts[part].layout
    start, stop = layout.shard_range(shard)
    objects = {}
    for array in manifest.arrays:
        kept = arrays[array.name]
        if kept.shape != (stop - start, *array.tail) or kept.dtype != np.dtype(array.dtype):
            raise ValueError(f"{array.name}: {kept.shape} {kept.dtype} is not shard {shard}'s {stop - start} rows")
        folder = paths.array(store, segment.index, f"{part}/{array.name}")
        target = paths.shard_object(folder, shard, kept.ndim)
        for leftover in (target, *target.parent.glob(f"{target.name}.*.partial")):
            leftover.unlink(missing_ok=True)
        zarr.open_array(folder, mode="r+").with_config(ALL_CHUNKS)[start:stop] = kept
        for path in (target, *target.parents[: kept.ndim + 1]):
            fsync_path(path)
        objects[target.relative_to(store).as_posix()] = object_record(target)
    statistics = {name: values.tolist() for name, values in arrays.items() if name.startswith("stats/")}
    record = {"rows": [start, stop], "objects": objects, "stats": statistics}
    publish_json(paths.shard_record(store, segment.index, part, shard), record)


def require_store_place(path: Path) -> None:
    """Raises OutputExists when `path` is neither free nor a store, finished or not."""
    if path.exists() and not (path / paths.MANIFEST).exists() and not _is_unfinished_creation(path):
        raise OutputExists(f"{path}: exists and is not a store; choose another --out, or move it away.")


def read_segments(store: Path) -> list[SegmentRecord]:
    """The segments of a store that have been published, in order.

    Raises DamagedStore when the record of a sealed segment is missing or is not the one that was sealed.
    """
    records: list[SegmentRecord] = []
    while True:
        file, seal = paths.segment_record(store, len(records)), paths.sealed_record(store, len(records))
        if seal.exists():
            expected = read_json(seal)["records"].get(file.relative_to(store).as_posix())
            if not file.exists() or object_record(file) != expected:
                raise DamagedStore(f"{file}: missing or changed, though its segment is sealed; restore it from a copy.")
        if not file.exists():
            return records
        records.append(SegmentRecord.from_json(read_json(file)))


def _compressors(compressed: bool, itemsize: int) -> list[Any]:
    blosc = [BloscCodec(typesize=itemsize, cname="zstd", clevel=1, shuffle=BloscShuffle.shuffle)] if compressed else []
    return [*blosc, Crc32cCodec()]


def _create_row_array(data: Path, name: str, array: RowArray, layout: Layout) -> None:
    encoding = ENCODINGS[array.encoding]
    zarr.create_array(
        store=data,
        name=name,
        shape=(layout.n_rows, *array.tail),
        chunks=(layout.chunk_rows, *array.tail),
        shards=(layout.shard_rows, *array.tail),
        dtype=array.dtype,
        fill_value=_no_row_value(np.dtype(array.dtype)),
        compressors=_compressors(encoding.compressed, np.dtype(array.dtype).itemsize),
    )


def _no_row_value(dtype: np.dtype[Any]) -> float:
    """NaN or the largest integer (for bf16 a NaN as well). Zarr leaves out chunks that hold nothing but the fill value:
    so a chunk with a row is always written, and those behind the end of a short last shard take no space."""
    return float("nan") if dtype.kind == "f" else int(np.iinfo(dtype).max)


def _write_table(data: Path, name: str, values: NDArray[Any]) -> None:
    table = zarr.create_array(
        store=data,
        name=name,
        shape=values.shape,
        chunks=(min(TABLE_CHUNK, max(len(values), 1)),),
        dtype=values.dtype,
        compressors=_compressors(True, values.dtype.itemsize),
        config=ALL_CHUNKS,
    )
    table[:] = values


def _take_lock(path: Path) -> int:
    descriptor = os.open(path / paths.LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise LockedStore(f"{path}: another process is writing this store; wait for it, or stop it.") from None
    return descriptor


def _is_unfinished_creation(path: Path) -> bool:
    """Nothing but what `open` writes before the manifest: a creation that was killed."""
    if not path.is_dir():
        return False
    return all(
        item.name in (paths.LOCK, paths.TOKENIZER) or item.name.startswith(".manifest.json.") for item in path.iterdir()
    )
