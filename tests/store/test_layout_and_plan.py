"""Where rows lie and in which order they are read: pure arithmetic, so everything here is proved for any shape."""

from __future__ import annotations

from collections import Counter
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from actstore import plan
from actstore.layout import (
    MAX_CHUNK_ROWS,
    MIN_CHUNK_ROWS,
    MIN_SHARD_ROWS,
    MIN_SHARDS,
    ROUND_BUDGET_BYTES,
    SHARD_BUDGET_BYTES,
    Layout,
    choose_layout,
)
from actstore.plan import PartPlan, chunk_sequence, permutation, raw_words, round_order, rounds

seeds = st.integers(0, 2**64 - 1)
kept_counts = arrays(np.int64, st.integers(1, 60), elements=st.integers(0, 9) | st.just(0))
shapes = st.builds(
    lambda n_rows, chunk_rows, chunks: Layout(n_rows, chunk_rows * chunks, chunk_rows),
    st.integers(0, 3000),
    st.integers(1, 70),
    st.integers(1, 9),
)


def part_plan(counts: np.ndarray, seed: int = 0, chunk_rows: int = 2, chunks: int = 3) -> PartPlan:
    return PartPlan.build(seed, 0, 0, Layout(int(counts.sum()), chunk_rows * chunks, chunk_rows), counts)


# Layout


@given(shapes)
def test_each_row_lies_in_exactly_one_shard_and_chunk(layout: Layout) -> None:
    chunks = [layout.chunk_range(s, c) for s in range(layout.n_shards) for c in range(layout.n_chunks(s))]
    shards = [layout.shard_range(s) for s in range(layout.n_shards)]
    for ranges in (chunks, shards):
        assert [row for start, stop in ranges for row in range(start, stop)] == list(range(layout.n_rows))
    assert all(0 < stop - start <= layout.chunk_rows for start, stop in chunks)
    assert all(stop - start == layout.shard_rows for start, stop in shards[:-1])


@pytest.mark.parametrize("shape", [(-1, 4, 2), (10, 5, 2), (10, 0, 2), (10, 4, 0)])
def test_an_impossible_layout_is_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="not a layout"):
        Layout(*shape)


stores = {
    "n_rows": st.integers(0, 20_000) | st.integers(0, 10**10),
    "row_bytes": st.integers(1, 400_000),
    "n_sites": st.integers(1, 48),
}


