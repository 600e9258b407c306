"""Splitting and absorption: found where planted, and told from an implication; counts as loops count them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipelines.concepts.absorption import Absorption, Patterns, Probes, ProbeSums, ScoreHistogram, greedy_union, n_main

D, N = 32, 20_000
CONCEPT, TOKEN, CHILD, OTHER = range(4)


def planted(kind: str, seed: int = 0) -> tuple[NDArray[np.float64], sp.csr_array, NDArray[np.float64], NDArray[np.bool_]]:
    """(rows, codes, decoder, label): a concept in 20 % of the rows, in 4 % of these together with something narrower.

    `absorber`: there feature 0 is silent, and feature 1, whose direction is the sum of both, stands in. `implication`: there
    both fire, feature 1 only ever with feature 0, although its direction points along the concept's as well. `holes`: there
    feature 0 is silent and nothing stands in: the codes miss it.
    """
    generator = np.random.default_rng(seed)
    axes = np.linalg.qr(generator.standard_normal((D, 4)))[0].T
    label = generator.random(N) < 0.2
    narrow = label & (generator.random(N) < 0.04)
    other = generator.random(N) < 0.3
    strength = generator.uniform(2, 3, N)
    rows = strength[:, None] * (
        label[:, None] * axes[CONCEPT] + narrow[:, None] * axes[TOKEN] + other[:, None] * axes[OTHER]
    ) + 0.05 * generator.standard_normal((N, D))
    decoder = np.stack([axes[CONCEPT], (axes[CONCEPT] + axes[TOKEN]) / np.sqrt(2), axes[OTHER]])
    codes = np.zeros((N, 3))
    codes[:, 2] = other * strength
    codes[:, 0] = (label if kind == "implication" else label & ~narrow) * strength
    if kind == "absorber":
        codes[:, 1] = narrow * strength * np.sqrt(2)
    if kind == "implication":
        codes[:, 1] = narrow * strength / np.sqrt(2)
    return rows, sp.csr_array(codes), decoder, label


def absorption_of(
    kind: str, cuts: tuple[int, ...] = (), mains: list[list[int]] | None = None
) -> tuple[Absorption, list[int], Probes]:
    rows, codes, decoder, label = planted(kind)
    half = np.random.default_rng(9).random(N) < 0.5
    fired = codes.toarray() > 0
    patterns = Patterns.of(fired, label, half)
    order, f1 = greedy_union(patterns, 3, 10)
    main = order[: n_main(f1)]
    sums = ProbeSums(1, D)
    sums.update(rows[~half], sp.csr_array(label[~half, None].astype(np.int64)))
    probes = sums.probes()
    scores = probes.scores(rows)
    histogram = ScoreHistogram(1)
    histogram.update(scores, label[:, None], half)
    thresholds, f1_of_probe = histogram.finalize()
    assert f1_of_probe[0] > 0.95
    found = Absorption(1, 3)
    for own in np.split(np.flatnonzero(half), cuts):
        part = Absorption(1, 3)
        part.update(codes[own], label[own, None], scores[own], thresholds, mains or [main], probes.along(decoder))
        found = found.merge(part)
    return found, main, probes


def test_a_planted_absorber_is_found_with_its_rate() -> None:
    found, main, _ = absorption_of("absorber")
    _, codes, _, label = planted("absorber")
    half = np.random.default_rng(9).random(N) < 0.5
    n_planted = int(((codes.toarray()[:, 1] > 0) & half).sum())
    assert main == [0]
    assert n_planted > 50
    assert found.present[0] == (label & half).sum()
    assert found.carriers.toarray()[0, [0, 2]].tolist() == [0, 0]
    assert 0.95 * n_planted <= found.absorbed[0] == found.carriers[0, 1] <= n_planted
    assert found.rates()[0] == pytest.approx(n_planted / (label & half).sum(), rel=0.05)


def test_a_planted_implication_is_no_absorption() -> None:
    """The child's direction does point along the probe, so that it is its parent's firing that tells."""
    found, main, probes = absorption_of("implication")
    _, codes, decoder, _ = planted("implication")
    fired = codes.toarray() > 0
    assert fired[:, 1].any()
    assert fired[fired[:, 1], 0].all()
    assert main == [0]
    assert found.seen[0] > 500
    assert (found.silent[0], found.absorbed[0], found.carriers.nnz) == (0, 0, 0)
    # the same child without its parent would have been called an absorber
    without, _, _ = absorption_of("implication", mains=[[2]])
    assert probes.along(decoder)[0, 1] > 0
    assert without.carriers[0, 1] + without.carriers[0, 0] > 0


def test_rows_that_the_codes_miss_are_silent_but_not_absorbed() -> None:
    found, main, _ = absorption_of("holes")
    assert main == [0]
    assert found.silent[0] > 50
    assert found.absorbed[0] == 0


def test_a_feature_that_fires_there_by_chance_and_points_elsewhere_is_no_absorber() -> None:
    found, _, _ = absorption_of("holes")
    _, codes, _, label = planted("holes")
    silent = label & (codes.toarray()[:, 0] == 0)
    assert (codes.toarray()[silent, 2] > 0).sum() > 20
    assert found.carriers[0, 2] == 0


def test_a_concept_without_a_main_feature_is_left_out() -> None:
    found, _, _ = absorption_of("absorber", mains=[[]])
    assert (found.present[0], found.seen[0]) == (0, 0)
    assert np.isnan(found.rates()[0])


def test_any_cut_of_the_rows_gives_the_same_counts() -> None:
    whole, _, _ = absorption_of("absorber")
    parts, _, _ = absorption_of("absorber", cuts=(1, 2, 900, 3000))
    for name in ("present", "seen", "silent", "absorbed"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))
    np.testing.assert_array_equal(whole.carriers.toarray(), parts.carriers.toarray())


# Splitting


def test_a_planted_split_takes_its_parts_and_no_more() -> None:
    """Three features follow a third of a concept each; a fourth fires at random; a fifth covers 1 %, and adds too little."""
    generator = np.random.default_rng(1)
    label = generator.random(N) < 0.3
    which = generator.choice(4, N, p=[0.33, 0.33, 0.33, 0.01])
    fired = np.stack(
        [label & (which == 0), label & (which == 1), generator.random(N) < 0.1, label & (which == 2), label & (which == 3)],
        axis=1,
    )
    patterns = Patterns.of(fired, label, generator.random(N) < 0.5)
    order, f1 = greedy_union(patterns, 5, 10)
    assert sorted(order[: n_main(f1)]) == [0, 1, 3]
    assert order[3] == 4
    assert 2 not in order
    assert patterns.union_score(order[:3], 1)[2] > 0.98
    assert patterns.union_score(order[:1], 1)[2] < 0.55


def test_one_feature_that_follows_a_concept_is_not_split() -> None:
    generator = np.random.default_rng(2)
    label = generator.random(N) < 0.3
    fired = np.stack([label, label & (generator.random(N) < 0.5)], axis=1)
    order, f1 = greedy_union(Patterns.of(fired, label, generator.random(N) < 0.5), 2, 10)
    assert (order, f1) == ([0], [1.0])


def dense_score(fired: NDArray[Any], label: NDArray[Any], mine: NDArray[Any], candidates: list[int]) -> float:
    fires = fired[:, candidates].any(axis=1) & mine
    return float(2 * (fires & label).sum() / max(fires.sum() + (label & mine).sum(), 1))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), n=st.integers(1, 60), cut=st.integers(0, 60))
def test_unions_are_those_of_a_dense_table_however_the_rows_are_cut(seed: int, n: int, cut: int) -> None:
    generator = np.random.default_rng(seed)
    label, half = generator.random(n) < 0.4, generator.random(n) < 0.5
    fired = (generator.random((n, 4)) < 0.3) | (label[:, None] & (generator.random((n, 4)) < 0.4))
    parts = [
        Patterns.of(fired[own], label[own], half[own]) for own in (slice(None, cut), slice(cut, None)) if len(fired[own])
    ]
    patterns = parts[0] if len(parts) == 1 else parts[1].merge(parts[0])
    order, f1 = greedy_union(patterns, 4, 10)
    chosen: list[int] = []
    while len(chosen) < 4:
        scores = {i: dense_score(fired, label, ~half, [*chosen, i]) for i in range(4) if i not in chosen}
        best = max(scores, key=lambda i: (scores[i], -i))
        if scores[best] <= (dense_score(fired, label, ~half, chosen) if chosen else 0):
            break
        chosen.append(best)
    assert order == chosen
    for k in range(1, len(order) + 1):
        assert f1[k - 1] == pytest.approx(dense_score(fired, label, ~half, order[:k]))
        assert patterns.union_score(order[:k], 1)[2] == pytest.approx(dense_score(fired, label, half, order[:k]))


# Probes


def test_a_probe_is_fishers_discriminant() -> None:
    """Against the textbook formula on the rows themselves; merged from three parts."""
    generator = np.random.default_rng(3)
    mixing = generator.standard_normal((6, 6))
    rows = generator.standard_normal((500, 6)) @ mixing + 5
    labels = np.stack([rows[:, 0] > 5, generator.random(500) < 0.3], axis=1)
    sums = ProbeSums(2, 6)
    for own in np.split(np.arange(500), (10, 200)):
        part = ProbeSums(2, 6)
        part.update(rows[own], sp.csr_array(labels[own].astype(np.int64)))
        sums = sums.merge(part)
    probes = sums.probes()
    covariance = np.cov(rows.T, bias=True)
    covariance += 1e-3 * np.trace(covariance) / 6 * np.eye(6)
    for i in range(2):
        present, absent = rows[labels[:, i]].mean(axis=0), rows[~labels[:, i]].mean(axis=0)
        expected = np.linalg.inv(covariance) @ (present - absent)
        np.testing.assert_allclose(
            probes.directions[i] / np.linalg.norm(probes.directions[i]), expected / np.linalg.norm(expected), rtol=1e-6
        )
        scores = probes.scores(rows)[:, i]
        assert scores[labels[:, i]].mean() == pytest.approx(1)
        assert scores[~labels[:, i]].mean() == pytest.approx(0, abs=1e-9)


def test_a_concept_in_no_row_or_in_all_has_no_probe() -> None:
    rows = np.random.default_rng(4).standard_normal((50, 3))
    sums = ProbeSums(2, 3)
    sums.update(rows, sp.csr_array(np.repeat([[0, 1]], 50, axis=0)))
    assert not sums.probes().directions.any()


def test_the_probes_threshold_is_the_best_on_the_choosing_half_and_its_f1_of_the_other() -> None:
    generator = np.random.default_rng(5)
    label, half = generator.random(4000) < 0.3, generator.random(4000) < 0.5
    scores = np.round(label + 0.4 * generator.standard_normal(4000), 2)
    histogram = ScoreHistogram(1)
    histogram.update(scores[:, None], label[:, None], half)
    (threshold,), (f1,) = histogram.finalize()

    def score(t: float, mine: NDArray[np.bool_]) -> float:
        sees = scores[mine] >= t
        return float(2 * (sees & label[mine]).sum() / (sees.sum() + label[mine].sum()))

    edges = np.linspace(-4, 5, 451)
    assert score(threshold, ~half) == pytest.approx(max(score(t, ~half) for t in edges))
    assert f1 == pytest.approx(score(threshold, half))


def test_a_direction_along_a_probe_by_chance_adds_nothing() -> None:
    directions = np.eye(100)[:1]
    decoder = np.zeros((3, 100))
    decoder[:, 0], decoder[:, 1] = (0.29, 0.31, -0.9), 1
    decoder /= np.linalg.norm(decoder, axis=1, keepdims=True)
    along = Probes(directions, np.zeros(1)).along(np.stack([decoder[0], np.eye(100)[0], decoder[2]]))
    assert (along[0] > 0).tolist() == [False, True, False]
