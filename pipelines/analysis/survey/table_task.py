"""What a worker does with one tile of features: add up the tables of all shards, and write the tile's rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore.open_place import open_place
from actstore.reader import Shard
from pipelines.analysis.arrays import create_arrays
from pipelines.analysis.reader import QUANTILES
from pipelines.analysis.survey.job import Job, shard_name
from pipelines.analysis.survey.partial_results import Bundle, publish_bundle
from pipelines.analysis.survey.survey import KEPT, TABLES
from pipelines.statistics import FiringTable
from pipelines.statistics.examples import COLUMNS
from pipelines.statistics.tables import quantile_bins

TILE_FIRINGS = 4_000_000
"""Firings of a tile's features, at most (a feature alone may have more): bounds what a task holds of a table."""


def table_tiles(fires: NDArray[np.int64], tile_firings: int = TILE_FIRINGS) -> list[tuple[int, int]]:
    """Features [start, stop) of each tile, all features in turn.

    >>> table_tiles(np.array([5, 1, 1, 9, 0, 2]), 6)
    [(0, 2), (2, 3), (3, 4), (4, 6)]
    """
    tiles, start, held = [], 0, 0
    for feature, n in enumerate(fires.tolist()):
        if feature > start and held + n > tile_firings:
            tiles.append((start, feature))
            start, held = feature, 0
        held += n
    return [*tiles, (start, len(fires))]


def merge_tables(job: Job, tile: int, start: int, stop: int, shards: list[Shard]) -> dict[str, NDArray[Any]]:
    """Write the tables of the features [start, stop); returns (stop - start,) facts of each feature, and its kept examples.

    `quantile_bins` (n, quantiles), `n_documents` in which it fires, `same_document` ordered pairs of its firings that lie
    in one document; `top/feature`, `random/value` and so on, what `Survey.top` and `random` have over all shards. The
    document table itself is not kept: it grows with the corpus.
    """
    work = open_place(job.work_url)
    name = f"tables/{tile:06d}"
    if not work.exists(name):
        bundles = [Bundle(work, shard_name(shard)) for shard in shards]
        facts: dict[str, NDArray[Any]] = {}
        for table in TABLES:
            counts, total = _merged(job, table, start, stop, bundles)
            if table == "documents":
                facts["n_documents"] = np.diff(counts.indptr).astype(np.int64)
                inside = np.concatenate([[0], np.cumsum(counts.data * (counts.data - 1))])
                facts["same_document"] = inside[counts.indptr[1:]] - inside[counts.indptr[:-1]]
                continue
            if table == "bins":
                facts["quantile_bins"] = quantile_bins(counts, QUANTILES).ravel()
            arrays = csr_arrays(counts, job.extent.columns(table))
            create_arrays(
                job.result_url, f"{table}/tiles/{tile:06d}", arrays | ({"total": total} if table == "tokens" else {})
            )
        survey = job.survey()
        for kind in KEPT:
            kept = getattr(survey, kind).add_kept(*(_kept(bundle, kind, start, stop) for bundle in bundles))
            facts |= {f"{kind}/{column}": values for column, values in kept.finalize().items()}
        publish_bundle(work, name, facts)
    bundle = Bundle(work, name)
    columns = [f"{kind}/{column}" for kind in KEPT for column in COLUMNS]
    found = {key: bundle.read(key) for key in ("n_documents", "same_document", "quantile_bins", *columns)}
    found["quantile_bins"] = found["quantile_bins"].reshape(stop - start, len(QUANTILES))
    return found


def csr_arrays(counts: Any, n_columns: int) -> dict[str, NDArray[Any]]:
    """A tile's rows as they are kept: starts, columns and counts, the last two of the smallest type that holds them."""
    return {
        "starts": counts.indptr.astype(np.int64),
        "columns": counts.indices.astype(np.min_scalar_type(n_columns - 1)),
        "count": counts.data.astype(np.min_scalar_type(int(counts.data.max(initial=0)))),
    }


def _kept(bundle: Bundle, kind: str, start: int, stop: int) -> dict[str, NDArray[Any]]:
    first, last = bundle.read(f"{kind}/starts", start, stop + 1)[[0, -1]].tolist()
    return {name: bundle.read(f"{kind}/{name}", first, last) for name in COLUMNS}


def _merged(job: Job, name: str, start: int, stop: int, bundles: list[Bundle]) -> tuple[Any, NDArray[np.float64]]:
    table = FiringTable(job.extent.n_features, job.extent.columns(name), has_totals=name == "tokens")
    for bundle in bundles:
        starts = bundle.read(f"{name}/starts", start, stop + 1)
        first, last = int(starts[0]), int(starts[-1])
        columns, count = (bundle.read(f"{name}/{column}", first, last) for column in ("columns", "count"))
        total = bundle.read(f"{name}/total", first, last) if table.has_totals else np.empty(0)
        table.add_rows(slice(start, stop), starts, columns, count, total)
    return table.finalize(start, stop)