@given(**stores)
def test_shards_are_as_many_as_bytes_ask_for_within_their_bounds(n_rows: int, row_bytes: int, n_sites: int) -> None:
    """Of 128 MiB over all sites where that is 8,192 rows or more, and 16 where that leaves 128 rows."""
    layout = choose_layout(n_rows, row_bytes, -(-row_bytes // n_sites))
    by_bytes = -(-n_rows * row_bytes // SHARD_BUDGET_BYTES)
    wanted = max(1, min(by_bytes, n_rows // MIN_SHARD_ROWS), min(MIN_SHARDS, n_rows // MIN_CHUNK_ROWS))
    rounding = layout.n_chunks(0) + 1 if n_rows else 1
    assert n_rows / wanted <= layout.shard_rows < n_rows / wanted + 1 + rounding
    assert layout.n_shards == -(-n_rows // layout.shard_rows) <= wanted
    if wanted <= MIN_SHARDS:
        assert layout.n_shards == wanted or n_rows == 0


@given(**stores)
def test_shards_are_near_equal(n_rows: int, row_bytes: int, n_sites: int) -> None:
    """What the last one lacks is rounding: less than a row and a chunk number for each shard."""
    layout = choose_layout(n_rows, row_bytes, -(-row_bytes // n_sites))
    sizes = [stop - start for start, stop in map(layout.shard_range, range(max(0, layout.n_shards - 2), layout.n_shards))]
    if len(sizes) == 2:
        assert sizes[0] - sizes[1] < layout.n_shards * (layout.n_chunks(0) + 1)
        assert sizes[0] == layout.shard_rows


@given(**stores)
def test_chunks_are_as_large_as_a_round_can_pool(n_rows: int, row_bytes: int, n_sites: int) -> None:
    pooled = -(-row_bytes // n_sites)
    layout = choose_layout(n_rows, row_bytes, pooled)
    by_bytes = min(-(-n_rows * row_bytes // SHARD_BUDGET_BYTES), n_rows // MIN_SHARD_ROWS)
    n_shards = max(1, by_bytes, min(MIN_SHARDS, n_rows // MIN_CHUNK_ROWS))
    allowed = [rows for rows in (1024, 512, 256) if n_shards * rows * pooled <= ROUND_BUDGET_BYTES]
    most_rows = max([*allowed, MIN_CHUNK_ROWS])
    assert most_rows <= MAX_CHUNK_ROWS
    assert layout.chunk_rows <= most_rows
    assert layout.n_chunks(0) <= max(1, -(-layout.shard_rows // most_rows)) or n_rows == 0
    assert layout.shard_rows % layout.chunk_rows == 0
    assert layout.n_shards * layout.chunk_rows * pooled <= ROUND_BUDGET_BYTES or most_rows == MIN_CHUNK_ROWS


# The generator


def philox_4x64_10(counter: list[int], key: list[int]) -> list[int]:
    """Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC'11), figure 4, in plain integers."""
    mask = 2**64 - 1
    for _ in range(10):
        high0, low0 = divmod(0xD2E7470EE14C6C93 * counter[0], 2**64)
        high1, low1 = divmod(0xCA5A826395121157 * counter[2], 2**64)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B97F4A7C15) & mask, (key[1] + 0xBB67AE8584CAA73B) & mask]
    return counter


@given(seed=seeds, purpose=st.integers(1, 7), index=st.lists(st.integers(0, 2**40), max_size=3), n=st.integers(0, 30))
def test_raw_words_are_philox_with_the_block_number_first_in_the_counter(
    seed: int, purpose: int, index: list[int], n: int
) -> None:
    tail = index + [0] * (3 - len(index))
    expected = [word for block in range(1, n // 4 + 2) for word in philox_4x64_10([block, *tail], [seed, purpose])]
    assert raw_words(n, seed, purpose, *index).tolist() == expected[:n]


def test_golden_values_guard_the_format() -> None:
    """A store written today must be read, and continued, by every later version."""
    purposes = ["WINDOW_ORDER", "ROW_ORDER", "CHUNK_ORDER", "CHUNK_PHASE", "ROUND_ORDER", "DOCUMENT_ORDER", "SAMPLE"]
    assert [getattr(plan, name) for name in purposes] == [1, 2, 3, 4, 5, 6, 7]
    assert raw_words(2, 0, plan.WINDOW_ORDER).tolist() == [0xD037F8C3F9A1D176, 0xC057419B4C210765]
    assert raw_words(2, 7, plan.ROW_ORDER, 1, 0, 5).tolist() == [0xE12235C684872DC4, 0x580F907866E992EC]
    assert permutation(10, 0, plan.WINDOW_ORDER).tolist() == [5, 3, 7, 8, 2, 4, 1, 0, 6, 9]
    assert permutation(10, 3, plan.ROW_ORDER, 0, 1, 2).tolist() == [7, 4, 0, 5, 3, 2, 9, 6, 8, 1]
    assert chunk_sequence(0, 0, [3, 2, 1]).tolist() == [[0, 0], [2, 0], [1, 1], [0, 1], [0, 2], [1, 0]]
    assert round_order(0, 1, 2, 6).tolist() == [2, 4, 3, 0, 5, 1]
    assert round_order(0, 1, 2, 6, rank=3).tolist() == [4, 5, 2, 0, 1, 3]
    assert [list(map(len, rounds(np.zeros((11, 2)), 2, rank, 3))) for rank in range(3)] == [[2, 2], [2, 2], [2, 1]]


@given(n=st.integers(0, 300), seed=seeds, purpose=st.integers(1, 7), index=st.lists(st.integers(0, 9), max_size=3))
def test_permutation_is_a_permutation(n: int, seed: int, purpose: int, index: list[int]) -> None:
    assert sorted(permutation(n, seed, purpose, *index).tolist()) == list(range(n))


@pytest.mark.parametrize("shift", [0, 20, 40, 55, 63])
def test_a_permutation_is_the_stable_argsort_however_like_its_words_are(shift: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words that differ in their low bits alone, and words that are equal."""
    for n in (2, 1000, 20_000):
        words = raw_words(n, 0, plan.SAMPLE)
        for alike in (words >> np.uint64(shift), words >> np.uint64(shift) << np.uint64(shift)):
            monkeypatch.setattr(plan, "raw_words", lambda *_, alike=alike: alike)
            np.testing.assert_array_equal(permutation(n, 0, plan.SAMPLE), np.argsort(alike, kind="stable"))


def test_permutation_is_roughly_uniform() -> None:
    """5 items, 5,000 seeds: each item in each place about 1,000 times (standard deviation 28)."""
    places = np.stack([permutation(5, seed, plan.SAMPLE) for seed in range(5000)])
    counts = np.stack([np.bincount(places[:, item], minlength=5) for item in range(5)])
    assert np.abs(counts - 1000).max() < 5 * 28


# PartPlan


@given(counts=kept_counts, seed=seeds, chunk_rows=st.integers(1, 8), chunks=st.integers(1, 4))
def test_each_kept_row_of_each_window_is_in_exactly_one_shard(
    counts: np.ndarray, seed: int, chunk_rows: int, chunks: int
) -> None:
    part = part_plan(counts, seed, chunk_rows, chunks)
    found: Counter[tuple[int, int]] = Counter()
    for shard in range(part.layout.n_shards):
        windows, chosen = part.shard_windows(shard)
        of_the_windows = [(int(window), kept) for window in windows for kept in range(counts[window])]
        of_the_shard = of_the_windows[chosen]
        assert sorted(part.row_order(shard).tolist()) == list(range(len(of_the_shard)))
        found.update(of_the_shard)
    assert found == Counter((window, kept) for window in range(len(counts)) for kept in range(counts[window]))


@given(counts=kept_counts, seed=seeds)
def test_a_shard_runs_no_window_before_or_after_those_that_touch_it(counts: np.ndarray, seed: int) -> None:
    """Between the first and the last that give it rows, only windows that keep none at all may be idle."""
    part = part_plan(counts, seed)
    for shard in range(part.layout.n_shards):
        windows, chosen = part.shard_windows(shard)
        owner = np.repeat(windows, counts[windows])[chosen]
        assert owner[0] == windows[0]
        assert owner[-1] == windows[-1]
        assert all(counts[window] == 0 for window in set(windows.tolist()) - set(owner.tolist()))


@given(counts=kept_counts, seed=seeds)
def test_first_rows_locate_each_window_in_plan_order(counts: np.ndarray, seed: int) -> None:
    part = part_plan(counts, seed)
    expected = {}
    n_rows = 0
    for window in part.window_order.tolist():
        expected[window] = n_rows
        n_rows += int(counts[window])
    assert part.first_rows.tolist() == [expected[window] for window in range(len(counts))]
    assert n_rows == part.layout.n_rows


def test_plans_of_other_seeds_segments_and_parts_differ() -> None:
    counts = np.full(50, 3)
    layout = Layout(150, 30, 10)
    plans = [PartPlan.build(*key, layout, counts) for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]]
    assert len({tuple(part.window_order) for part in plans}) == len(plans)
    assert len({tuple(part.row_order(shard)) for part in plans for shard in range(5)}) == 5 * len(plans)


def test_a_layout_of_another_number_of_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="the windows keep 6 rows, the layout has 7"):
        PartPlan.build(0, 0, 0, Layout(7, 4, 2), np.array([1, 2, 3]))


# The order of chunks in an epoch

chunk_counts = st.lists(st.integers(0, 12), max_size=10)


@given(seed=seeds, epoch=st.integers(0, 10**6), counts=chunk_counts)
def test_each_chunk_once_per_epoch(seed: int, epoch: int, counts: list[int]) -> None:
    expected = [[shard, chunk] for shard, n_chunks in enumerate(counts) for chunk in range(n_chunks)]
    assert sorted(chunk_sequence(seed, epoch, counts).tolist()) == expected


@given(seed=seeds, epoch=st.integers(0, 10**6), n_shards=st.integers(1, 12), n_chunks=st.integers(1, 12))
def test_with_equal_shards_each_round_takes_one_chunk_of_each(seed: int, epoch: int, n_shards: int, n_chunks: int) -> None:
    shards = chunk_sequence(seed, epoch, [n_chunks] * n_shards)[:, 0].reshape(n_chunks, n_shards)
    assert (np.sort(shards, axis=1) == np.arange(n_shards)).all()


@given(seed=seeds, counts=chunk_counts)
def test_every_stretch_of_an_epoch_mixes_unequal_shards_in_proportion(seed: int, counts: list[int]) -> None:
    shards = chunk_sequence(seed, 0, counts)[:, 0]
    done = np.arange(1, len(shards) + 1) / max(len(shards), 1)
    for shard, n_chunks in enumerate(counts):
        seen = np.cumsum(shards == shard)
        slack = 1 + n_chunks * len(counts) / max(len(shards), 1)
        assert (np.abs(seen - n_chunks * done) <= slack).all()


def test_another_epoch_and_another_seed_give_another_order() -> None:
    orders = {chunk_sequence(seed, epoch, [8] * 4).tobytes() for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25
    found = {round_order(*key, 50, rank).tobytes() for key in product(range(3), repeat=3) for rank in range(2)}
    assert len(found) == 54


def test_chunk_order_is_roughly_uniform() -> None:
    """Over 400 epochs each of 64 chunks stands at place 31.5 on average (standard deviation of a mean: 0.92)."""
    total = np.zeros((8, 8))
    for epoch in range(400):
        sequence = chunk_sequence(0, epoch, [8] * 8)
        total[sequence[:, 0], sequence[:, 1]] += np.arange(64)
    assert np.abs(total / 400 - 31.5).max() < 4.5 * 0.92


# Rounds

round_shapes = {
    "n_chunks": st.integers(0, 200),
    "chunks_per_round": st.integers(1, 20),
    "n_ranks": st.integers(1, 9),
}


def chunks_of_ranks(n_chunks: int, chunks_per_round: int, n_ranks: int) -> list[list[list[int]]]:
    """For each rank, the numbers of the chunks in each of its rounds."""
    sequence = np.stack([np.arange(n_chunks), np.arange(n_chunks)], axis=1)
    return [[found[:, 0].tolist() for found in rounds(sequence, chunks_per_round, rank, n_ranks)] for rank in range(n_ranks)]


@given(**round_shapes)
def test_the_ranks_rounds_are_each_chunk_once(n_chunks: int, chunks_per_round: int, n_ranks: int) -> None:
    ranks = chunks_of_ranks(n_chunks, chunks_per_round, n_ranks)
    assert sorted(chunk for found in ranks for chunks in found for chunk in chunks) == list(range(n_chunks))
    assert all(len(chunks) <= chunks_per_round for found in ranks for chunks in found)
    if n_ranks == 1:
        assert [chunk for chunks in ranks[0] for chunk in chunks] == list(range(n_chunks))


@given(**round_shapes)
def test_no_rank_has_more_than_one_chunk_more_than_another(n_chunks: int, chunks_per_round: int, n_ranks: int) -> None:
    """The claim holds for an epoch and for each round."""
    ranks = chunks_of_ranks(n_chunks, chunks_per_round, n_ranks)
    for counts in ([sum(map(len, found)) for found in ranks], *zip(*[map(len, found) for found in ranks], strict=True)):
        assert max(counts) - min(counts) <= 1


@given(**round_shapes)
def test_rounds_are_near_equal_runs_of_the_sequence(n_chunks: int, chunks_per_round: int, n_ranks: int) -> None:
    ranks = chunks_of_ranks(n_chunks, chunks_per_round, n_ranks)
    for chunks in (chunks for found in ranks for chunks in found if chunks):
        assert chunks == list(range(chunks[0], chunks[-1] + 1))
    joint = [sorted(chunk for chunks in together for chunk in chunks) for together in zip(*ranks, strict=True)]
    assert [chunk for chunks in joint for chunk in chunks] == list(range(n_chunks))
    assert len({len(chunks) for chunks in joint}) <= 2
    assert max(map(len, joint)) - min(map(len, joint)) <= 1
    assert len(joint) == max(1, -(-n_chunks // (chunks_per_round * n_ranks)))


@given(
    seed=seeds, epoch=st.integers(0, 10**6), index=st.integers(0, 10**6), n_rows=st.integers(0, 300), rank=st.integers(0, 99)
)
def test_a_round_emits_its_pool_in_the_order_of_random_words(
    seed: int, epoch: int, index: int, n_rows: int, rank: int
) -> None:
    words = raw_words(n_rows, seed, 5, epoch, index, rank).tolist()
    order = round_order(seed, epoch, index, n_rows, rank)
    assert order.dtype == np.int64
    assert order.tolist() == sorted(range(n_rows), key=words.__getitem__)


def test_any_row_of_a_round_stands_at_any_place() -> None:
    """12 rows, 4,000 rounds: each row at each place about 333 times (standard deviation 18)."""
    orders = np.stack([round_order(0, 0, index, 12) for index in range(4000)])
    counts = np.stack([np.bincount(orders[:, place], minlength=12) for place in range(12)])
    assert np.abs(counts - 4000 / 12).max() < 5 * (4000 / 12) ** 0.5
