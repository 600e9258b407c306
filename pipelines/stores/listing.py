"""In: a folder. Out: the stores, codes, runs, analyses and other results below it, and what was made from what."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actstore import paths
from actstore.errors import ActstoreError, IncompleteStore, InputError
from actstore.kind import RECORDS, SEAL, found
from actstore.reader import Store
from actstore.schema import PARTS
from pipelines.analysis import record as analysis_record
from pipelines.sae import run_record
from pipelines.stores.facts import results_facts

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
    """Everything that actstore wrote below a folder, by path. Raises InputError when it is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: not a folder; pass one that holds stores or runs.")
    return [_listed(path, kind) for path, kind in sorted(homes(folder))]


def homes(folder: Path) -> Iterator[tuple[Path, str]]:
    """(folder, kind) of all that actstore wrote, finished or not; folders inside a store are left out."""
    names = {entry.name for entry in folder.iterdir() if not entry.is_symlink()}
    if names & {paths.MANIFEST, SEAL, *RECORDS} and (kind := found(folder).kind):
        yield folder, kind
    for name in sorted(names - set(SKIPPED)):
        if (folder / name).is_dir() and not name.startswith("."):
            yield from homes(folder / name)


def _listed(path: Path, kind: str) -> Listed:
    try:
        if kind in ("activations", "codes"):
            return _store(path)
        if kind == "run":
            return _run(path, json.loads((path / run_record.RECORD).read_text(encoding="utf-8")))
        return _analysis(path) if kind == analysis_record.KIND else _results(path)
    except IncompleteStore:
        return Listed(str(path), kind, "", "not finished", "")
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


def _analysis(path: Path) -> Listed:
    record = analysis_record.read_analysis_record(path)
    what = f"{record.n_rows:,} rows, {record.n_features:,} features"
    return Listed(str(path), "analysis", record.codes_id, what, f"{record.store_id} {record.run_id}")


def _results(path: Path) -> Listed:
    facts = results_facts(path)
    origin = " ".join(str(facts[name]) for name in ("store_id", "run_id", "codes_id") if name in facts)
    what = f"{facts['objects']:,} files, {facts['disk_bytes'] / 1e6:,.1f} MB"
    return Listed(str(path), facts["kind"], "", what, origin)


def listing_lines(listed: list[dict[str, Any]]) -> list[str]:
    """The table that `ls` prints."""
    if not listed:
        return ["nothing that actstore wrote"]
    columns = ("path", "kind", "id", "what", "made_from")
    widths = {name: max(len(str(row[name])) for row in [*listed, {c: c for c in columns}]) for name in columns}
    rows = [{c: c.replace("_", " ") for c in columns}, *listed]
    return ["  ".join(str(row[name]).ljust(widths[name]) for name in columns).rstrip() for row in rows]
