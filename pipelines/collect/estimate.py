"""In: what `collect` would be asked for. Out: rows, bytes, memory and time, from a short calibration; nothing is written."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from actstore.arrays import shard_object
from actstore.errors import InputError
from actstore.layout import Layout
from actstore.schema import PARTS, site_values
from pipelines.collect.collection import Collection
from pipelines.collect.config import CollectConfig
from pipelines.collect.prepare import prepare
from pipelines.collect.segment_plan import SegmentPlan, part_layout

SAMPLE_BATCHES = 8
LEAST_SECONDS = 2.0
SHARDS_IN_MEMORY = 3
"""Shards in memory: the computed one, the written one, and the bytes of the written one."""
TABLE_BYTES_PER_TOKEN = 4
"""Ids, and the windows' tables."""


@dataclass(frozen=True)
class Calibration:
    """Figures of a sample of the text."""

    rows_per_token: float
    tokens_per_s: float
    disk_bytes_per_row: dict[str, float]
    """By array."""
    process_bytes: int
    """Peak memory of this process, the model and its activations included."""


def estimate(config: CollectConfig) -> dict[str, Any]:
    """What collecting would take here. Raises what `collect` raises before it writes, except errors about --out."""
    collection = prepare(config)
    calibration = calibrate(collection)
    n_rows = round(config.tokens * calibration.rows_per_token)
    layout = part_layout(collection.manifest, n_rows, PARTS[0], config.shard_mib)
    by_array = {name: round(n_bytes * n_rows) for name, n_bytes in calibration.disk_bytes_per_row.items()}
    table_bytes = TABLE_BYTES_PER_TOKEN * config.tokens
    shard_bytes = layout.shard_rows * collection.manifest.row_bytes
    return {
        "tokens": config.tokens,
        "rows": n_rows,
        "disk_bytes": sum(by_array.values()) + table_bytes,
        "disk_bytes_by_array": by_array,
        "shards": layout.n_shards,
        "shard_rows": layout.shard_rows,
        "chunk_rows": layout.chunk_rows,
        "memory_bytes": calibration.process_bytes + SHARDS_IN_MEMORY * shard_bytes + table_bytes,
        "tokens_per_s": round(calibration.tokens_per_s),
        "seconds": round(config.tokens / calibration.tokens_per_s),
        "corpus_skipped": collection.text.corpus.skipped,
    }


def calibrate(collection: Collection) -> Calibration:
    """Run the model on the first windows of the corpus and encode their rows. Raises InputError when it has no text."""
    config, stride = collection.config, collection.manifest.policy.stride
    table = collection.text.source().take(min(config.tokens, SAMPLE_BATCHES * config.batch_windows * stride), 0)
    if table is None:
        raise InputError(f"corpus {config.corpus}: has no text.")
    plan = collection.plan(table, 0)
    n_tokens = len(table.ids) - len(table.names)
    return Calibration(
        rows_per_token=plan.parts[PARTS[0]].n_rows / n_tokens,
        tokens_per_s=_tokens_per_s(collection, plan, n_tokens),
        disk_bytes_per_row=_disk_bytes_per_row(collection, plan),
        process_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def _tokens_per_s(collection: Collection, plan: SegmentPlan, n_tokens: int) -> float:
    """Over whole batches, for two seconds or all of the sample, once a first batch has warmed things up."""
    windows = plan.windows[PARTS[0]]
    batches = np.array_split(np.arange(len(windows)), -(-len(windows) // collection.config.batch_windows))
    collection.run(windows, batches[0])
    start, done = time.perf_counter(), 0
    for batch in batches:
        collection.run(windows, batch)
        done += len(batch)
        if time.perf_counter() - start > LEAST_SECONDS:
            break
    return n_tokens * done / len(windows) / (time.perf_counter() - start)


def _disk_bytes_per_row(collection: Collection, plan: SegmentPlan) -> dict[str, float]:
    """By array, from the sample's first rows, encoded and compressed as a shard of their own."""
    channels = collection.channels(plan)
    arrays: dict[str, Any] = {}
    for site, rows in collection.first_rows(plan.windows[PARTS[0]]).items():
        n_rows = len(rows)
        arrays |= site_values(site, rows, collection.manifest.encoding(site), channels.get(site))
    n_bytes = {}
    for array in collection.manifest.arrays:
        kept = arrays.get(array.name, np.zeros((n_rows, *array.tail), array.dtype))
        n_bytes[array.name] = len(shard_object(array, Layout(n_rows, n_rows, n_rows), kept)) / n_rows
    return n_bytes
