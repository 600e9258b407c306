"""Communities of graphs, and how alike groupings are, against plain counting."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.structure.graph import adjacency, adjusted_rand, communities, direct_only, modularity, partition


def planted(n_groups: int, size: int, inside: float, outside: float, seed: int) -> tuple[sp.csr_matrix, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = np.repeat(np.arange(n_groups), size)
    chance = np.where(truth[:, None] == truth, inside, outside)
    left, right = np.nonzero(np.triu(rng.random(chance.shape) < chance, 1))
    return adjacency(left, right, np.ones(len(left)), len(truth)), truth


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=12))
@settings(deadline=None)
def test_the_adjusted_rand_index_is_counted_over_pairs(labels: list[tuple[int, int]]) -> None:
    first, second = (np.array(column) for column in zip(*labels, strict=True))
    pairs = list(itertools.combinations(range(len(labels)), 2))
    a = np.array([first[i] == first[j] for i, j in pairs])
    b = np.array([second[i] == second[j] for i, j in pairs])
    expected, highest = a.sum() * b.sum() / len(pairs), (a.sum() + b.sum()) / 2
    wanted = 1.0 if highest == expected else ((a & b).sum() - expected) / (highest - expected)
    assert adjusted_rand(first, second) == pytest.approx(wanted)
    assert adjusted_rand(second, first) == pytest.approx(wanted)


def test_unrelated_groupings_agree_by_nothing() -> None:
    rng = np.random.default_rng(0)
    scores = [adjusted_rand(rng.integers(0, 5, 400), rng.integers(0, 8, 400)) for _ in range(20)]
    assert abs(np.mean(scores)) < 0.01


def test_modularity_is_its_definition_with_weights() -> None:
    rng = np.random.default_rng(1)
    dense = np.triu(rng.random((12, 12)) * (rng.random((12, 12)) < 0.4), 1)
    dense += dense.T
    labels = rng.integers(0, 3, 12)
    degree, total = dense.sum(axis=1), dense.sum()
    wanted = sum(
        (dense[i, j] - degree[i] * degree[j] / total) / total
        for i, j in itertools.product(range(12), repeat=2)
        if labels[i] == labels[j]
    )
    left, right = np.nonzero(np.triu(dense))
    assert modularity(adjacency(left, right, dense[left, right], 12), labels) == pytest.approx(wanted)


def test_a_graph_without_edges_has_no_communities() -> None:
    none = np.zeros(0, np.int64)
    graph = adjacency(none, none, np.zeros(0), 5)
    found = communities(graph, 0, 3)
    assert partition(graph, 0).tolist() == [-1] * 5
    assert (found.members(), found.modularity, found.seed_agreement) == ([], 0.0, 0.0)


def test_an_edge_of_weight_zero_is_none() -> None:
    left, right = np.array([0, 2]), np.array([1, 3])
    graph = adjacency(left, right, np.zeros(2), 5)
    labels = partition(graph, 0)
    assert labels.tolist() == [-1] * 5
    assert modularity(graph, labels) == 0
    labels = partition(adjacency(left, right, np.array([0.0, 2.0]), 5), 0)
    assert labels[:2].tolist() == [-1, -1]
    assert labels[2] == labels[3] >= 0


def test_planted_groups_are_found_by_every_seed_and_equally_by_the_same_one() -> None:
    graph, truth = planted(6, 20, 0.6, 0.01, 0)
    found = communities(graph, 3, 8)
    assert adjusted_rand(found.labels, truth) > 0.99
    assert found.seed_agreement > 0.99
    assert sorted(len(nodes) for nodes in found.members()) == [20] * 6
    assert np.array_equal(partition(graph, 5), partition(graph, 5))


def test_a_seed_gives_the_same_groups_whatever_was_sought_before() -> None:
    """On a graph without groups, where every random choice of the method shows."""
    generator = np.random.default_rng(0)
    pairs = np.unique(np.sort(generator.integers(0, 60, (400, 2)), axis=1), axis=0)
    left, right = pairs[pairs[:, 0] < pairs[:, 1]].T
    graph = adjacency(left, right, generator.random(len(left)), 60)
    first, again = ([partition(graph, seed).tolist() for seed in range(30)] for _ in range(2))
    assert first == again
    assert len({tuple(labels) for labels in first}) > 20


def test_seeds_do_not_agree_on_a_graph_without_groups() -> None:
    graph, _ = planted(1, 150, 0.06, 0.06, 1)
    found = communities(graph, 0, 6)
    assert found.seed_agreement < 0.6
    assert found.modularity > 0.2  # which alone would look like something


def test_a_pair_alone_is_no_community() -> None:
    graph = adjacency(np.array([0, 2, 3]), np.array([1, 3, 4]), np.ones(3), 6)
    assert [nodes.tolist() for nodes in communities(graph, 0, 2).members()] == [[2, 3, 4]]


def test_only_arrows_that_follow_from_no_others_are_kept() -> None:
    source, target = np.array([2, 1, 2, 3, 4, 5, 5]), np.array([1, 0, 0, 0, 5, 4, 0])
    kept = direct_only(source, target)
    assert list(zip(source[kept].tolist(), target[kept].tolist(), strict=True)) == [
        (2, 1),
        (1, 0),
        (3, 0),
        (4, 5),
        (5, 4),
        (5, 0),
    ]
