"""Draws of the null: margins kept exactly, every table equally often, and what is left of the observed one."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from pipelines.structure import null
from pipelines.structure.null import CodeTable, Pairs, candidates, draw, hypergeometric


def table_of(rows: list[tuple[int, ...]], blocks: list[int], n_features: int) -> CodeTable:
    features = np.full((len(rows), max(1, *(len(row) for row in rows))), n_features, np.int32)
    for place, row in enumerate(rows):
        features[place, : len(row)] = row
    return CodeTable(features, np.array(blocks, np.int64), n_features)


def dense(table: CodeTable) -> NDArray[np.int64]:
    """(rows, features) 0/1."""
    found = np.zeros((table.n_rows, table.n_features + 1), np.int64)
    np.add.at(found, (np.arange(table.n_rows)[:, None], table.features), 1)
    return found[:, :-1]


def random_table(seed: int, n_rows: int = 300, n_features: int = 40, width: int = 6) -> CodeTable:
    """Rows of 0 to `width` features, some of them in nearly every row, in blocks of 1 to 60 rows."""
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, n_features + 1)
    order = np.argsort(-(np.log(weights) + rng.gumbel(size=(n_rows, n_features))), axis=1)[:, :width].astype(np.int32)
    order[np.arange(width) >= rng.integers(0, width + 1, n_rows)[:, None]] = n_features
    return CodeTable(order, np.sort(rng.integers(0, 12, n_rows)), n_features)


def all_tables(rows: list[int], columns: list[int]) -> list[tuple[tuple[int, ...], ...]]:
    """Every table with these numbers of features a row and of rows a feature."""
    found: list[tuple[tuple[int, ...], ...]] = []

    def extend(chosen: list[tuple[int, ...]], left: list[int]) -> None:
        if len(chosen) == len(rows):
            found.append(tuple(chosen))
            return
        for features in itertools.combinations(range(len(columns)), rows[len(chosen)]):
            rest = [n - (feature in features) for feature, n in enumerate(left)]
            if min(rest) >= 0:
                extend([*chosen, features], rest)

    extend([], columns)
    return [table for table in found if sum(map(len, table)) == sum(columns)]


# What a draw keeps


@given(seed=st.integers(0, 2**32 - 1), key=st.integers(0, 2**64 - 1))
@settings(max_examples=30, deadline=None)
def test_a_draw_keeps_each_features_firings_in_each_block_and_each_rows_number_of_features(seed: int, key: int) -> None:
    table = random_table(seed)
    drawn = draw(table, (key, 0))
    before, after = dense(table), dense(drawn)
    assert after.max() <= 1
    assert np.array_equal(after.sum(axis=1), before.sum(axis=1))
    for block in np.unique(table.blocks):
        mine = table.blocks == block
        assert np.array_equal(after[mine].sum(axis=0), before[mine].sum(axis=0))
    assert not np.array_equal(after, before)


def test_the_same_key_gives_the_same_draw_and_another_one_another() -> None:
    table = random_table(0)
    assert np.array_equal(draw(table, (7, 1, 3)).features, draw(table, (7, 1, 3)).features)
    assert not np.array_equal(draw(table, (7, 1, 3)).features, draw(table, (7, 1, 4)).features)


def test_a_row_alone_in_its_block_stays_as_it_is() -> None:
    table = table_of([(0, 1), (1, 2), (0, 3)], [0, 1, 2], 4)
    assert np.array_equal(dense(draw(table, (0,))), dense(table))


def test_chunks_of_pairs_change_no_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(null, "CHUNK_PAIRS", 7)
    table = random_table(3)
    after = dense(draw(table, (1,)))
    assert np.array_equal(after.sum(axis=1), dense(table).sum(axis=1))
    assert np.array_equal(after.sum(axis=0), dense(table).sum(axis=0))


# How it is distributed

TINY = {
    "rows of unequal length": [(0, 1, 2), (0, 1, 3), (0, 4), (2,)],
    "two rows": [(0, 1, 2), (3, 4)],
    "three rows, one always left out": [(0, 1), (0, 2), (1, 3)],
    "a feature in all rows but one": [(0, 1), (0, 2), (0, 3), (1, 2)],
    "an empty row": [(0, 1), (), (1, 2), (3,)],
}


@pytest.mark.parametrize("rows", TINY.values(), ids=TINY.keys())
def test_every_table_with_the_same_margins_is_drawn_equally_often(rows: list[tuple[int, ...]]) -> None:
    """20,000 copies of a tiny table as so many blocks, against all tables that there are, by a chi-square test."""
    n_copies, n_features = 20_000, 5
    one = table_of(rows, [0] * len(rows), n_features)
    many = CodeTable(np.tile(one.features, (n_copies, 1)), np.repeat(np.arange(n_copies), len(rows)), n_features)
    states = all_tables([len(row) for row in rows], dense(one).sum(axis=0).tolist())
    assert len(states) > 1
    drawn = np.sort(draw(many, (0, 0)).features.reshape(n_copies, len(rows), -1), axis=2)
    seen: dict[tuple[tuple[int, ...], ...], int] = dict.fromkeys(states, 0)
    for copy in drawn.tolist():
        seen[tuple(tuple(f for f in row if f < n_features) for row in copy)] += 1
    assert stats.chisquare(list(seen.values())).pvalue > 1e-4


def test_too_few_sweeps_are_noticed_by_the_same_test() -> None:
    """The test above can fail: after two sweeps the start is still visible."""
    one = table_of(TINY["rows of unequal length"], [0] * 4, 5)
    many = CodeTable(np.tile(one.features, (5000, 1)), np.repeat(np.arange(5000), 4), 5)
    _, counts = np.unique(np.sort(draw(many, (0,), sweeps=2).features).reshape(5000, -1), axis=0, return_counts=True)
    assert stats.chisquare(counts).pvalue < 1e-10


def test_what_is_left_of_an_observed_excess_is_a_thousandth() -> None:
    """Two features always together, in half of the rows of long blocks: the drawn excess over the expectation is gone."""
    rng = np.random.default_rng(0)
    rows = [(0, 1) if on else (2, 3) for on in rng.random(20_000) < 0.5]
    table = table_of(rows, [i // 1000 for i in range(20_000)], 4)
    pairs = Pairs(np.array([0, 1]), np.array([0], np.int32), np.array([1], np.int32))
    observed = int(pairs.count(table)[0])
    expected = 20_000 / 6  # each row has two of four equally frequent features: one pair in six
    drawn = np.mean([pairs.count(draw(table, (0, i)))[0] for i in range(6)])
    assert observed > 2.5 * expected
    assert abs(drawn - expected) < 0.001 * (observed - expected) + 4 * np.sqrt(expected / 6)


# Counting


@pytest.mark.parametrize("dense_bytes", [0, 1 << 28], ids=["sorted", "dense"])
@pytest.mark.parametrize("keys_at_once", [50, 1 << 20])
def test_counts_of_pairs_are_those_of_the_dense_product(
    dense_bytes: int, keys_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(null, "DENSE_COUNT_BYTES", dense_bytes)
    monkeypatch.setattr(null, "KEYS_AT_ONCE", keys_at_once)
    table = random_table(1)
    pairs = candidates(table, 1.0)
    assert len(pairs) > 20
    left, right = pairs.ids
    product = dense(table).T @ dense(table)
    assert np.array_equal(pairs.count(table), product[left, right])
    assert np.array_equal(table.fires, np.diagonal(product))


def hypergeometric_law(n: int, a: int, b: int) -> list[float]:
    """P(0), P(1), …: of `a` things drawn from `n`, how many are among `b` marked ones, by counting."""
    return [math.comb(b, x) * math.comb(n - b, a - x) / math.comb(n, a) for x in range(min(a, b) + 1)]


@pytest.mark.parametrize("tile_bytes", [1, 1 << 28], ids=["a feature a tile", "one tile"])
def test_candidates_are_the_pairs_whose_hypergeometric_expectation_reaches_the_bound(
    tile_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(null, "TILE_BYTES", tile_bytes)
    table = random_table(2)
    codes = dense(table)
    mean, variance = np.zeros((40, 40)), np.zeros((40, 40))
    for block in np.unique(table.blocks):
        own = codes[table.blocks == block]
        for a, b in itertools.combinations(range(40), 2):
            chances = hypergeometric_law(len(own), int(own[:, a].sum()), int(own[:, b].sum()))
            first, second = (sum(p * x**power for x, p in enumerate(chances)) for power in (1, 2))
            mean[a, b] += first
            variance[a, b] += second - first**2
    pairs = candidates(table, 2.0)
    left, right = pairs.ids
    assert set(zip(left.tolist(), right.tolist(), strict=True)) == set(
        zip(*(x.tolist() for x in np.nonzero(mean >= 2)), strict=True)
    )
    found = hypergeometric(table, pairs)
    np.testing.assert_allclose(found[0], mean[left, right], rtol=1e-10)
    np.testing.assert_allclose(found[1], variance[left, right], rtol=1e-8, atol=1e-9)
