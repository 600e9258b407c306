"""Linear probes of labelled concepts over a store's rows, and absorption: the features that fire in place of the main ones.

The passes over shards; what is counted in them is `absorption.py`. Probes are fitted and their thresholds chosen
on one half of the documents, everything else is of the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore import paths
from actstore.reader import Shard
from pipelines.concepts.absorption import Absorption, Probes, ProbeSums, ScoreHistogram
from pipelines.concepts.labels import SegmentLabels, shard_labels
from pipelines.concepts.scored_units import ScoredUnits, shard_tasks
from pipelines.shared.cluster import reduce_tasks, share


@dataclass(frozen=True)
class FittedProbes:
    """A probe of each concept, the score above which it sees the concept, and its F1 on the scoring half."""

    probes: Probes
    thresholds: NDArray[np.float64]
    f1: NDArray[np.float64]


def fit_probes(rows: ScoredUnits, labels: list[Any], client: Any) -> FittedProbes:
    """Probes of the rows of a site, in two passes over it."""
    tasks = shard_tasks(rows, labels)
    sums: ProbeSums = reduce_tasks(client, "probes", shard_sums, ProbeSums.merge, tasks)
    probes = sums.probes()
    scored = [(*task, probes) for task in tasks]
    histogram: ScoreHistogram = reduce_tasks(client, "scores", shard_scores, ScoreHistogram.merge, scored)
    return FittedProbes(probes, *histogram.finalize())


def find_absorption(
    codes: ScoredUnits,
    rows: ScoredUnits,
    labels: list[Any],
    fitted: FittedProbes,
    mains: list[list[int]],
    along: NDArray[np.float64],
    client: Any,
) -> Absorption:
    """Absorption of each concept on the scoring half. `codes` are of the same shards as `rows`; see `Absorption.update`."""
    shared = share(client, (fitted.probes, fitted.thresholds, mains, along))
    tasks = [(codes, rows, *task[1:], shared) for task in shard_tasks(codes, labels)]
    absorption: Absorption = reduce_tasks(client, "absorption", shard_absorption, Absorption.merge, tasks)
    return absorption


def shard_sums(rows: ScoredUnits, shard: Shard, labels: SegmentLabels) -> ProbeSums:
    """The sums for fitting probes, over a shard's rows of half 0. Runs on a worker."""
    store = rows.open()
    holds, half = shard_labels(store, shard, labels)
    mine = np.flatnonzero(~half)
    values = store.read(shard, rows.acts)
    sums = ProbeSums(holds.shape[1], values.shape[1])
    sums.update(values[mine], holds[mine])
    return sums


def shard_scores(rows: ScoredUnits, shard: Shard, labels: SegmentLabels, probes: Probes) -> ScoreHistogram:
    """How probes score a shard's rows. Runs on a worker."""
    store = rows.open()
    holds, half = shard_labels(store, shard, labels)
    histogram = ScoreHistogram(holds.shape[1])
    histogram.update(probes.scores(store.read(shard, rows.acts)), holds.toarray() > 0, half)
    return histogram


def shard_absorption(
    codes: ScoredUnits,
    rows: ScoredUnits,
    shard: Shard,
    labels: SegmentLabels,
    shared: tuple[Probes, NDArray[np.float64], list[list[int]], NDArray[np.float64]],
) -> Absorption:
    """Absorption over a shard's rows of half 1. Runs on a worker."""
    probes, thresholds, mains, along = shared
    coded, store = codes.open(), rows.open()
    source = next(s for s in store.shards(shard.part) if (s.segment, s.index) == (shard.segment, shard.index))
    window, position = store.read(source, paths.WINDOW), store.read(source, paths.POSITION)
    order = np.lexsort((position, window))  # as the codes of a shard are
    assert np.array_equal(coded.read(shard, paths.WINDOW), window[order])
    holds, half = shard_labels(coded, shard, labels)
    mine = np.flatnonzero(half)
    scores = probes.scores(store.read(source, rows.acts)[order[mine]])
    absorption = Absorption(len(mains), codes.n_units)
    absorption.update(codes.sparse(shard)[mine], holds[mine].toarray() > 0, scores, thresholds, mains, along)
    return absorption
