"""In: the path of something that actstore wrote. Out: what it is, what it was made from, its sizes and main figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from actstore import paths
from actstore.open_place import open_place
from actstore.reader import Store
from actstore.schema import PARTS
from pipelines.analysis import record as analysis_record
from pipelines.sae import run_record
from pipelines.train import sweep_record


def facts(path: str | Path) -> dict[str, Any]:
    """What lies at `path`; `kind` is activations, codes, run, analysis or sweep.

    Raises NotAStore when nothing that actstore wrote lies there, and what opening a damaged one raises.
    """
    entries = open_place(path).entries()
    if paths.MANIFEST not in entries:
        if run_record.RECORD in entries:
            return run_facts(Path(path))
        if analysis_record.RECORD in entries:
            return analysis_facts(path)
        if sweep_record.SUMMARY in entries:
            return sweep_facts(Path(path))
    return store_facts(path)


def store_facts(path: str | Path) -> dict[str, Any]:
    """Identity, origin and sizes of a store of activations or codes; it may be half-written."""
    store = Store(path, partial=True)
    manifest = store.manifest
    tokens = sum(segment.n_tokens for segment in store.segments)
    values = {
        "path": str(path),
        "store_id": store.store_id,
        "snapshot": store.snapshot,
        "kind": manifest.kind,
        "model": manifest.provenance.get("model"),
        "weights": manifest.model.weights_sha256[:16],
        "corpus": manifest.corpus.spec,
        "tokens": tokens,
        "rows": {part: store.n_rows(part) for part in PARTS},
        "shards_committed": sum(len(store.shards(part)) for part in PARTS),
        "shards_planned": sum(record.layout.n_shards for segment in store.segments for record in segment.parts.values()),
        "arrays": {array.name: f"{array.width or 1} x {array.encoding} ({array.dtype})" for array in manifest.arrays},
        "context": manifest.policy.context,
        "compute_dtype": manifest.compute_dtype,
        "seed": manifest.seed,
        "disk_bytes": store.disk_bytes,
        "disk_bytes_per_million_tokens": round(store.disk_bytes * 1e6 / max(tokens, 1)),
        "source": manifest.source,
    }
    if manifest.kind == "codes":
        values |= {
            "store": manifest.provenance["store"],
            "run": manifest.provenance["run"],
            "features": manifest.source["n_features"],
            "code_width": manifest.array("codes/index").width,
            "feature_index": store.place.exists(paths.INDEX_RECORD),
        }
    return values


TRAINED_WITH = ("lr", "l1", "kernel", "seed")
"""Fields that the configuration of a trained run has, and that of an imported run lacks."""


def run_facts(path: str | Path) -> dict[str, Any]:
    """What a run's record states: `metrics` are those of its last training step. An imported run has an `origin`, the facts
    that its file stated, and none of TRAINED_WITH."""
    record = run_record.read_run_record(path)
    return {
        "path": str(path),
        "run_id": record.run_id,
        "kind": "run",
        **{name: value for name, value in vars(record).items() if name not in ("history", "config")},
        "store": record.config["store"],
        **{name: record.config[name] for name in (*TRAINED_WITH, "origin") if name in record.config},
        "disk_bytes": sum(file.stat().st_size for file in Path(path).iterdir() if file.is_file()),
    }


def analysis_facts(path: str | Path) -> dict[str, Any]:
    """What an analysis' record says, and its size."""
    record = analysis_record.read_analysis_record(path)
    values = {name: value for name, value in record.items() if name not in ("format", "version")}
    return {"path": str(path), **values, "kind": "analysis", "disk_bytes": sum(open_place(path).names().values())}


def sweep_facts(path: str | Path) -> dict[str, Any]:
    """The runs of a sweep and how they compare."""
    return {"path": str(path), "kind": "sweep", **sweep_record.read_sweep(path)}
