"""Small durable files: atomic JSON, checksums of objects, free space.

A published file is complete or absent: bytes go to a temporary name, are flushed to the disk, and are renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from actstore.checked_json import Count, Hex64, HexWords, checked, parse_json
from actstore.errors import DamagedStore, NoSpace

RESERVE_BYTES = 64 << 20
"""Bytes left free on a disk, so that records and metrics can always be written."""
CONTENT = "content_sha256"


class Entry(TypedDict):
    """What a record says of an object: its length and sha256; of a shard also the crc32c that ends each of its chunks."""

    bytes: Count
    sha256: Hex64
    chunk_crc32c: NotRequired[HexWords]


def canonical_json(value: Any) -> str:
    """The one JSON text of `value`: sorted keys, no spaces; what content hashes are taken of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def content_hash(value: Any) -> str:
    """sha256 (hex) of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def read_json(path: Path) -> Any:
    """Raises DamagedStore, naming the file, when it holds no JSON."""
    return parse_json(path.read_bytes(), str(path))


def fsync_path(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_beside(path: Path, data: bytes, mark: str = "") -> Path:
    """The data, flushed to the disk, as the file `.<name><mark>.tmp` beside `path`, ready to be renamed.

    Raises OSError, naming `path`, and leaves nothing behind, when the disk refuses the bytes.
    """
    made = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}{mark}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    for folder in made:
        fsync_path(folder.parent)
    return temporary


def publish_bytes(path: Path, data: bytes, mark: str = "") -> None:
    """Write `data` to `path` so that a reader, or a crash, sees the whole file or none.

    Without a `mark` of its own for each, only one process may publish a path at a time: the temporary name is the same, so
    that the next write replaces what a kill left."""
    os.replace(write_beside(path, data, mark), path)
    fsync_path(path.parent)


def publish_json(path: Path, value: Any) -> None:
    """`publish_bytes` of readable JSON."""
    publish_bytes(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """A value as readable JSON, as files hold it."""
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def object_entry(data: bytes) -> Entry:
    """Length and sha256 of an object's bytes, as records hold them.

    Not the crc32c: every chunk ends in its own, and the crc of data followed by its crc is the same for all data.
    """
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def file_sha256(path: Path) -> str:
    """sha256 (hex) of a file, read piece by piece."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def record_bytes(value: dict[str, Any]) -> bytes:
    """A record as readable JSON that carries the content hash of the rest of itself."""
    return json_bytes({**value, CONTENT: content_hash(value)})


def parse_record(data: bytes, where: str) -> dict[str, Any]:
    """The value that `record_bytes` was given. Raises DamagedStore when the bytes are not those of `record_bytes`."""
    value = checked(parse_json(data, where), dict[str, Any], where)
    if CONTENT not in value:
        raise DamagedStore(f"{where}: not a record, since {CONTENT} is missing")
    stated = value.pop(CONTENT)
    if content_hash(value) != stated or record_bytes(value) != data:  # the same number can be written in two ways
        raise DamagedStore(f"{where}: was changed after it was written")
    return value


def free_bytes(path: Path) -> int:
    """Bytes a user may still write where `path` is, or will be."""
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def require_free_space(path: Path, needed_bytes: int, what: str) -> None:
    """Refuse a write that the disk cannot hold, before anything is written.

    Raises NoSpace when fewer than `needed_bytes` plus a reserve of 64 MiB are free.
    """
    available = free_bytes(path)
    if available < needed_bytes + RESERVE_BYTES:
        raise NoSpace(
            f"{path}: {what} needs {needed_bytes / 1e6:,.0f} MB and {RESERVE_BYTES / 1e6:,.0f} MB in reserve, the disk has "
            f"{available / 1e6:,.0f} MB free; free some space, ask for less, or write to another disk."
        )
