"""Stores as an attacker would make them: records changed, and every hash that others take of them made to match again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from actstore.files import CONTENT, content_hash, object_entry, record_bytes

Edit = Callable[[dict[str, Any]], object]


def forge(file: Path, edit: Edit) -> None:
    """Change the value of a record in place, and make its own hash match."""
    value = json.loads(file.read_bytes())
    value.pop(CONTENT, None)
    edit(value)
    file.write_bytes(record_bytes(value))


def forge_store(path: Path, *, manifest: Edit | None = None, segment: Edit | None = None, shard: Edit | None = None) -> None:
    """Change the manifest, the first segment's record or those of shards, and what refers to them; no seal is left."""
    for seal in path.glob("commits/*/sealed.json"):
        seal.unlink()
    if manifest is not None:
        forge(path / "manifest.json", manifest)
    identity = json.loads((path / "manifest.json").read_bytes())["identity"]
    store_id = content_hash(identity)[:16]
    forge(path / "manifest.json", lambda value: value.update(store_id=store_id))
    for file in sorted(path.glob("commits/*/segment.json")):
        forge(file, lambda value: value.update(store_id=store_id))
        if segment is not None and file.parent.name == "0000":
            forge(file, segment)
        value = json.loads(file.read_bytes())
        content_id = content_hash([value.get(key) for key in ("store_id", "index", "parts", "objects")])[:16]
        for record in sorted(file.parent.glob("*/*.json")):
            forge(record, lambda value, content_id=content_id: value.update(segment=content_id))  # type: ignore[misc]
            if shard is not None:
                forge(record, shard)


def forge_object(path: Path, name: str, data: bytes) -> None:
    """Put other bytes under an object's name, and have the first segment's record and its shard records commit them."""
    (path / name).parent.mkdir(parents=True, exist_ok=True)
    (path / name).write_bytes(data)
    entry = object_entry(data)

    def commit(value: dict[str, Any]) -> None:
        if name in value["objects"]:
            value["objects"][name] = {**value["objects"][name], **entry}

    forge_store(path, segment=commit, shard=commit)
