"""In: a folder. Out: the stores, codes, runs and analyses below it, and what was made from what."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actstore import paths
from actstore.errors import ActstoreError, InputError
from actstore.reader import Store
from actstore.schema import PARTS
from pipelines.analysis import record as analysis_record
from pipelines.sae import run_record

SKIPPED = (paths.DATA, paths.COMMITS, paths.TOKENIZER)


@dataclass(frozen=True)
class Listed:
    """One thing that actstore wrote."""

    path: str
    kind: str
    id: str
    what: str
    made_from: str


def list_folder(folder: str | Path) -> list[Listed]:
    """Every store, code store, run and analysis below a folder, by path. Raises InputError when it is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: not a folder; pass one that holds stores or runs.")
    return [_listed(path) for path in sorted(_homes(folder))]


def _homes(folder: Path) -> Iterator[Path]:
    """Folders that hold a record of actstore's; folders inside a store are left out."""
    names = {entry.name for entry in folder.iterdir() if not entry.is_symlink()}
    if names & {paths.MANIFEST, run_record.RECORD, analysis_record.RECORD}:
        yield folder
    for name in sorted(names - set(SKIPPED)):
        if (folder / name).is_dir() and not name.startswith("."):
            yield from _homes(folder / name)


def _listed(path: Path) -> Listed:
    try:
        if (path / paths.MANIFEST).exists():
            return _store(path)
        if (path / run_record.RECORD).exists():
            return _run(path, json.loads((path / run_record.RECORD).read_text(encoding="utf-8")))
        return _analysis(path, json.loads((path / analysis_record.RECORD).read_text(encoding="utf-8")))
    except (ActstoreError, ValueError, KeyError, OSError) as error:
        return Listed(str(path), "unreadable", "", " ".join(str(error).split()), "")


def _store(path: Path) -> Listed:
    store = Store(path, partial=True)
    manifest = store.manifest
    rows = sum(store.n_rows(part) for part in PARTS)
    planned = sum(part.n_rows for segment in store.segments for part in segment.parts.values())
    of_all = "" if rows == planned else f" of {planned:,}"
    if sites := manifest.sites:
        shown = f"{', '.join(sites)}, {manifest.encoding(sites[0]).name}"
    else:
        shown = f"{manifest.source['n_features']:,} features of {manifest.source['site']}, codes"
    what = f"{rows:,}{of_all} rows, {shown}, {store.disk_bytes / 1e6:,.0f} MB"
    made_from = manifest.source.get("store_id", "")
    if "run_id" in manifest.source:
        made_from += f" {manifest.source['run_id']}"
    origin = made_from or f"{manifest.provenance.get('model')} on {manifest.corpus.spec}"
    return Listed(str(path), "store" if manifest.kind == "activations" else manifest.kind, store.store_id, what, origin)


def _run(path: Path, record: dict[str, Any]) -> Listed:
    fve = record.get("metrics", {}).get("fve")
    what = f"{record['architecture']} {record['n_features']:,} features, k {record['k']}, {record['site']}"
    return Listed(
        str(path), "run", record["run_id"], what + (f", FVE {fve:.3f}" if fve is not None else ""), record["store_id"]
    )


def _analysis(path: Path, record: dict[str, Any]) -> Listed:
    what = f"{record['n_rows']:,} rows, {record['n_features']:,} features"
    return Listed(str(path), "analysis", record["codes_id"], what, f"{record['store_id']} {record['run_id']}")


def listing_lines(listed: list[dict[str, Any]]) -> list[str]:
    """The table that `ls` prints."""
    if not listed:
        return ["nothing that actstore wrote"]
    columns = ("path", "kind", "id", "what", "made_from")
    widths = {name: max(len(str(row[name])) for row in [*listed, {c: c for c in columns}]) for name in columns}
    rows = [{c: c.replace("_", " ") for c in columns}, *listed]
    return ["  ".join(str(row[name]).ljust(widths[name]) for name in columns).rstrip() for row in rows]
