"""Every statistic of codes against a dense one, and any order and shape of merging against any other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipelines.analysis.survey.survey import Survey, tiled_part
from pipelines.statistics import BANDS, CodeBlock, Extent, FiringTable, SampledExamples, frequency_bands, statistics
from pipelines.statistics.firing_table import stable_order
from pipelines.statistics.firings_by import FiringsBy
from pipelines.statistics.kept_firings import firing_hash
from pipelines.statistics.of_codes.counts import FeatureCounts
from pipelines.statistics.of_codes.top_examples import TopExamples
from pipelines.statistics.value_bins import bin_edges, quantile_bins, value_bins

N_VOCABULARY = 7
N_DOCUMENTS, N_PARTS = 5, 2
CONTEXT = 5
N_EXAMPLES, N_RANDOM = 3, 2
SEED = 11
TABLES = [name for name, kind in statistics().items() if issubclass(kind, FiringsBy)]


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

    @property
    def documents(self) -> NDArray[np.int64]:
        """Documents of unequal length, cut inside windows."""
        return np.minimum(np.sqrt(np.arange(len(self.dense))).astype(int), N_DOCUMENTS - 1)

    @property
    def parts(self) -> NDArray[np.int64]:
        return self.documents % N_PARTS

    @property
    def extent(self) -> Extent:
        return Extent(self.n_features, self.k, N_VOCABULARY, CONTEXT, N_DOCUMENTS, N_PARTS, N_EXAMPLES, N_RANDOM, SEED)

    def block(self, rows: slice | NDArray[np.int64]) -> CodeBlock:
        indices = np.sort(np.argsort(-self.dense[rows], axis=1, kind="stable")[:, : self.k], axis=1)
        values = np.take_along_axis(self.dense[rows], indices, axis=1)
        names = ("tokens", "windows", "positions", "documents", "parts")
        return CodeBlock(self.n_features, indices, values, **{name: getattr(self, name)[rows] for name in names})

    def survey(self, rows: slice | NDArray[np.int64]) -> Survey:
        survey = Survey(self.extent)
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
    counts = survey["counts"].finalize()
    np.testing.assert_array_equal(counts["features/fires"], fired.sum(axis=0))
    np.testing.assert_array_equal(counts["features/frequency"], fired.sum(axis=0) / max(len(dense), 1))
    np.testing.assert_array_equal(counts["features/peak"], dense.max(axis=0, initial=0))
    np.testing.assert_allclose(
        counts["features/mean"], dense.sum(axis=0, dtype=np.float64) / np.maximum(fired.sum(axis=0), 1), rtol=1e-14
    )
    assert survey["counts"].n_rows == len(dense)
    np.testing.assert_array_equal(survey["rows"].active, np.bincount(fired.sum(axis=1), minlength=codes.k + 1))
    strength = np.where(dense > 0, value_bins(dense.ravel()).reshape(dense.shape), -1)
    for name in TABLES:
        counts, totals = survey[name].table.finalize()
        assert counts.dtype == np.int64
        if name == "bins":
            for column in np.unique(counts.indices):
                np.testing.assert_array_equal(counts[:, [column]].toarray().ravel(), (strength == column).sum(axis=0))
            assert counts.sum() == fired.sum()
            continue
        kind = (getattr(codes, name)[:, None] == np.arange(survey[name].n_columns(codes.extent))).astype(np.int64)
        np.testing.assert_array_equal(counts.toarray(), fired.T @ kind)
        np.testing.assert_array_equal(getattr(survey["rows"], name), kind.sum(axis=0))
        if name == "tokens":
            counts.data = totals
            np.testing.assert_allclose(counts.toarray(), dense.astype(np.float64).T @ kind, rtol=1e-14)
    require_examples(survey, codes)


def require_examples(survey: Survey, codes: Codes) -> None:
    names = ("feature", "value", "window", "position")
    found = survey["top"].finalize()
    assert list(zip(*(found[name].tolist() for name in names), strict=True)) == best_examples(codes, N_EXAMPLES)
    found = survey["random"].finalize()
    assert list(zip(*(found[name].tolist() for name in names), strict=True)) == random_examples(codes, N_RANDOM)


def random_examples(codes: Codes, n: int) -> list[tuple[int, float, int, int]]:
    """The firings of each feature with the smallest hash, by brute force."""
    found = []
    for feature in range(codes.n_features):
        rows = np.flatnonzero(codes.dense[:, feature] > 0)
        rank = firing_hash(SEED, np.full(len(rows), feature), rows // 5, rows % 5)
        best = rows[np.lexsort((rows, rank))][:n].tolist()
        found += [(feature, float(codes.dense[row, feature]), row // 5, row % 5) for row in best]
    return found


@pytest.mark.parametrize("name", CASES)
def test_each_statistic_equals_the_dense_one(name: str) -> None:
    codes = CASES[name]()
    require_equal_to_dense(codes.survey(slice(None)), codes)


def test_the_cases_hold_a_dead_feature_and_one_that_is_always_on() -> None:
    fires = random_codes(0).survey(slice(None))["counts"].fires
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
    empty = Survey(codes.extent)
    require_equal_to_dense(empty.merge(codes.survey(slice(None))), codes)
    require_equal_to_dense(codes.survey(slice(None)).merge(Survey(codes.extent)), codes)


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


def test_counts_pass_the_range_of_32_bits() -> None:
    block = CASES["all features on"]().block(slice(None))
    value, table = FeatureCounts(4), FiringTable(4, 1)
    value.update(block)
    table.update(block.firings[1], np.zeros(80, np.int64), block.firings[2])
    for _ in range(30):
        for one in (value, table):
            other = type(one)(4) if isinstance(one, FeatureCounts) else FiringTable(4, 1)
            other.merge(one)  # type: ignore[arg-type]
            one.merge(other)  # type: ignore[arg-type]
    assert value.fires.tolist() == table.finalize()[0].data.tolist() == [20 << 30] * 4


# Strength


@given(st.lists(st.floats(2**-100, 2**100, width=32), min_size=1, max_size=40))
def test_a_bin_holds_its_value_and_is_a_sixteenth_of_it_wide_at_most(values: list[float]) -> None:
    array = np.array(values, np.float32)
    low, high = bin_edges(value_bins(array))
    assert (low <= array).all()
    assert (array < high).all()
    assert (high.astype(np.float64) - low <= low.astype(np.float64) / 16).all()


@given(
    values=st.lists(st.lists(st.floats(0.125, 100, width=32), max_size=30), min_size=1, max_size=4),
    quantiles=st.lists(st.floats(0, 1), min_size=1, max_size=4),
)
def test_quantiles_lie_in_the_bin_of_the_sorted_values(values: list[list[float]], quantiles: list[float]) -> None:
    table = FiringTable(len(values), 4096)
    expected = np.full((len(values), len(quantiles)), -1)
    for feature, own in enumerate(values):
        array = np.sort(np.array(own, np.float32))
        table.update(np.full(len(own), feature), value_bins(array), array)
        for i, quantile in enumerate(quantiles):
            if own:
                expected[feature, i] = value_bins(array[[max(int(np.ceil(quantile * len(own))), 1) - 1]])[0]
    np.testing.assert_array_equal(quantile_bins(table.finalize()[0], tuple(quantiles)), expected)


def test_one_random_firing_of_each_stratum_is_kept_by_its_hash() -> None:
    codes = random_codes(3)
    counts, _ = codes.survey(slice(None))["bins"].table.finalize()
    edges = quantile_bins(counts, (1 / 3, 2 / 3))
    halves = [SampledExamples(1, SEED, edges), SampledExamples(1, SEED, edges)]
    for half, rows in zip(halves, (slice(30, 60), slice(0, 30)), strict=True):
        half.update(codes.block(rows))
    found = halves[0].merge(halves[1]).finalize()
    expected = []
    for feature in range(codes.n_features):
        for stratum in range(3):
            bins = value_bins(codes.dense[:, feature])
            fits = (bins[:, None] > edges[feature]).sum(axis=1) == stratum
            rows = np.flatnonzero((codes.dense[:, feature] > 0) & fits)
            rank = firing_hash(SEED, np.full(len(rows), feature), rows // 5, rows % 5)
            expected += [(feature, stratum, row // 5, row % 5) for row in rows[np.lexsort((rows, rank))][:1].tolist()]
    names = ("feature", "stratum", "window", "position")
    assert list(zip(*(found[name].tolist() for name in names), strict=True)) == expected
    assert len(expected) > codes.n_features


def test_random_firings_are_drawn_evenly() -> None:
    """One of 40 firings for each of 2,000 features: the mean row is within four standard errors of the middle."""
    n_rows, n_features = 40, 2000
    feature, row = np.divmod(np.arange(n_features * n_rows), n_rows)
    rank = firing_hash(5, feature, row // 5, row % 5).reshape(n_features, n_rows)
    chosen = rank.argmin(axis=1)
    assert abs(chosen.mean() - 19.5) < 4 * np.sqrt((40**2 - 1) / 12 / n_features)
    assert (firing_hash(6, feature, row // 5, row % 5) == rank.ravel()).mean() < 0.01


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1 << 40)), max_size=30))
def test_the_radix_order_is_the_lexicographic_one(pairs: list[tuple[int, int]]) -> None:
    first, second = (np.array([pair[i] for pair in pairs], np.int64) for i in (0, 1))
    np.testing.assert_array_equal(stable_order(first, second), np.lexsort((second, first)))


def test_a_survey_comes_back_from_its_arrays() -> None:
    codes = random_codes(8)
    survey = codes.survey(slice(None))
    arrays = survey.take_arrays()
    assert not any(len(survey[name].table.key) for name in TABLES)
    assert not any(len(survey[name].feature) for name in ("top", "random"))
    again = Survey(codes.extent).load_dense(arrays.__getitem__)
    for name, one in again.tiled.items():
        for features in (slice(0, 4), slice(4, codes.n_features)):
            part = tiled_part(name, type(one), features, lambda key, start, stop: arrays[key][start:stop])
            one.add(features, [part])
    require_equal_to_dense(again, codes)


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
