"""`analysis.json`, the record that makes an analysis exist: what was counted, and of which codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from actstore.errors import NotAStore
from actstore.open_place import open_place

ANALYSIS_VERSION = 2
RECORD = "analysis.json"


def read_analysis_record(path: str | Path) -> dict[str, Any]:
    """The record of a finished analysis. Raises NotAStore when `path` holds none of this format version."""
    try:
        record: dict[str, Any] = json.loads(open_place(path).read(RECORD))
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise NotAStore(f"{path}: not an analysis (no {RECORD}); pass what `analyze` wrote.") from error
    version = record.get("version") if record.get("format") == "actstore-analysis" else None
    if version != ANALYSIS_VERSION:
        raise NotAStore(
            f"{path}: an analysis of format version {version}, this actstore reads {ANALYSIS_VERSION}; its codes "
            f"are still good: `actstore analyze {record.get('codes', 'CODES')} --out ANOTHER`."
        )
    return record
