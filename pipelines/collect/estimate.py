"""In: what `collect` would be asked for. Out: rows, bytes, memory and time, from a short calibration; nothing is written."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from actstore.arrays import shard_object
from actstore.codecs import encode_rows
from actstore.errors import InputError
from actstore.layout import Layout
from actstore.schema import PARTS
from pipelines.collect.config import CollectConfig
from pipelines.collect.prepare import Recipe, prepare
from pipelines.collect.shard_maker import SegmentText
from pipelines.text.tokens import TokenSource

SAMPLE_BATCHES = 8
LEAST_SECONDS = 2.0
SHARDS_IN_MEMORY = 3
"""The one that is computed, the one that is written, and the bytes it is written as."""
TABLE_BYTES_PER_TOKEN = 4
"""Ids, and the windows' tables."""


@dataclass(frozen=True)
class Calibration:
    """What a sample of the text showed."""

    rows_per_token: float
    tokens_per_s: float
    disk_bytes_per_row: dict[str, float]
    """By array."""
    process_bytes: int
    """Peak memory of this process, the model and its activations included."""


def estimate(config: CollectConfig) -> dict[str, Any]:
    """What collecting would take here. Raises what `collect` raises before it writes, but for what is at --out."""
    recipe = prepare(config)
    found = calibrate(config, recipe)
    n_rows = round(config.tokens * found.rows_per_token)
    layout = recipe.layout(n_rows, PARTS[0], config.shard_mib)
    by_array = {name: round(n_bytes * n_rows) for name, n_bytes in found.disk_bytes_per_row.items()}
    table_bytes = TABLE_BYTES_PER_TOKEN * config.tokens
    shard_bytes = layout.shard_rows * recipe.manifest.row_bytes
    return {
        "tokens": config.tokens,
        "rows": n_rows,
        "disk_bytes": sum(by_array.values()) + table_bytes,
        "disk_bytes_by_array": by_array,
        "shards": layout.n_shards,
        "shard_rows": layout.shard_rows,
        "chunk_rows": layout.chunk_rows,
        "memory_bytes": found.process_bytes + SHARDS_IN_MEMORY * shard_bytes + table_bytes,
        "tokens_per_s": round(found.tokens_per_s),
        "seconds": round(config.tokens / found.tokens_per_s),
    }


def calibrate(config: CollectConfig, recipe: Recipe) -> Calibration:
    """Run the model on the first windows of the corpus and encode their rows. Raises InputError when it has no text."""
    policy = recipe.manifest.policy
    source = TokenSource(recipe.corpus.documents(), recipe.codec)
    table = source.take(min(config.tokens, SAMPLE_BATCHES * config.batch_windows * policy.stride), 0)
    if table is None:
        raise InputError(f"corpus {config.corpus}: has no text.")
    text, parts, _ = recipe.plan(table, 0, config.shard_mib)
    n_tokens = len(table.ids) - len(table.names)
    return Calibration(
        rows_per_token=parts[PARTS[0]].n_rows / n_tokens,
        tokens_per_s=_tokens_per_s(recipe, text, n_tokens),
        disk_bytes_per_row=_disk_bytes_per_row(recipe, text),
        process_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def _tokens_per_s(recipe: Recipe, text: SegmentText, n_tokens: int) -> float:
    """Over whole batches, for two seconds or all of the sample, once a first batch has warmed things up."""
    windows = text.windows[PARTS[0]]
    batches = np.array_split(np.arange(len(windows)), -(-len(windows) // recipe.maker.batch_windows))
    recipe.maker.run(windows, batches[0])
    start, done = time.perf_counter(), 0
    for batch in batches:
        recipe.maker.run(windows, batch)
        done += len(batch)
        if time.perf_counter() - start > LEAST_SECONDS:
            break
    return n_tokens * done / len(windows) / (time.perf_counter() - start)


def _disk_bytes_per_row(recipe: Recipe, text: SegmentText) -> dict[str, float]:
    """By array, from the sample's first rows, encoded and compressed as a shard of their own."""
    found = {}
    channels = recipe.maker.channels(text)
    arrays: dict[str, Any] = {}
    for label, rows in recipe.maker.first_rows(text.windows[PARTS[0]]).items():
        n_rows = len(rows)
        kept, scale = encode_rows(rows, recipe.manifest.array(f"acts/{label}").encoding, channels.get(label))
        arrays |= {f"acts/{label}": kept} | ({f"scales/{label}": scale} if scale is not None else {})
    for array in recipe.manifest.arrays:
        kept = arrays.get(array.name, np.zeros((n_rows, *array.tail), array.dtype))
        found[array.name] = len(shard_object(array, Layout(n_rows, n_rows, n_rows), kept)) / n_rows
    return found
