"""Communities of a graph of features, its modularity, and the agreement of two groupings."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

MIN_MEMBERS = 3
"""A community has at least three features; two are a pair."""


def adjacency(left: NDArray, right: NDArray, weights: NDArray, n_nodes: int) -> sp.csr_matrix:
    """(n, n) symmetric matrix of a list of weighted edges; scikit-network takes a matrix, not an array.

    An edge of weight 0 is left out: among the strongest pairs of a draw may be pairs that are never together.
    """
    ends, others = np.r_[left, right], np.r_[right, left]
    graph = sp.csr_matrix((np.r_[weights, weights].astype(np.float64), (ends, others)), shape=(n_nodes, n_nodes))
    graph.eliminate_zeros()
    return graph


def partition(graph: sp.csr_matrix, seed: int) -> NDArray[np.int64]:
    """(n,) labels from 0 by Leiden's method (Traag et al. 2019, doi:10.1038/s41598-019-41695-z); nodes in a random order.

    A node without an edge gets -1. The same seed gives the same labels, with the same C library.
    """
    from sknetwork.clustering import Leiden

    connected = np.flatnonzero(np.diff(graph.indptr))
    labels = np.full(graph.shape[0], -1, np.int64)
    if len(connected):
        ctypes.CDLL(None).srand(seed)  # its refinement draws from C's rand(), which random_state does not seed
        own = graph[connected][:, connected]
        labels[connected] = Leiden(random_state=seed, shuffle_nodes=True).fit_predict(own)
    return labels


def modularity(graph: sp.csr_matrix, labels: NDArray[np.int64]) -> float:
    """Newman's modularity: the share of the weight inside groups, minus the share that the degrees alone give; 0 without
    edges."""
    degrees = np.asarray(graph.sum(axis=1)).ravel()
    total = float(degrees.sum())
    if not total:
        return 0.0
    edges = graph.tocoo()
    inside = float(edges.data[labels[edges.row] == labels[edges.col]].sum()) / total
    of_group = np.bincount(labels[labels >= 0], weights=degrees[labels >= 0])
    return inside - float(np.square(of_group / total).sum())


def adjusted_rand(first: NDArray[np.int64], second: NDArray[np.int64]) -> float:
    """Adjusted Rand index of two groupings of the same things (Hubert and Arabie 1985): 1 equal, 0 as by chance.

    >>> adjusted_rand(np.array([0, 0, 1, 1]), np.array([5, 5, 3, 3]))
    1.0
    """
    _, a = np.unique(first, return_inverse=True)
    _, b = np.unique(second, return_inverse=True)
    n = len(a)
    if n < 2:
        return 0.0
    table = np.bincount(a * (b.max() + 1) + b).astype(np.float64)

    def pairs(counts: NDArray) -> float:
        return float((counts * (counts - 1)).sum() / 2)

    together, of_a, of_b = pairs(table), pairs(np.bincount(a).astype(float)), pairs(np.bincount(b).astype(float))
    expected = of_a * of_b / (n * (n - 1) / 2)
    highest = (of_a + of_b) / 2
    return 1.0 if highest == expected else (together - expected) / (highest - expected)


@dataclass(frozen=True)
class Communities:
    """The best of several partitions of a graph by modularity, and how much the partitions agree."""

    labels: NDArray[np.int64]
    modularity: float
    seed_agreement: float
    """Mean adjusted Rand index of the partitions, two by two, over nodes with an edge."""

    def members(self) -> list[NDArray[np.int64]]:
        """The nodes of each community of at least `MIN_MEMBERS`, largest first, ties by first node."""
        groups = [np.flatnonzero(self.labels == label) for label in np.unique(self.labels[self.labels >= 0])]
        kept = [nodes for nodes in groups if len(nodes) >= MIN_MEMBERS]
        return sorted(kept, key=lambda nodes: (-len(nodes), int(nodes[0])))


def communities(graph: sp.csr_matrix, seed: int, n_seeds: int) -> Communities:
    """Partition a graph `n_seeds` times, each with nodes in another order."""
    tries = [partition(graph, seed % 1_000_003 * 1000 + i) for i in range(n_seeds)]
    scores = [modularity(graph, labels) for labels in tries]
    nodes = np.flatnonzero(np.diff(graph.indptr))
    agreements = [adjusted_rand(tries[i][nodes], tries[j][nodes]) for i in range(n_seeds) for j in range(i)]
    best = int(np.argmax(scores))
    return Communities(tries[best], scores[best], float(np.mean(agreements)) if len(nodes) and agreements else 0.0)


def direct_only(source: NDArray[np.int64], target: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which arrows do not follow from two others: a -> c is dropped where a -> b -> c for some b.

    Features that imply each other must not remove each other's arrows: b is neither a nor c, b does not imply a, and c does
    not imply b."""
    arrows = set(zip(source.tolist(), target.tolist(), strict=True))
    after: dict[int, set[int]] = {}
    for a, b in arrows:
        after.setdefault(a, set()).add(b)
    kept = [
        not any(
            b not in (a, c) and (b, c) in arrows and (b, a) not in arrows and (c, b) not in arrows for b in after.get(a, ())
        )
        for a, c in zip(source.tolist(), target.tolist(), strict=True)
    ]
    return np.array(kept, bool)
