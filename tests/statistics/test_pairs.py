"""Counts of pairs against the dense product BᵀB, for every type, slice and block."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.statistics import pairs
from pipelines.statistics.pairs import PairTile, firings_of, marked_codes, pair_counts


def dense_counts(indices: np.ndarray, fired: np.ndarray | None, n_features: int) -> np.ndarray:
    """BᵀB of the (n, F) matrix of firings."""
    fires = np.zeros((len(indices), n_features), np.int64)
    for row in range(len(indices)):
        for slot in range(indices.shape[1]):
            if fired is None or fired[row, slot]:
                fires[row, indices[row, slot]] = 1
    return fires.T @ fires


def codes(seed: int, n_rows: int, n_features: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """k different features a row; about two thirds of them fire, the padding of others may repeat a feature."""
    rng = np.random.default_rng(seed)
    indices = np.argsort(rng.random((n_rows, n_features)), axis=1)[:, :k]
    fired = rng.random((n_rows, k)) < 0.7
    return np.where(fired, indices, 0), fired


def add(tile: PairTile, indices: np.ndarray, fired: np.ndarray) -> None:
    codes = marked_codes(indices, fired, tile.n_features)
    tile.add(codes, firings_of(codes, tile.n_features)[tile.start : tile.stop])


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int32", "int64"])
@pytest.mark.parametrize(
    ("n_rows", "n_features", "k"), [(50, 20, 4), (1, 20, 3), (30, 5, 5), (40, 9, 1), (0, 4, 2), (7, 1, 1)]
)
def test_counts_equal_the_dense_product(dtype: str, n_rows: int, n_features: int, k: int) -> None:
    indices, fired = codes(1, n_rows, n_features, k)
    expected = dense_counts(indices, fired, n_features)
    found = pair_counts(indices.astype(dtype), fired, n_features, slice(None))
    assert found.dtype.kind == "u"
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(found, found.T)


def test_all_codes_count_when_no_mask_is_given() -> None:
    indices = np.argsort(np.random.default_rng(3).random((40, 12)), axis=1)[:, :5].astype(np.uint16)
    np.testing.assert_array_equal(pair_counts(indices, None, 12, slice(None)), dense_counts(indices, None, 12))


@pytest.mark.parametrize("n_features", [256, 65_536])
def test_codes_that_do_not_fire_are_dropped_where_the_index_type_is_full(n_features: int) -> None:
    indices = np.array([[0, n_features - 1], [n_features - 1, 0]], np.min_scalar_type(n_features - 1))
    fired = np.array([[True, False], [True, True]])
    found = pair_counts(indices, fired, n_features, slice(n_features - 1, n_features))
    assert (found[0, 0], found[0, -1], found.sum()) == (1, 1, 2)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), cuts=st.sets(st.integers(1, 12)), block=st.integers(1, 40))
def test_tiles_side_by_side_and_blocks_one_after_another_give_the_same(seed: int, cuts: set[int], block: int) -> None:
    indices, fired = codes(seed, 30, 13, 4)
    edges = [0, *sorted(cuts), 13]
    tiles = []
    for start, stop in pairwise(edges):
        tile = PairTile(start, 13, np.full(stop - start, 30))
        for row in range(0, 30, block):
            add(tile, indices[row : row + block], fired[row : row + block])
        tiles.append(tile.rows())
    np.testing.assert_array_equal(np.concatenate(tiles), dense_counts(indices, fired, 13))


def test_features_of_any_order_of_widths_count_their_own_rows() -> None:
    rng = np.random.default_rng(4)
    indices, fired = codes(4, 30, 13, 4)
    every = marked_codes(indices, fired, 13)
    for _ in range(10):
        tile = PairTile(3, 13, rng.choice([30, 256, 70_000], 7))
        tile.add(every, firings_of(every, 13)[3:10])
        np.testing.assert_array_equal(tile.rows(), dense_counts(indices, fired, 13)[3:10])


@pytest.mark.parametrize("size", [1, 12])
def test_long_inputs_are_counted_in_bounded_pieces(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(pairs, "PIECE_CODES", size)
    indices, fired = codes(5, 33, 11, 4)
    np.testing.assert_array_equal(pair_counts(indices, fired, 11, slice(2, 9)), dense_counts(indices, fired, 11)[2:9])


def test_counts_at_the_end_of_their_type_do_not_wrap() -> None:
    for n in (255, 256, 65_535, 65_536):
        found = pair_counts(np.zeros((n, 1), np.uint8), None, 2, slice(0, 1))
        assert found.tolist() == [[n, 0]]


def test_each_feature_counts_in_the_type_it_needs_wherever_it_stands() -> None:
    rng = np.random.default_rng(2)
    common = rng.random((70_000, 6)) < [0.002, 1, 0.01, 0.9, 0, 0.003]
    indices, expected = np.tile(np.arange(6, dtype=np.uint8), (len(common), 1)), common.astype(np.int64).T @ common
    fires = common.sum(axis=0)
    tile, other = PairTile(0, 6, fires), PairTile(0, 6, fires)
    assert sorted({part.itemsize for part in tile._parts if len(part)}) == [1, 2, 4]
    add(tile, indices[:40_000], common[:40_000])
    add(other, indices[40_000:], common[40_000:])
    total = tile.plus(other)
    np.testing.assert_array_equal(total.rows(), expected)
    np.testing.assert_array_equal(total.rows(2, 5), expected[2:5])
    assert [total.rows(f, f + 1).itemsize for f in range(6)] == [1, 4, 2, 2, 1, 1]
    assert tile.rows(1, 2)[0, 1] == 40_000, "adding two leaves them as they were"
    counted = PairTile(0, 6, fires)
    counted.add_counts(expected)
    np.testing.assert_array_equal(counted.rows(), expected)
