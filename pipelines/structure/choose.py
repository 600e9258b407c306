"""In: the verdicts of both halves. Out: structures chosen on the first half, each with its figures on the second half."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from pipelines.statistics import association
from pipelines.structure.graph import Communities, adjusted_rand, communities, direct_only
from pipelines.structure.null import CodeTable, Pairs
from pipelines.structure.null_rounds import MIN_EXPECTATION, Observed, Q, attracted, graph_of, repelled
from pipelines.structure.significance import NullFit, judge

MIN_AGREEMENT = 0.6
"""Adjusted Rand index that partitions must reach, between the halves and between seeds, to be reported."""
MIN_Z = 3.0
CONDITIONAL, REVERSE = 0.9, 0.7
"""a implies b where P(b | a) is at least the first and P(a | b) is below the second."""
DUPLICATE_JACCARD, DUPLICATE_COSINE = 0.5, 0.7
N_SEEDS = 20
LADDER = (1.0, 1.5, 2.5, 5.0, 10.0)
"""Graphs are made at these multiples of `min_lift`: pairs of small effect blur communities of large effect."""


def ladder(min_lift: float) -> tuple[float, ...]:
    return tuple(step * min_lift for step in LADDER)


@dataclass(frozen=True)
class Chosen:
    """Pairs chosen on the first half: their places, and on the second half q over exactly these, and whether it agrees."""

    place: NDArray[np.int64]
    q: NDArray[np.float64]
    replicated: NDArray[np.bool_]


def subset(pairs: Pairs, place: NDArray[np.int64]) -> Pairs:
    return replace(pairs, left=pairs.left[place], right=pairs.right[place])


def replicate(place: NDArray[np.int64], first: Observed, second: Observed) -> Chosen:
    """Test chosen pairs on the second half: Benjamini-Hochberg over them alone; it agrees where q <= 0.01, the same way."""
    tested = second.judged.tested[place]
    q = np.ones(len(place))
    if tested.any():
        q[tested] = stats.false_discovery_control(second.judged.p[place[tested]], method="bh")
    same = np.sign(second.judged.z[place]) == np.sign(first.judged.z[place])
    return Chosen(place, q, tested & (q <= Q) & same)


def find_communities(half: Observed, pairs: Pairs, min_lift: float, seed: int) -> Communities:
    """Communities of a half's graph, from 20 partitions."""
    return communities(graph_of(half.judged, pairs, attracted(half.judged, min_lift)), seed, N_SEEDS)


def pair_groups(found: Communities, pairs: Pairs) -> NDArray[np.int64]:
    """(P,) the community that holds both features of each pair, -1 where none does."""
    group = np.full(len(pairs.features), -1)
    for number, members in enumerate(found.members()):
        group[members] = number
    return np.where(group[pairs.left] == group[pairs.right], group[pairs.left], -1)


