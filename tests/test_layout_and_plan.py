"""Where rows lie and in which order they are read: pure arithmetic, so everything here is proved for any shape."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from actstore import plan
from actstore.layout import (
    MAX_CHUNK_ROWS,
    MIN_CHUNK_ROWS,
    MIN_SHARDS,
    ROUND_BUDGET_BYTES,
    SHARD_BUDGET_BYTES,
    Layout,
    choose_layout,
)
from actstore.plan import PartPlan, chunk_sequence, permutation, raw_words, round_order

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


@given(
    n_rows=st.integers(0, 20_000) | st.integers(0, 10**10),
    row_bytes=st.integers(1, SHARD_BUDGET_BYTES // MIN_CHUNK_ROWS),
    n_sites=st.integers(1, 8),
)
def test_chosen_layout_keeps_its_bounds(n_rows: int, row_bytes: int, n_sites: int) -> None:
    widest = -(-row_bytes // n_sites)
    layout = choose_layout(n_rows, row_bytes, widest)
    chunk, shard = layout.chunk_rows, layout.shard_rows
    assert chunk in (128, 256, 512, 1024)
    assert MIN_CHUNK_ROWS <= chunk <= MAX_CHUNK_ROWS
    assert shard % chunk == 0
    assert shard * row_bytes <= SHARD_BUDGET_BYTES
    assert layout.n_shards >= MIN_SHARDS or n_rows < MIN_SHARDS * MIN_CHUNK_ROWS
    assert layout.n_shards * chunk * widest <= ROUND_BUDGET_BYTES or chunk == MIN_CHUNK_ROWS
    too_many_bytes = (shard + chunk) * row_bytes > SHARD_BUDGET_BYTES
    too_few_shards = n_rows // (shard + chunk) < MIN_SHARDS
    assert too_many_bytes or too_few_shards, "a larger shard would do"


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
    purposes = ("WINDOW_ORDER", "ROW_ORDER", "CHUNK_ORDER", "CHUNK_PHASE", "ROUND_ORDER", "DOCUMENT_ORDER", "SAMPLE")
    assert [getattr(plan, name) for name in purposes] == [1, 2, 3, 4, 5, 6, 7]
    assert raw_words(2, 0, plan.WINDOW_ORDER).tolist() == [0xD037F8C3F9A1D176, 0xC057419B4C210765]
    assert raw_words(2, 7, plan.ROW_ORDER, 1, 0, 5).tolist() == [0xE12235C684872DC4, 0x580F907866E992EC]
    assert permutation(10, 0, plan.WINDOW_ORDER).tolist() == [5, 3, 7, 8, 2, 4, 1, 0, 6, 9]
    assert permutation(10, 3, plan.ROW_ORDER, 0, 1, 2).tolist() == [7, 4, 0, 5, 3, 2, 9, 6, 8, 1]
    assert chunk_sequence(0, 0, [3, 2, 1]).tolist() == [[0, 0], [2, 0], [1, 1], [0, 1], [0, 2], [1, 0]]
    assert round_order(0, 1, 2, 6).tolist() == [2, 4, 3, 0, 5, 1]


@given(n=st.integers(0, 300), seed=seeds, purpose=st.integers(1, 7), index=st.lists(st.integers(0, 9), max_size=3))
def test_permutation_is_a_permutation(n: int, seed: int, purpose: int, index: list[int]) -> None:
    assert sorted(permutation(n, seed, purpose, *index).tolist()) == list(range(n))


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
    rounds = {round_order(seed, epoch, index, 50).tobytes() for seed in range(3) for epoch in range(3) for index in range(3)}
    assert len(rounds) == 27


def test_chunk_order_is_roughly_uniform() -> None:
    """Over 400 epochs each of 64 chunks stands at place 31.5 on average (standard deviation of a mean: 0.92)."""
    total = np.zeros((8, 8))
    for epoch in range(400):
        sequence = chunk_sequence(0, epoch, [8] * 8)
        total[sequence[:, 0], sequence[:, 1]] += np.arange(64)
    assert np.abs(total / 400 - 31.5).max() < 4.5 * 0.92
