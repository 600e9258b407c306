"""In: a function of row numbers. Out: a store of those rows or codes, written by the real writer; no model runs.

The text is made up: every token is the same, each split is one long document. All else (plan, shards, statistics,
hashes) is as `collect` leaves it, so that every command reads such a store like any other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore import paths
from actstore.encodings.registry import encoding_of
from actstore.layout import MIN_SHARDS, Layout, choose_layout
from actstore.moments import RowMoments
from actstore.plan import PartPlan
from actstore.schema import (
    PARTS,
    ROW_PLACE_ARRAYS,
    CorpusIdentity,
    Manifest,
    ModelIdentity,
    WindowPolicy,
    code_arrays,
    site_arrays,
    site_values,
)
from actstore.segment_record import PartRecord, SegmentRecord
from actstore.tables import Tables, channel_tables, text_tables, window_tables
from actstore.writer import StoreWriter, write_shard

SITE = "resid_post.0"
CONTEXT = 128
CHANNEL_ROWS = 4096
"""How many of the first rows measure the channels, where the encoding needs them."""

Rows = Callable[[int, int], NDArray[np.float32]]


def write_made_store(
    path: Path,
    rows: Rows,
    n_rows: int,
    n_heldout: int = 0,
    *,
    corpus: CorpusIdentity,
    encoding: str = "fp32",
    seed: int = 0,
    tables: Tables | None = None,
) -> Path:
    """Write rows [0, n_rows) as the training split and the next `n_heldout` as the held-out one; returns `path`.

    `rows(start, stop)` gives (stop - start, d_model) float32 and must be a pure function: a killed writer is continued by
    calling this again. A shard's rows lie in the order of their numbers. `corpus` says what they are, in place of
    a text; `tables` are kept in the segment beside its own.
    """
    sample = rows(0, min(n_rows, CHANNEL_ROWS))
    d_model = sample.shape[1]
    channels, kept_as = _moments(sample).channels(), encoding_of(encoding)
    manifest = made_manifest(d_model, corpus, encoding, seed)
    n_rows_of = dict(zip(PARTS, (n_rows, n_heldout), strict=True))
    parts, plans, own = _plan(manifest, n_rows_of)
    if kept_as.needs_channels:
        own |= channel_tables({SITE: channels})
    n_documents = sum(count > 0 for count in n_rows_of.values())
    record = SegmentRecord(manifest.store_id, 0, 0, 0, n_documents, 0, n_documents, n_rows + n_heldout, 0, parts, {}, {})
    with StoreWriter.open(path, manifest, {"tokenizer.json": b"{}"}) as writer:
        segment = writer.put_segment(record, lambda: {**own, **(tables or {})})
        for part, shard in writer.missing_shards(segment):
            start, stop = segment.parts[part].layout.shard_range(shard)
            first = n_rows if part == PARTS[1] else 0
            made = rows(first + start, first + stop)
            arrays = _places(plans[part], shard) | site_values(SITE, made, kept_as, channels)
            write_shard(writer.place, manifest, segment, part, shard, arrays, {"stats": {SITE: _moments(made).record()}})
        if not writer.is_sealed(segment):
            writer.seal(segment)
    return path


def write_made_codes(
    path: str | Path,
    codes: Callable[[int, int], tuple[NDArray[Any], NDArray[np.float32]]],
    n_rows: int,
    n_heldout: int = 0,
    *,
    n_features: int,
    value_dtype: str = "float32",
    shard_rows: int = 0,
    seed: int = 0,
) -> str | Path:
    """A code store of made-up codes: `codes(start, stop)` gives indices and values, (stop - start, k) each, of rows.

    Rows are numbered as a feature index numbers them. `shard_rows` sets the size of a shard in place of the usual choice.
    """
    k = codes(0, 1)[0].shape[1]
    index_dtype = np.min_scalar_type(n_features - 1).name
    manifest = made_manifest(1, CorpusIdentity("made-up", "0" * 64), "fp32", seed)
    source = {"store_id": "0" * 16, "snapshot": "0" * 16, "run_id": "0" * 16, "site": SITE, "n_features": n_features}
    manifest = replace(
        manifest, kind="codes", arrays=(*ROW_PLACE_ARRAYS, *code_arrays(k, index_dtype, value_dtype)), source=source
    )
    parts, plans, tables = _plan(manifest, dict(zip(PARTS, (n_rows, n_heldout), strict=True)), shard_rows)
    n_documents = 1 + (n_heldout > 0)
    record = SegmentRecord(manifest.store_id, 0, 0, 0, n_documents, 0, n_documents, n_rows + n_heldout, 0, parts, {}, {})
    with StoreWriter.open(path, manifest, {"tokenizer.json": b"{}"}) as writer:
        segment = writer.put_segment(record, lambda: tables)
        for part, shard in writer.missing_shards(segment):
            start, stop = segment.parts[part].layout.shard_range(shard)
            first = n_rows if part == PARTS[1] else 0
            indices, values = codes(first + start, first + stop)
            places = _places(plans[part], shard)
            order = np.lexsort((places[paths.POSITION], places[paths.WINDOW]))
            own = {name: column[order] for name, column in places.items()}
            own |= {paths.CODE_INDEX: indices.astype(index_dtype), paths.CODE_VALUE: values.astype(value_dtype)}
            write_shard(writer.place, manifest, segment, part, shard, own, {"stats": {}, "rows_cut": 0, "codes_cut": 0})
        if not writer.is_sealed(segment):
            writer.seal(segment)
    return path


def made_manifest(d_model: int, corpus: CorpusIdentity, encoding: str, seed: int) -> Manifest:
    """The manifest of a store of one made-up site, `resid_post.0`."""
    return Manifest(
        kind="activations",
        model=ModelIdentity("made-up", 1, d_model, "0" * 64),
        tokenizer_sha256="0" * 64,
        corpus=corpus,
        policy=WindowPolicy(CONTEXT, True, "packed", False, 0, 0),
        arrays=(*ROW_PLACE_ARRAYS, *site_arrays(SITE, d_model, encoding)),
        compute_dtype="fp32",
        seed=seed,
        provenance={"model": "made-up"},
    )


def _plan(
    manifest: Manifest, n_rows: dict[str, int], shard_rows: int = 0
) -> tuple[dict[str, PartRecord], dict[str, PartPlan], Tables]:
    """The cut of the splits, the token of each row, and the tables of the text that follows from both."""
    stride = manifest.policy.stride
    offsets = np.concatenate([[0], np.cumsum([count + 1 for count in n_rows.values() if count])])
    tables = text_tables(
        np.ones(offsets[-1], np.uint16),  # a document ends with a separator
        offsets,
        np.arange(len(offsets) - 1).astype(np.uint8),
        [part for part in PARTS if n_rows[part]],
        np.arange(len(offsets) - 1, dtype=np.uint64),
    )
    parts, plans, first_token = {}, {}, 0
    for index, part in enumerate(PARTS):
        starts = np.arange(0, n_rows[part], stride, dtype=np.int64)
        counts = np.minimum(stride, n_rows[part] - starts)
        layout = choose_layout(n_rows[part], manifest.row_bytes, 4 * manifest.model.d_model, min_shards=MIN_SHARDS)
        if shard_rows:
            layout = Layout(n_rows[part], shard_rows, shard_rows)
        plans[part] = PartPlan.build(manifest.seed, 0, index, layout, counts)
        parts[part] = PartRecord(len(counts), layout.n_rows, layout.shard_rows, layout.chunk_rows)
        tables |= window_tables(part, starts + first_token, counts, plans[part].first_rows)
        first_token += n_rows[part] + 1
    return parts, plans, tables


def _places(plan: PartPlan, shard: int) -> Tables:
    """Window and position of each row of a shard, in disk order."""
    row = plan.row_order(shard) + plan.layout.shard_range(shard)[0]
    place = np.searchsorted(plan.row_bounds, row, side="right") - 1
    return {
        paths.WINDOW: plan.window_order[place].astype(np.uint32),
        paths.POSITION: (1 + row - plan.row_bounds[place]).astype(np.uint16),
    }


def _moments(rows: NDArray[np.float32]) -> RowMoments:
    moments = RowMoments(rows.shape[1])
    moments.update(rows)
    return moments
