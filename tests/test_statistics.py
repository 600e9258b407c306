"""Every statistic of codes against a dense one, and any order and shape of merging against any other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipelines.statistics import (
    BANDS,
    CodeBlock,
    CoOccurrence,
    FeatureCounts,
    Survey,
    TokenFirings,
    TopExamples,
    frequency_bands,
)

N_VOCABULARY = 7
N_EXAMPLES = 3


@dataclass(frozen=True)
class Codes:
    """Dense codes (n, F) of rows that stand in windows of five, and the same as blocks of k codes a row."""

    dense: NDArray[np.float32]
    k: int
    tokens: NDArray[np.int64]

    @property
    def n_features(self) -> int:
        return self.dense.shape[1]

    @property
    def windows(self) -> NDArray[np.int64]:
        return np.arange(len(self.dense)) // 5

    @property
    def positions(self) -> NDArray[np.int64]:
        return np.arange(len(self.dense)) % 5

    def block(self, rows: slice | NDArray[np.int64]) -> CodeBlock:
        indices = np.sort(np.argsort(-self.dense[rows], axis=1, kind="stable")[:, : self.k], axis=1)
        values = np.take_along_axis(self.dense[rows], indices, axis=1)
        columns = (self.tokens[rows], self.windows[rows], self.positions[rows])
        return CodeBlock(self.n_features, N_VOCABULARY, indices, values, *columns)

    def survey(self, rows: slice | NDArray[np.int64]) -> Survey:
        survey = Survey(self.n_features, N_VOCABULARY, N_EXAMPLES)
        survey.update(self.block(rows))
        return survey


def random_codes(seed: int, n_rows: int = 60, n_features: int = 9, k: int = 3) -> Codes:
    """At most k features a row, each of a few values, so that ties abound; feature 0 is always on, the last is dead."""
    generator = np.random.default_rng(seed)
    dense = generator.integers(1, 4, size=(n_rows, n_features)).astype(np.float32) / 2
    dense[np.argsort(np.argsort(generator.random(dense.shape), axis=1), axis=1) >= k - 1] = 0
    dense[generator.random(n_rows) < 0.2] = 0
    dense[:, -1] = 0
    dense[:, 0] = generator.integers(1, 4, size=n_rows)
    return Codes(dense, k, generator.integers(0, N_VOCABULARY - 1, n_rows))


def one_row() -> Codes:
    return Codes(np.array([[0, 2, 0, 1]], np.float32), 2, np.array([3]))


CASES: dict[str, Callable[[], Codes]] = {
    "random": lambda: random_codes(0),
    "k is 1": lambda: random_codes(1, k=1),
    "k is F": lambda: Codes(random_codes(2, k=9).dense, 9, random_codes(2).tokens),
    "all features on": lambda: Codes(np.ones((20, 4), np.float32), 4, np.zeros(20, np.int64)),
    "no firing at all": lambda: Codes(np.zeros((20, 4), np.float32), 2, np.zeros(20, np.int64)),
    "one row": one_row,
    "one feature": lambda: Codes(np.arange(6, dtype=np.float32)[:, None], 1, np.arange(6)),
    "no row": lambda: Codes(np.zeros((0, 4), np.float32), 2, np.zeros(0, np.int64)),
}


def best_examples(codes: Codes, n: int) -> list[tuple[int, float, int, int]]:
    """(feature, value, window, position), by brute force."""
    found = []
    for feature in range(codes.n_features):
        best: dict[int, tuple[float, int]] = {}
        for row in np.flatnonzero(codes.dense[:, feature] > 0).tolist():
            value, window, position = float(codes.dense[row, feature]), row // 5, row % 5
            if window not in best or value > best[window][0]:
                best[window] = (value, position)
        ranked = sorted((-value, window, position) for window, (value, position) in best.items())
        found += [(feature, -minus_value, window, position) for minus_value, window, position in ranked[:n]]
    return found


def require_equal_to_dense(survey: Survey, codes: Codes) -> None:
    dense = codes.dense
    fired = (dense > 0).astype(np.int64)
    counts = survey.counts.finalize()
    np.testing.assert_array_equal(counts["fires"], fired.sum(axis=0))
    np.testing.assert_array_equal(counts["frequency"], fired.sum(axis=0) / max(len(dense), 1))
    np.testing.assert_array_equal(counts["peak"], dense.max(axis=0, initial=0))
    np.testing.assert_allclose(
        counts["mean"], dense.sum(axis=0, dtype=np.float64) / np.maximum(fired.sum(axis=0), 1), rtol=1e-14
    )
    assert survey.counts.n_rows == len(dense)
    pairs = survey.pairs.finalize()
    assert pairs.dtype == np.int64
    np.testing.assert_array_equal(pairs.toarray(), np.triu(fired.T @ fired, k=1))
    on_token = (codes.tokens[:, None] == np.arange(N_VOCABULARY)).astype(np.int64)
    token_counts, token_totals, token_rows = survey.tokens.finalize()
    np.testing.assert_array_equal(token_counts.toarray(), fired.T @ on_token)
    np.testing.assert_allclose(token_totals.toarray(), dense.astype(np.float64).T @ on_token, rtol=1e-14)
    np.testing.assert_array_equal(token_rows, on_token.sum(axis=0))
    np.testing.assert_array_equal(token_totals.indices, token_counts.indices)
    np.testing.assert_array_equal(token_totals.indptr, token_counts.indptr)
    found = survey.examples.finalize()
    assert list(zip(*(found[name].tolist() for name in ("feature", "value", "window", "position")), strict=True)) == (
        best_examples(codes, N_EXAMPLES)
    )


@pytest.mark.parametrize("name", CASES)
def test_each_statistic_equals_the_dense_one(name: str) -> None:
    codes = CASES[name]()
    require_equal_to_dense(codes.survey(slice(None)), codes)


def test_the_cases_hold_a_dead_feature_and_one_that_is_always_on() -> None:
    fires = random_codes(0).survey(slice(None)).counts.fires
    assert (fires[-1], fires[0]) == (0, 60)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1000), data=st.data())
def test_any_order_and_shape_of_merging_gives_the_same(seed: int, data: st.DataObject) -> None:
    """Cut anywhere (blocks of one row too), shuffled, some blocks updating one value, merged pair by pair at random."""
    codes = random_codes(seed, n_rows=25)
    cuts = sorted(data.draw(st.sets(st.integers(1, 24)), label="cuts"))
    blocks = data.draw(st.permutations(np.split(np.arange(25), cuts)), label="order")
    parts: list[Survey] = []
    for rows in blocks:
        if parts and data.draw(st.booleans(), label="update"):
            parts[-1].update(codes.block(rows))
        else:
            parts.append(codes.survey(rows))
    while len(parts) > 1:
        left = parts.pop(data.draw(st.integers(0, len(parts) - 1), label="left"))
        right = parts.pop(data.draw(st.integers(0, len(parts) - 1), label="right"))
        parts.append(left.merge(right))
    require_equal_to_dense(parts[0], codes)


def test_an_empty_value_merges_as_nothing() -> None:
    codes = random_codes(4)
    empty = Survey(codes.n_features, N_VOCABULARY, N_EXAMPLES)
    require_equal_to_dense(empty.merge(codes.survey(slice(None))), codes)
    require_equal_to_dense(codes.survey(slice(None)).merge(Survey(codes.n_features, N_VOCABULARY, N_EXAMPLES)), codes)


def test_an_example_that_a_better_one_of_its_window_replaces_makes_room_for_no_wrong_one() -> None:
    """Window 0 lies in both blocks and is better in the second; the first block alone fills its list with it."""
    dense = np.zeros((15, 1), np.float32)
    dense[[0, 4, 5, 10], 0] = [3, 9, 2, 1]
    codes = Codes(dense, 1, np.zeros(15, np.int64))
    first, second = TopExamples(2), TopExamples(2)
    first.update(codes.block(np.array([0, 5, 10])))
    second.update(codes.block(np.array([4])))
    found = first.merge(second).finalize()
    assert (found["value"].tolist(), found["window"].tolist(), found["position"].tolist()) == ([9, 2], [0, 1], [4, 0])


@pytest.mark.parametrize("kind", [FeatureCounts, CoOccurrence])
def test_counts_pass_the_range_of_32_bits(kind: type[FeatureCounts] | type[CoOccurrence]) -> None:
    value = kind(4)
    value.update(CASES["all features on"]().block(slice(None)))
    for _ in range(30):
        other = kind(4)
        other.merge(value)  # type: ignore[arg-type]
        value.merge(other)  # type: ignore[arg-type]
    counts = value.fires if isinstance(value, FeatureCounts) else value.finalize().data
    assert counts.tolist() == [20 << 30] * len(counts)


def test_token_firings_add_values_on_the_same_token() -> None:
    firings = TokenFirings(4, N_VOCABULARY)
    for value in (0.25, 0.5):
        firings.update(CodeBlock(4, N_VOCABULARY, np.array([[2]]), np.array([[value]], np.float32), *[np.array([5])] * 3))
    counts, totals, rows = firings.finalize()
    assert (counts[2, 5], totals[2, 5], rows[5]) == (2, 0.75, 2)


# Frequency bands


@given(fires=st.lists(st.integers(0, 2000), max_size=50))
def test_the_bands_sum_to_the_number_of_features(fires: list[int]) -> None:
    assert sum(frequency_bands(np.array(fires, np.int64), 2000).values()) == len(fires)


@pytest.mark.parametrize("n_rows", [1000, 300, 7, 1, 30 * 10**9])
def test_band_boundaries_are_exact(n_rows: int) -> None:
    """A share of exactly 90, 10 or 1 % belongs to the band below it; compared as integers."""

    def band(fires: int) -> str:
        return next(name for name, n in frequency_bands(np.array([fires]), n_rows).items() if n)

    above = {"always": 90, "common": 10, "rare": 1}
    for fires in {0, 1, n_rows, *(n_rows * share // 100 + step for share in above.values() for step in (0, 1))}:
        if fires <= n_rows:
            expected = next((name for name, share in above.items() if 100 * fires > share * n_rows), "very rare")
            assert band(fires) == (expected if fires else "dead")
    assert tuple(frequency_bands(np.array([0]), n_rows)) == BANDS
