"""In: the path of something that actstore wrote. Out: what it is, what it was made from, its sizes and main figures."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from actstore import paths
from actstore.errors import NotAStore
from actstore.kind import found
from actstore.open_place import open_place
from actstore.reader import Store
from actstore.schema import PARTS
from actstore.sealed_folder import SealedFolder
from pipelines.analysis import record as analysis_record
from pipelines.sae import run_record
from pipelines.train import sweep_record


def facts(path: str | Path) -> dict[str, Any]:
    """What lies at `path`; `kind` is activations, codes, run, analysis, sweep, or that of other results.

    Raises NotAStore when nothing that actstore wrote lies there, and what opening a damaged one raises.
    """
    there = found(path)
    if there.kind in ("activations", "codes"):
        return store_facts(path)
    if there.kind == "run":
        return run_facts(Path(path))
    if there.kind == analysis_record.KIND:
        return analysis_facts(path)
    if there.kind == sweep_record.KIND:
        return sweep_facts(Path(path))
    if there.kind:
        return results_facts(path)
    raise NotAStore(
        f"{path}: {there.words}; pass a store, codes, a run, an analysis, a sweep or other results; `actstore ls` "
        "lists what lies below a folder."
    )


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
        "store": record.config.get("store", ""),
        **{name: record.config[name] for name in (*TRAINED_WITH, "origin") if name in record.config},
        "disk_bytes": sum(file.stat().st_size for file in Path(path).iterdir() if file.is_file()),
    }


def analysis_facts(path: str | Path) -> dict[str, Any]:
    """What an analysis' record says, and its size."""
    values = asdict(analysis_record.read_analysis_record(path))
    return {"path": str(path), **values, "kind": "analysis", "disk_bytes": sum(open_place(path).names().values())}


def results_facts(path: str | Path) -> dict[str, Any]:
    """What the record of other results says, such as those of `structure` or `effects`; what it lists is left out."""
    folder = SealedFolder(open_place(path))
    record = folder.record()
    plain = {name: value for name, value in record.items() if isinstance(value, str | int | float)}
    about = {name: plain[name] for name in plain if name not in ("format", "version", "findings")}
    sizes = {"objects": len(folder.seal.objects), "disk_bytes": sum(one.bytes for one in folder.seal.objects.values())}
    return {**about, "path": str(path), "kind": folder.seal.kind, **sizes}


def sweep_facts(path: str | Path) -> dict[str, Any]:
    """The runs of a sweep and how they compare."""
    return {"path": str(path), "kind": "sweep", **sweep_record.read_sweep(path)}
