"""Parquet tables of an analysis, for SQL and data frames; docs/ANALYSIS.md states their schema."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from actstore.open_place import open_place
from actstore.place import Place
from pipelines.analysis.arrays import SparseRows
from pipelines.analysis.reader import EXAMPLE_KINDS, Analysis
from pipelines.analysis.survey.job import corpus_parts
from pipelines.analysis.survey.pair_task import done
from pipelines.analysis.survey.partial_results import Bundle
from pipelines.shared.parquet import parquet_bytes
from pipelines.statistics import BANDS, association, band_numbers
from pipelines.statistics.of_codes.bins import QUANTILES
from pipelines.statistics.value_bins import bin_edges

TOKENS_A_FEATURE = 50


def write_exports(analysis: Analysis, place: Place, work_url: str) -> None:
    """Put `NAME.parquet` for every table beside the arrays."""
    tables = {
        "features": features_table(analysis),
        "pairs": pairs_table(analysis, open_place(work_url)),
        "examples": examples_table(analysis),
        "tokens": tokens_table(analysis),
        "positions": _long_table(analysis.positions, "position"),
        "parts": _long_table(analysis.parts, "part", analysis.part_names),
        "histogram": _histogram_table(analysis.bins),
        "documents": documents_table(analysis),
    }
    for name, table in tables.items():
        place.publish(f"{name}.parquet", parquet_bytes(table))


def features_table(analysis: Analysis) -> pa.Table:
    """One row a feature."""
    columns: dict[str, Any] = {"feature": np.arange(analysis.n_features)}
    columns |= {name: getattr(analysis, name) for name in ("fires", "frequency", "mean", "peak", "n_documents")}
    columns["burstiness"] = pa.array(analysis.burstiness, from_pandas=True)  # NaN as null
    columns["band"] = [BANDS[i] for i in band_numbers(analysis.fires, analysis.n_rows).tolist()]
    low, high = bin_edges(np.maximum(analysis.quantile_bins.astype(np.int64), 0))
    middle = np.where(analysis.quantile_bins >= 0, (low + high) / 2, np.nan)
    for i, quantile in enumerate(QUANTILES):
        columns[f"q{round(100 * quantile):02d}"] = pa.array(middle[:, i].astype(np.float32), from_pandas=True)
    return pa.table(columns)


def pairs_table(analysis: Analysis, work: Place) -> pa.Table:
    """The strongest partners of each feature, with every measure."""
    bundles = [Bundle(work, done(tile)) for tile in range(analysis.pairs.n_tiles)]
    feature, partner, together = (
        np.concatenate([bundle.read(name) for bundle in bundles]) for name in ("feature", "partner", "together")
    )
    columns: dict[str, Any] = {"feature": feature, "partner": partner, "together": together}
    of_documents = analysis.record.within == "document"
    each = analysis.n_documents if of_documents else analysis.fires
    total = int((analysis.document_rows > 0).sum()) if of_documents else analysis.n_rows
    columns["p_partner_given_feature"] = association.conditional(together, each[feature])
    if analysis.record.within in ("row", "document"):
        counts = (together, each[feature], each[partner])
        columns["p_feature_given_partner"] = association.conditional(together, each[partner])
        columns["lift"] = association.lift(*counts, total)
        columns["jaccard"] = association.jaccard(*counts)
        columns["pmi"] = association.pmi(*counts, total)
        columns["npmi"] = association.npmi(*counts, total)
        columns["phi"] = pa.array(association.phi(*counts, total), from_pandas=True)
    return pa.table(columns)


def examples_table(analysis: Analysis) -> pa.Table:
    """One row a kept firing: the text before, at and after the firing, and the values there."""
    slots, examples = analysis.record.example_slots, analysis.preload()
    focus, texts = analysis.record.focus, np.array([*analysis.token_texts, ""], object)
    value, document = examples["value"], examples["document"]
    tables = []
    for kind in EXAMPLE_KINDS:
        first, last = slots[kind]
        feature, slot = np.nonzero(value[:, first:last] > 0)
        place = (feature, slot + first)
        tokens = texts[examples["tokens"][place]]
        around = examples["values"][place]
        tables.append(
            pa.table(
                {
                    "feature": feature,
                    "kind": pa.array([kind] * len(feature), pa.string()),
                    "place": slot,
                    "value": value[place],
                    "document": document[place],
                    "before": pa.array(["".join(row[:focus]) for row in tokens], pa.string()),
                    "token": pa.array([row[focus] for row in tokens], pa.string()),
                    "after": pa.array(["".join(row[focus + 1 :]) for row in tokens], pa.string()),
                    "values": pa.FixedSizeListArray.from_arrays(pa.array(around.ravel(), pa.float32()), around.shape[1]),
                }
            )
        )
    return pa.concat_tables(tables)


def tokens_table(analysis: Analysis) -> pa.Table:
    """The 50 tokens on which each feature fires most often."""
    kept = []
    for (rows, counts), (_, totals) in zip(analysis.tokens.tiles(), analysis.tokens.tiles("total"), strict=True):
        feature = np.repeat(np.arange(rows.start, rows.stop), np.diff(counts.indptr))
        order = np.lexsort((counts.indices, -counts.data.astype(np.int64), feature))
        starts = np.searchsorted(feature, feature)
        order = order[np.arange(len(order)) - starts < TOKENS_A_FEATURE]
        kept.append((feature[order], counts.indices[order], counts.data[order].astype(np.int64), totals.data[order]))
    feature, token, count, total = (np.concatenate(column) for column in zip(*kept, strict=True))
    return pa.table(
        {
            "feature": feature,
            "token": token,
            "text": pa.array([analysis.token_texts[t] for t in token.tolist()], pa.string()),
            "count": count,
            "precision": count / np.maximum(analysis.fires[feature], 1),
            "recall": count / np.maximum(analysis.token_rows[token], 1),
            "lift": association.lift(count, analysis.fires[feature], analysis.token_rows[token], analysis.n_rows),
            "mean": total / np.maximum(count, 1),
        }
    )


def documents_table(analysis: Analysis) -> pa.Table:
    """One row a document, numbered as in `examples`."""
    names, parts = corpus_parts(analysis.document_names)
    return pa.table(
        {
            "document": np.arange(len(parts)),
            "name": pa.array(analysis.document_names, pa.string()),
            "part": pa.array([names[part] for part in parts], pa.string()),
            "rows": analysis.document_rows,
        }
    )


def _entries(rows: SparseRows) -> tuple[NDArray[np.int64], ...]:
    """(feature, column, count) of every entry."""
    entries = [
        (np.repeat(np.arange(part.start, part.stop), np.diff(tile.indptr)), tile.indices, tile.data.astype(np.int64))
        for part, tile in rows.tiles()
    ]
    return tuple(np.concatenate(column) for column in zip(*entries, strict=True))


def _long_table(rows: SparseRows, name: str, texts: list[str] | None = None) -> pa.Table:
    feature, column, count = _entries(rows)
    shown = column if texts is None else pa.array([texts[c] for c in column.tolist()], pa.string())
    return pa.table({"feature": feature, name: shown, "count": count})


def _histogram_table(bins: SparseRows) -> pa.Table:
    feature, column, count = _entries(bins)
    low, high = bin_edges(column)
    return pa.table({"feature": feature, "low": low, "high": high, "count": count})
