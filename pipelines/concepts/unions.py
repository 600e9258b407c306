"""For each label, the units that follow it best, alone and several together.

Everything is chosen on one half of the documents: up to 16 candidates a label, half of them by their own F1, half by how
many of the label's rows they cover while at least every second firing is one of them (parts of a split concept cover
little each); then the union of candidates that raises F1 most at each step. The other half gives the figures.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore.reader import Shard
from pipelines.concepts.absorption import Patterns, greedy_union, n_main
from pipelines.concepts.labels import SegmentLabels, shard_labels
from pipelines.concepts.rules import RuleScores
from pipelines.concepts.scored_units import ScoredUnits, shard_tasks
from pipelines.shared.cluster import reduce_tasks, share

CANDIDATES = 8
"""Candidates of each of the two kinds."""
PRECISE = 0.5
MOST = 10
"""Units in a union, at most."""
SHOWN_K = (1, 2, 5)
LABELS_AT_ONCE = 64


@dataclass(frozen=True)
class Candidates:
    """Units (M,) that may follow a label, and the number of each one's threshold."""

    units: NDArray[np.int64]
    t: NDArray[np.int64]

    def bounds(self, thresholds: NDArray[np.float64]) -> NDArray[np.float64]:
        """(M,) what each must exceed."""
        return np.asarray(thresholds[self.t, self.units], np.float64)


@dataclass(frozen=True)
class Union:
    """Units in the order in which they were taken, their thresholds, the F1 of the first 1, 2, … of them on either half,
    and precision and recall of the first alone on the scoring half; the first `n_main` are main."""

    units: list[int]
    thresholds: list[float]
    f1_chosen: list[float]
    f1: list[float]
    precision: float
    recall: float
    n_main: int

    def at(self, k: int) -> float:
        """F1 of at most k units on the scoring half; 0 where no unit follows the label."""
        return self.f1[min(k, len(self.f1)) - 1] if self.f1 else 0.0


def choose_candidates(scores: RuleScores, n_labels: int) -> list[Candidates]:
    """The candidates of each of the first `n_labels` rules."""
    candidates = []
    for start in range(0, n_labels, LABELS_AT_ONCE):
        stop = min(start + LABELS_AT_ONCE, n_labels)
        parts = [scores.chosen(t, slice(start, stop)) for t in range(len(scores.hits[0]))]
        unit, rule, f1, precision, hits = (np.concatenate(column) for column in zip(*parts, strict=True))
        t = np.repeat(np.arange(len(parts)), [len(part.unit) for part in parts])
        by_rule = np.argsort(rule, kind="stable")
        cuts = np.searchsorted(rule[by_rule], np.arange(stop - start + 1))
        for first, last in pairwise(cuts.tolist()):
            mine = by_rule[first:last]
            mine = mine[f1[mine] >= 0]
            best = _top(mine, f1, unit)
            covering = mine[precision[mine] >= PRECISE]
            best = np.concatenate([best, _top(covering[~np.isin(unit[covering], unit[best])], hits, unit)])
            candidates.append(Candidates(unit[best], t[best]))
    return candidates


def _top(entries: NDArray[np.int64], by: NDArray[Any], unit: NDArray[np.int64]) -> NDArray[np.int64]:
    """The entries of the units that have the most of something, each unit's best entry, most first."""
    order = entries[np.lexsort((-by[entries], unit[entries]))]
    own_best = order[np.r_[True, np.diff(unit[order]) != 0]] if len(order) else order
    return own_best[np.lexsort((unit[own_best], -by[own_best]))][:CANDIDATES]


def find_unions(
    scored: ScoredUnits, labels: list[Any], scores: RuleScores, thresholds: NDArray[np.float64], n_labels: int, client: Any
) -> list[Union]:
    """The union of units that follows each label."""
    candidates = choose_candidates(scores, n_labels)
    bounds = [own.bounds(thresholds) for own in candidates]
    shared = share(client, [(own.units, bound) for own, bound in zip(candidates, bounds, strict=True)])
    tasks = [(*task, shared) for task in shard_tasks(scored, labels)]
    patterns: list[Patterns] = reduce_tasks(client, "unions", shard_patterns, merge_patterns, tasks)
    unions = []
    for own, bound, seen in zip(candidates, bounds, patterns, strict=True):
        taken, f1_chosen = greedy_union(seen, len(own.units), MOST)
        scoring_half = [seen.union_score(taken[: i + 1], 1) for i in range(len(taken))]
        unions.append(
            Union(
                units=own.units[taken].tolist(),
                thresholds=bound[taken].tolist(),
                f1_chosen=f1_chosen,
                f1=[score[2] for score in scoring_half],
                precision=scoring_half[0][0] if scoring_half else 0.0,
                recall=scoring_half[0][1] if scoring_half else 0.0,
                n_main=n_main(f1_chosen),
            )
        )
    return unions


def shard_patterns(
    scored: ScoredUnits,
    shard: Shard,
    labels: SegmentLabels,
    candidates: list[tuple[NDArray[np.int64], NDArray[np.float64]]],
) -> list[Patterns]:
    """Which candidates of each label fire together over a shard's rows. Runs on a worker."""
    holds, half = shard_labels(scored.open(), shard, labels)
    by_label = holds.tocsc()
    units = np.unique(np.concatenate([np.zeros(0, np.int64), *(own for own, _ in candidates)]))
    values = scored.columns(shard, units)
    patterns = []
    for label, (own, bounds) in enumerate(candidates):
        holds_here = np.zeros(len(half), np.bool_)
        holds_here[by_label.indices[by_label.indptr[label] : by_label.indptr[label + 1]]] = True
        patterns.append(Patterns.of(values[:, np.searchsorted(units, own)] > bounds, holds_here, half))
    return patterns


def merge_patterns(one: list[Patterns], other: list[Patterns]) -> list[Patterns]:
    return [a.merge(b) for a, b in zip(one, other, strict=True)]