def number_on(groupings: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    """(groupings, P) the same groups, numbered through: a grouping's numbers begin where those of the grouping before end.

    >>> number_on([np.array([0, 1, -1]), np.array([0, -1, 0])])
    array([[ 0,  1, -1],
           [ 2, -1,  2]])
    """
    numbered, first = [], 0
    for own in groupings:
        numbered.append(np.where(own >= 0, own + first, -1))
        first += int(own.max(initial=-1)) + 1
    return np.stack(numbered)


def halves_agreement(first: Communities, second: Communities) -> tuple[float, int]:
    """(adjusted Rand index of the halves' communities, over how many features: those with an edge in both graphs)."""
    common = np.flatnonzero((first.labels >= 0) & (second.labels >= 0))
    return adjusted_rand(first.labels[common], second.labels[common]), len(common)


def judge_groups(second: Observed) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(p, lift) of each group of pairs on the second half: the sum of their counts against the same sum in each draw."""
    drawn = second.drawn_sums.astype(np.float64)
    null = NullFit(drawn.mean(axis=0), drawn.var(axis=0, ddof=1), len(drawn) - 1, len(drawn))
    judged = judge(second.sums, null, MIN_EXPECTATION)
    return np.where(judged.z > 0, judged.p, 1.0), judged.lift


def verdict(found: Communities, agreement: float, q: NDArray[np.float64], drawn: NDArray[np.float64]) -> dict[str, Any]:
    """Is there community structure beyond the null at one level? The figures, and the reason where the answer is no.

    `q` are its communities' on the second half, `drawn` the modularities of null graphs with as many edges.
    """
    spread = float(drawn.std(ddof=1)) if len(drawn) > 1 else 0.0
    z = (found.modularity - float(drawn.mean())) / spread if spread > 0 else 0.0
    reasons = []
    if not found.members():
        reasons.append("no three features are linked")
    if z < MIN_Z:
        reasons.append(f"modularity is {z:.1f} deviations above null graphs', {MIN_Z:g} are needed")
    if found.seed_agreement < MIN_AGREEMENT:
        reasons.append(f"20 seeds agree by {found.seed_agreement:.2f} (adjusted Rand), {MIN_AGREEMENT} is needed")
    if agreement < MIN_AGREEMENT:
        reasons.append(f"the halves of the documents agree by {agreement:.2f} (adjusted Rand), {MIN_AGREEMENT} is needed")
    if found.members() and not (q <= Q).any():
        reasons.append("no community has more co-firings on the other half than the null")
    return {
        "modularity": found.modularity,
        "null_modularity_mean": float(drawn.mean()),
        "null_modularity_deviation": spread,
        "null_modularity_max": float(drawn.max()),
        "modularity_z": z,
        "seed_agreement": found.seed_agreement,
        "half_agreement": agreement,
        "reported": not reasons,
        "why_not": reasons,
    }


@dataclass(frozen=True)
class Implications:
    """`source` fires only where `target` does; `place` is their pair's."""

    place: NDArray[np.int64]
    source: NDArray[np.int64]
    target: NDArray[np.int64]


def find_implications(half: Observed, pairs: Pairs, min_lift: float) -> tuple[Implications, int]:
    """Arrows a -> b with P(b | a) >= 0.9 and P(a | b) < 0.7 among the pairs called, and how many followed from others.

    The pair must be called and fire together `min_lift` times as often as in the null: a target that fires nearly
    everywhere is implied by everything, and says nothing.
    """
    edges = attracted(half.judged, min_lift)
    left, right = (ids[edges] for ids in pairs.ids)
    counts, fires = half.counts[edges], half.table.fires
    place = np.r_[edges, edges]
    source, target = np.r_[left, right], np.r_[right, left]
    together = np.r_[counts, counts]
    is_arrow = (together >= CONDITIONAL * fires[source]) & (together < REVERSE * fires[target])
    place, source, target = place[is_arrow], source[is_arrow], target[is_arrow]
    kept = direct_only(source, target)
    return Implications(place[kept], source[kept], target[kept]), int((~kept).sum())


def confirm_implications(
    implications: Implications, first: Observed, second: Observed
) -> tuple[Chosen, NDArray[np.float64]]:
    """The arrows on the second half: called there, with P(target | source) at least 0.9 again; and that share."""
    chosen = replicate(implications.place, first, second)
    share = second.counts[implications.place] / np.maximum(second.table.fires[implications.source], 1)
    return replace(chosen, replicated=chosen.replicated & (share >= CONDITIONAL)), share


def find_duplicates(half: Observed, pairs: Pairs, min_lift: float, cosines: NDArray[np.float32] | None) -> NDArray[np.int64]:
    """Pairs called whose Jaccard index is at least 0.5 and, where a run is given, whose decoder cosine is at least 0.7."""
    edges = attracted(half.judged, min_lift)
    is_alike = jaccard(half.table, subset(pairs, edges), half.counts[edges]) >= DUPLICATE_JACCARD
    if cosines is not None:
        is_alike &= cosines[edges] >= DUPLICATE_COSINE
    return edges[is_alike]


def jaccard(table: CodeTable, pairs: Pairs, counts: NDArray[np.int64]) -> NDArray[np.float64]:
    left, right = (table.fires[ids] for ids in pairs.ids)
    return np.nan_to_num(association.jaccard(counts, left, right))  # 0 for two features that do not fire in this half


def choose_pairs(first: Observed, second: Observed, min_lift: float) -> tuple[Chosen, Chosen]:
    """(attracted, repelled) pairs of the first half, tested on the second."""
    return (
        replicate(attracted(first.judged, min_lift), first, second),
        replicate(repelled(first.judged, min_lift), first, second),
    )
