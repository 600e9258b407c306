"""In: a store and a run. Out: a code store, the k largest codes of every row, in the format of the store.

One task encodes one shard and puts its rows back into (window, position) order. Like every store, a code store is
committed shard by shard, continued by running the command again, and stands alone: it copies the token table and
the tokenizer.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actstore import paths
from actstore.errors import IdentityMismatch
from actstore.place import absolute, open_place
from actstore.reader import ActivationStore, Store
from actstore.schema import PARTS, Manifest, RowArray
from actstore.writer import StoreWriter, require_store_place, write_shard
from pipelines.cluster import connect, run_tasks
from pipelines.code_store import CodeStore
from pipelines.sae.base import Sae
from pipelines.sae.checkpoint import RunRecord, load_run, require_match

ENCODE_ROWS = 4096


@dataclass(frozen=True)
class EncodeConfig:
    """What `encode` is asked for; the names are the command's options."""

    store: str | Path
    run: Path
    out: str | Path
    workers: int = 2
    scheduler: str | None = None


def encode(config: EncodeConfig, client: Any = None) -> dict[str, Any]:
    """Encode every row of both splits once; continues a code store that was interrupted.

    `client` is a Dask client to use instead of the one the configuration asks for. Raises what `require_match`
    raises, and OutputExists, NoSpace, IdentityMismatch.
    """
    require_store_place(config.out)
    store = _source(config)
    _, record = load_run(config.run)
    require_match(config.run, record, store)
    manifest = _manifest(store, record, config.run)
    n_rows = sum(store.n_rows(part) for part in PARTS)
    open_place(config.out).require_space(n_rows * record.code_width * 8, f"the codes of {n_rows:,} rows")
    # The cluster comes before the store: nothing is written when the scheduler does not answer.
    where = connect(config.scheduler, config.workers) if client is None else nullcontext(client)
    with where as connected, StoreWriter.open(config.out, manifest, store.tokenizer_files()) as writer:
        segments = [
            writer.put_segment(replace(segment, store_id=manifest.store_id), partial(store.text_tables, segment.index))
            for segment in store.segments
        ]
        source = (absolute(config.store), config.run.absolute(), store.snapshot, record.run_id)
        tasks = [
            (*source, absolute(config.out), segment.index, part, shard)
            for segment in segments
            for part, shard in writer.missing_shards(segment)
        ]
        if tasks:
            run_tasks(connected, "encode", encode_shard, tasks)
        for segment in segments:
            if not writer.is_sealed(segment):
                writer.seal(segment)
    codes = CodeStore(config.out)
    notes = [codes.notes(shard) for part in PARTS for shard in codes.shards(part)]
    return {
        "codes": str(config.out),
        "store_id": codes.store_id,
        "rows": n_rows,
        "features": record.n_features,
        "code_width": record.code_width,
        "rows_cut": sum(note["rows_cut"] for note in notes),
        "codes_cut": sum(note["codes_cut"] for note in notes),
        "disk_bytes": codes.disk_bytes,
    }


def encode_shard(
    store_url: str, run_path: Path, snapshot: str, run_id: str, out: str, segment: int, part: str, index: int
) -> None:
    """Encode one shard of a store into the same shard of a code store, and commit it. Runs on a worker."""
    store, sae, record = _opened(store_url, run_path, snapshot, run_id)
    target = Store(out, partial=True)
    shard = next(s for s in store.shards(part) if (s.segment, s.index) == (segment, index))
    window, position = store.read(shard, "rows/window"), store.read(shard, "rows/position")
    order = np.lexsort((position, window))
    index_array, value_array = target.manifest.array("codes/index"), target.manifest.array("codes/value")
    indices = np.empty((shard.n_rows, record.code_width), index_array.dtype)
    values = np.empty((shard.n_rows, record.code_width), value_array.dtype)
    rows_cut = codes_cut = 0
    for start in range(0, shard.n_rows, ENCODE_ROWS):
        rows = store.read(shard, f"acts/{record.site}", start, min(start + ENCODE_ROWS, shard.n_rows))
        with torch.inference_mode():
            codes = sae.codes(torch.from_numpy(rows))
            found_values, found_indices = codes.padded(record.code_width)
        too_many = (codes.active.counts - record.code_width).clamp_min(0)
        rows_cut, codes_cut = rows_cut + int((too_many > 0).sum()), codes_cut + int(too_many.sum())
        values[start : start + len(rows)] = found_values.numpy()
        indices[start : start + len(rows)] = found_indices.numpy()
    arrays = {"rows/window": window[order], "rows/position": position[order]}
    arrays |= {"codes/index": indices[order], "codes/value": values[order]}
    write_shard(
        target.place,
        target.manifest,
        target.segments[segment],
        part,
        index,
        arrays,
        {"stats": {}, "rows_cut": rows_cut, "codes_cut": codes_cut},
    )


@lru_cache(maxsize=4)
def _opened(store_url: str, run_path: Path, snapshot: str, run_id: str) -> tuple[ActivationStore, Sae, RunRecord]:
    """A store and a run, opened once a process. Raises IdentityMismatch when this process sees others at these paths."""
    store = ActivationStore(store_url, snapshot=snapshot)
    sae, record = load_run(run_path)
    if record.run_id != run_id:
        raise IdentityMismatch(
            f"{run_path}: is run {record.run_id} here, {run_id} was asked for; show workers the same disk."
        )
    return store, sae, record


def _manifest(store: ActivationStore, record: RunRecord, run_path: Path) -> Manifest:
    index_dtype = np.min_scalar_type(record.n_features - 1).name
    return replace(
        store.manifest,
        kind="codes",
        arrays=(
            RowArray("rows/window", 0, "uint32", "raw"),
            RowArray("rows/position", 0, "uint16", "raw"),
            RowArray("codes/index", record.code_width, index_dtype, "packed"),
            RowArray("codes/value", record.code_width, "float32", "packed"),
        ),
        source={
            "store_id": store.store_id,
            "snapshot": store.snapshot,
            "run_id": record.run_id,
            "site": record.site,
            "n_features": record.n_features,
        },
        provenance={**store.manifest.provenance, "run": str(run_path), "store": store.url},
    )


def _source(config: EncodeConfig) -> ActivationStore:
    """The store as it was when the code store was begun, if it was; else as it is now."""
    out = open_place(config.out)
    snapshot = Store(out, partial=True).manifest.source.get("snapshot") if out.exists(paths.MANIFEST) else None
    current = ActivationStore(config.store)
    if snapshot is None or snapshot == current.snapshot:
        return current
    try:
        return ActivationStore(config.store, snapshot=snapshot)
    except IdentityMismatch:
        return current  # the codes there are of another store, and the writer says so
