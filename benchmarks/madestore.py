"""A store of made-up rows at any size, written by the real writer: what benchmarks read that need no model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from actstore.codecs import encode_rows
from actstore.layout import MIN_SHARDS, choose_layout
from actstore.moments import Moments
from actstore.plan import PartPlan
from actstore.schema import (
    PARTS,
    CorpusIdentity,
    Manifest,
    ModelIdentity,
    PartRecord,
    RowArray,
    SegmentRecord,
    WindowPolicy,
    site_arrays,
)
from actstore.writer import StoreWriter, write_shard

SITE = "resid_post.0"
CONTEXT = 128
OUTLIERS = ((138, 40.0, 15.0), (378, -60.0, 8.0), (447, 150.0, 20.0))
"""(channel, mean, deviation) of the made-up outlier dimensions; the other channels' deviations are around 1."""


def residual_rows(n_rows: int, d_model: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """(n, d) rows like a residual stream's: channels of uneven size, three of them outliers tens of times the others.

    GPT-2's first position, whose norm is some 30 times the others', is not among them: stores leave it out.
    """
    rows = rng.standard_normal((n_rows, d_model), dtype=np.float32)
    rows *= np.exp(np.random.default_rng(1).standard_normal(d_model) * 0.5).astype(np.float32)
    for channel, mean, deviation in OUTLIERS:
        if channel < d_model:
            rows[:, channel] = rows[:, channel] * np.float32(deviation) + np.float32(mean)
    return rows


def make_store(path: Path, n_rows: int, d_model: int = 768, encoding: str = "fp16", seed: int = 0) -> Path:
    """A store of about `n_rows` training rows, all of one long document; returns `path`."""
    n_windows = -(-n_rows // (CONTEXT - 1))
    counts = {"train": np.full(n_windows, CONTEXT - 1, np.int64), "heldout": np.zeros(0, np.int64)}
    manifest = Manifest(
        kind="activations",
        model=ModelIdentity("made-up", 1, d_model, "0" * 64),
        tokenizer_sha256="0" * 64,
        corpus=CorpusIdentity("made-up", "0" * 64),
        policy=WindowPolicy(CONTEXT, True, "packed", False, 0, 0),
        arrays=(
            RowArray("rows/window", 0, "uint32", "raw"),
            RowArray("rows/position", 0, "uint16", "raw"),
            *site_arrays(SITE, d_model, encoding),
        ),
        compute_dtype="fp32",
        seed=seed,
    )
    n_tokens = int(counts["train"].sum())
    tables = {
        "tokens/ids": np.ones(n_tokens + 1, np.uint16),
        "documents/offsets": np.array([0, n_tokens + 1]),
        "documents/heldout": np.zeros(1, np.uint8),
        "documents/source": np.frombuffer(b"made up", np.uint8),
    }
    sample = Moments(d_model)
    sample.update(residual_rows(4096, d_model, np.random.default_rng(seed)))
    channels = sample.channels()
    if encoding == "int8":
        tables[f"channels/{SITE}"] = channels.table
    parts, plans = {}, {}
    for index, part in enumerate(PARTS):
        layout = choose_layout(int(counts[part].sum()), manifest.row_bytes, 4 * d_model, min_shards=MIN_SHARDS)
        plans[part] = PartPlan.build(seed, 0, index, layout, counts[part])
        parts[part] = PartRecord(len(counts[part]), layout.n_rows, layout.shard_rows, layout.chunk_rows)
        starts = np.arange(len(counts[part]), dtype=np.int64) * (CONTEXT - 1)
        tables |= {
            f"{part}/windows/token_start": starts,
            f"{part}/windows/n_tokens": counts[part].astype(np.uint32),
            f"{part}/windows/first_row": plans[part].first_rows,
        }
    record = SegmentRecord(manifest.store_id, 0, 0, 0, 1, 0, 1, n_tokens, 0, parts, {}, {})
    with StoreWriter.open(path, manifest, {"tokenizer.json": b"{}"}) as writer:
        segment = writer.put_segment(record, lambda: tables)
        for part, shard in writer.missing_shards(segment):
            start, stop = segment.parts[part].layout.shard_range(shard)
            rows = residual_rows(stop - start, d_model, np.random.default_rng((seed, shard)))
            kept, scale = encode_rows(rows, encoding, channels)
            place = plans[part].row_order(shard) + start
            arrays = {
                "rows/window": plans[part].window_order[place // (CONTEXT - 1)].astype(np.uint32),
                "rows/position": (1 + place % (CONTEXT - 1)).astype(np.uint16),
                f"acts/{SITE}": kept,
            }
            if scale is not None:
                arrays[f"scales/{SITE}"] = scale
            moments = Moments(d_model)
            moments.update(rows)
            write_shard(writer.place, manifest, segment, part, shard, arrays, {"stats": {SITE: moments.record()}})
        if not writer.is_sealed(segment):
            writer.seal(segment)
    return path
