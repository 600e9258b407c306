"""Draws of the null, spread over Dask tasks: moments of every pair's count, and draws judged as if they were observed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy import stats

from pipelines.shared.cluster import reduce_tasks, run_tasks, share
from pipelines.structure.graph import adjacency, modularity, partition
from pipelines.structure.null import CodeTable, Pairs, draw, hypergeometric
from pipelines.structure.significance import DrawMoments, Judged, NullFit, fit_null, judge

DRAWS_A_TASK = 4
Q = 0.01
"""Calls are made at this false discovery rate."""
MIN_EXPECTATION = 5.0


class DrawRound:
    """Moments of the pairs' counts over some draws, and of each group of pairs the sum in every draw.

    `groups` are several groupings, one a level of the ladder; their groups are numbered on from one to the next.
    """

    def __init__(self, n_pairs: int):
        self.moments = DrawMoments(n_pairs)
        self.sums: dict[int, NDArray[np.int64]] = {}

    def update(self, number: int, counts: NDArray[np.int64], groups: NDArray[np.int64]) -> None:
        self.moments.update(counts)
        self.sums[number] = group_sums(counts, groups)

    def merge(self, other: DrawRound) -> DrawRound:
        self.moments.merge(other.moments)
        self.sums |= other.sums
        return self


@dataclass(frozen=True)
class Observed:
    """One half: counts, their moments under the null, verdicts, and the sums of groups of pairs."""

    table: CodeTable
    counts: NDArray[np.int64]
    null: NullFit
    judged: Judged
    sums: NDArray[np.int64]
    drawn_sums: NDArray[np.int64]


def group_sums(counts: NDArray[np.int64], groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sum of the counts of each group 0, 1, … of (groupings, P) numbers; -1 is in no group."""
    sums = np.zeros(int(groups.max(initial=-1)) + 1, np.int64)
    for own in groups:
        np.add.at(sums, own[own >= 0], counts[own >= 0])
    return sums


def observe(
    client: Any, label: str, table: CodeTable, pairs: Pairs, key: tuple[int, ...], n_draws: int, groups: NDArray[np.int64]
) -> Observed:
    """Count the pairs in a half's table and in `n_draws` draws of its null, and judge the counts by the draws."""
    shared = share(client, (table, pairs, groups))
    tasks = [(shared, key, first, min(first + DRAWS_A_TASK, n_draws)) for first in range(0, n_draws, DRAWS_A_TASK)]
    drawn: DrawRound = reduce_tasks(client, label, draw_some, DrawRound.merge, tasks)
    counts = pairs.count(table)
    null = fit_null(drawn.moments, hypergeometric(table, pairs)[1])
    drawn_sums = np.array([drawn.sums[number] for number in range(n_draws)])
    return Observed(table, counts, null, judge(counts, null, MIN_EXPECTATION), group_sums(counts, groups), drawn_sums)


def draw_some(shared: tuple[CodeTable, Pairs, NDArray[np.int64]], key: tuple[int, ...], first: int, last: int) -> DrawRound:
    """Draws `first` to `last` - 1 of a table's null. Runs on a worker."""
    table, pairs, groups = shared
    drawn = DrawRound(len(pairs))
    for number in range(first, last):
        drawn.update(number, pairs.count(draw(table, (*key, number))), groups)
    return drawn


@dataclass(frozen=True)
class NullDraw:
    """One more draw of the null, judged as the observed table was."""

    called: int
    edges: tuple[int, ...]
    """How many edges each level of the ladder finds."""
    modularity: tuple[float, ...]
    """Of graphs of its strongest pairs: for each level over the features of the observed graph, and with as many edges.

    Over more features as many edges would lie sparser, and a sparse graph is modular by itself.
    """
    cosine_correlation: float


def judge_draws(
    client: Any,
    half: Observed,
    pairs: Pairs,
    key: tuple[int, ...],
    numbers: range,
    levels: tuple[float, ...],
    cosines: NDArray[np.float32] | None,
) -> list[NullDraw]:
    """Further draws, which had no part in the moments, each through the steps that the observed table went through."""
    graphs = []
    for level in levels:
        edges = attracted(half.judged, level)
        graphs.append((np.unique(np.r_[pairs.left[edges], pairs.right[edges]]), len(edges)))
    shared = share(client, (half.table, pairs, half.null, levels, graphs, cosines))
    return run_tasks(client, "null draws", judge_draw, [(shared, (*key, number)) for number in numbers])


def judge_draw(shared: tuple[Any, ...], key: tuple[int, ...]) -> NullDraw:
    """Runs on a worker."""
    table, pairs, null, levels, graphs, cosines = shared
    judged = judge(pairs.count(draw(table, key)), null, MIN_EXPECTATION)
    strongest = np.argsort(-np.where(judged.tested, judged.lift, 0), kind="stable")
    return NullDraw(
        called=int(judged.called(Q).sum()),
        edges=tuple(len(attracted(judged, level)) for level in levels),
        modularity=tuple(drawn_modularity(pairs, judged, strongest, nodes, n, key[-1]) for nodes, n in graphs),
        cosine_correlation=cosine_correlation(judged, cosines),
    )


def attracted(judged: Judged, min_lift: float) -> NDArray[np.int64]:
    """The pairs called at q <= 0.01 that fire together at least `min_lift` times as often as in the null: the edges."""
    return np.flatnonzero(judged.called(Q) & (judged.lift >= min_lift))


def repelled(judged: Judged, min_lift: float) -> NDArray[np.int64]:
    """The pairs called at q <= 0.01 that fire together at most 1 / `min_lift` times as often as in the null."""
    return np.flatnonzero(judged.called(Q) & (judged.lift * min_lift <= 1))


def graph_of(judged: Judged, pairs: Pairs, edges: NDArray[np.int64]) -> sp.csr_matrix:
    """The graph of some pairs, each edge as heavy as its lift; nodes are places in `pairs.features`."""
    return adjacency(pairs.left[edges], pairs.right[edges], judged.lift[edges], len(pairs.features))


def drawn_modularity(
    pairs: Pairs, judged: Judged, strongest: NDArray[np.int64], nodes: NDArray[np.int32], n_edges: int, seed: int
) -> float:
    """Modularity of the graph of the `n_edges` strongest pairs between some features."""
    is_node = np.zeros(len(pairs.features), bool)
    is_node[nodes] = True
    inside = strongest[is_node[pairs.left[strongest]] & is_node[pairs.right[strongest]]]
    graph = graph_of(judged, pairs, inside[:n_edges])
    return modularity(graph, partition(graph, seed))


def cosine_correlation(judged: Judged, cosines: NDArray[np.float32] | None) -> float:
    """Spearman's rank correlation of lift and decoder cosine over the tested pairs; 0 without a run or pairs."""
    if cosines is None or judged.tested.sum() < 3:
        return 0.0
    correlation = stats.spearmanr(judged.lift[judged.tested], cosines[judged.tested]).statistic
    return float(correlation) if np.isfinite(correlation) else 0.0
