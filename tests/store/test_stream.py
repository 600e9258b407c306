"""What the stream promises: every row once an epoch, a new order each time, bounded memory, resume to the bit."""

from __future__ import annotations

import gc
import shutil
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from storekit import CONTEXT, StoreSpec, build_segment, write_store

from actstore import reader
from actstore.arrays import read_table
from actstore.encodings.registry import encoding_of
from actstore.errors import DamagedStore, IdentityMismatch, InputError
from actstore.moments import SiteStatistics
from actstore.reader import ActivationStore, Shard
from actstore.stream import BatchStream, Scaling

SPEC = StoreSpec(n_segments=2, n_documents=90, document_tokens=20, shard_rows=128, chunk_rows=16)
SITE = "resid_post.0"
CHUNK_BYTES = SPEC.chunk_rows * SPEC.d_model * 4


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("stream") / "store", SPEC)


class CachedStore(ActivationStore):
    """Reads each chunk from the disk once: many epochs of tiny chunks, in a test's time."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._cached = cache(super().read_kept_chunk)

    def read_kept_chunk(self, shard: Shard, name: str, chunk: int, out: Any = None) -> Any:
        rows = self._cached(shard, name, chunk)
        if out is None:
            return rows.copy()
        out[: len(rows)] = rows
        return out[: len(rows)]


@pytest.fixture(scope="module")
def store(path: Path) -> ActivationStore:
    return CachedStore(path)


@pytest.fixture(scope="module")
def reopened(path: Path) -> ActivationStore:
    return CachedStore(path)


@pytest.fixture(scope="module")
def all_ids(store: ActivationStore) -> list[int]:
    return sorted(np.concatenate([store.read(shard, f"acts/{SITE}")[:, 0] for shard in store.shards()]).astype(int).tolist())


def take_ids(stream: BatchStream, n_batches: int | None = None) -> np.ndarray:
    """Channel 0 of the next batches, or of all there are: which rows they are."""
    return np.concatenate([np.zeros(0), *(batch[:, 0] for batch in islice(stream, n_batches))]).astype(np.int64)


def rows_by_id(store: ActivationStore, site: str, part: str = "train") -> dict[int, np.ndarray]:
    """Every row of a site as the reader gives it, by the id that the fp32 site has of it."""
    ids = np.concatenate([store.read(shard, f"acts/{SITE}")[:, 0] for shard in store.shards(part)]).astype(int)
    rows = np.concatenate([store.read(shard, f"acts/{site}") for shard in store.shards(part)])
    return dict(zip(ids.tolist(), rows, strict=True))


# Coverage and order


@settings(max_examples=25, deadline=None)
@given(batch_rows=st.integers(1, 5000), seed=st.integers(0, 2**64 - 1), round_chunks=st.integers(0, 30))
def test_each_row_once_per_epoch_whatever_the_batch(
    store: ActivationStore, all_ids: list[int], batch_rows: int, seed: int, round_chunks: int
) -> None:
    stream = BatchStream(store, SITE, batch_rows, seed=seed, budget_bytes=round_chunks * CHUNK_BYTES)
    n_epochs = 2
    ids = take_ids(stream, -(-n_epochs * stream.n_rows // batch_rows))
    for epoch in range(n_epochs):
        assert sorted(ids[epoch * stream.n_rows : (epoch + 1) * stream.n_rows].tolist()) == all_ids


def test_every_batch_is_full_float32_and_whole_rows(store: ActivationStore) -> None:
    rows = {row[0]: row for shard in store.shards() for row in store.read(shard, f"acts/{SITE}")}
    for batch in islice(BatchStream(store, SITE, 300), 20):
        assert batch.shape == (300, SPEC.d_model)
        assert batch.dtype == np.float32
        for row in batch:
            np.testing.assert_array_equal(row, rows[row[0]])


def test_each_epoch_and_each_seed_has_an_order_of_its_own(store: ActivationStore) -> None:
    orders = [
        ids.tobytes()
        for seed in range(3)
        for ids in take_ids(BatchStream(store, SITE, store.n_rows(), seed=seed), 3).reshape(3, -1)
    ]
    assert len(set(orders)) == 9


def test_the_order_does_not_depend_on_the_batch_size(store: ActivationStore) -> None:
    n_rows = store.n_rows()
    orders = [
        take_ids(BatchStream(store, SITE, batch_rows), -(-n_rows // batch_rows))[:n_rows] for batch_rows in (1, 77, 4096)
    ]
    for order in orders[1:]:
        np.testing.assert_array_equal(order, orders[0])


def test_the_heldout_rows_come_only_when_asked_for(store: ActivationStore, all_ids: list[int]) -> None:
    stream = BatchStream(store, SITE, store.n_rows("heldout"), part="heldout")
    heldout = take_ids(stream, 1)
    assert len(set(heldout.tolist())) == stream.n_rows == store.n_rows("heldout")
    assert not set(heldout.tolist()) & set(all_ids)


@settings(max_examples=40, deadline=None)
@given(
    batch_rows=st.integers(1, 900),
    seed=st.integers(0, 2**64 - 1),
    round_chunks=st.integers(0, 30),
    n_ranks=st.integers(1, 9),
    part=st.sampled_from(["train", "heldout"]),
)
def test_the_ranks_are_disjoint_and_together_give_each_row_once_an_epoch(
    store: ActivationStore, batch_rows: int, seed: int, round_chunks: int, n_ranks: int, part: str
) -> None:
    expected = sorted(rows_by_id(store, SITE, part))
    for epochs in (1, 3):
        shares = [
            BatchStream(
                store,
                SITE,
                batch_rows,
                seed=seed,
                part=part,
                budget_bytes=round_chunks * CHUNK_BYTES,
                epochs=epochs,
                rank=rank,
                n_ranks=n_ranks,
            )
            for rank in range(n_ranks)
        ]
        ids = [take_ids(share) for share in shares]
        assert sorted(np.concatenate(ids).tolist()) == sorted(expected * epochs)
        assert all(len(share) for share in ids), "no rank has nothing to do"


def test_a_rank_has_its_share_of_every_epoch(store: ActivationStore, all_ids: list[int]) -> None:
    """The endless stream of a rank is its shares of epochs 0, 1, 2, one after another."""
    streams = [[BatchStream(store, SITE, 7, epochs=n, rank=r, n_ranks=3) for n in (1, 2, 3)] for r in range(3)]
    ids = [[take_ids(stream) for stream in epochs] for epochs in streams]
    for epoch in range(3):
        begins = [len(share[epoch - 1]) if epoch else 0 for share in ids]
        joint = np.concatenate([share[epoch][begin:] for share, begin in zip(ids, begins, strict=True)])
        assert sorted(joint.tolist()) == all_ids
    for rank, share in enumerate(ids):
        endless = take_ids(BatchStream(store, SITE, 7, rank=rank, n_ranks=3), len(share[2]) // 7)
        np.testing.assert_array_equal(endless, share[2][: len(endless)])


@settings(max_examples=25, deadline=None)
@given(batch_rows=st.integers(1, 5000), epochs=st.integers(1, 3))
def test_a_number_of_epochs_ends_with_one_short_batch_and_no_row_lost(
    store: ActivationStore, all_ids: list[int], batch_rows: int, epochs: int
) -> None:
    stream = BatchStream(store, SITE, batch_rows, epochs=epochs)
    batches = list(stream)
    assert {len(batch) for batch in batches[:-1]} <= {batch_rows}
    assert 0 < len(batches[-1]) <= batch_rows
    ids = np.concatenate([batch[:, 0] for batch in batches]).astype(int).tolist()
    assert sorted(ids) == sorted(all_ids * epochs)
    assert stream.state_dict()["row"] == len(ids)
    assert list(stream) == [], "it is at its end"


def test_segments_of_other_chunks_and_shards_are_read_together(tmp_path: Path) -> None:
    """As a store has them that grew under another budget."""
    write_store(tmp_path / "store", replace(SPEC, n_segments=1))
    write_store(tmp_path / "store", replace(SPEC, shard_rows=240, chunk_rows=24))
    mixed = ActivationStore(tmp_path / "store")
    assert {shard.chunk_rows for shard in mixed.shards()} == {16, 24}
    rows = {site: rows_by_id(mixed, site) for site in (SITE, "resid_post.1")}
    for budget in (0, 5 * CHUNK_BYTES, 2**30):
        ids = take_ids(BatchStream(mixed, SITE, 50, budget_bytes=budget, epochs=1))
        assert sorted(ids.tolist()) == sorted(rows[SITE])
        bf16 = np.concatenate(list(BatchStream(mixed, "resid_post.1", 50, budget_bytes=budget, epochs=1)))
        np.testing.assert_array_equal(bf16, np.stack([rows["resid_post.1"][number] for number in ids.tolist()]))


def test_a_part_without_rows_is_refused(tmp_path: Path) -> None:
    write_store(tmp_path / "store", SPEC, n_shards=0)
    with pytest.raises(InputError, match="has no heldout rows to stream; collect more tokens"):
        BatchStream(ActivationStore(tmp_path / "store", partial=True), SITE, 8, part="heldout")


# Mixing


def test_batches_mix_contiguous_sources_as_evenly_as_chance(store: ActivationStore) -> None:
    """16 sources, each a run of neighbouring windows: their shares of a batch vary as in drawing without replacement."""
    n_rows, n_sources, batch_rows = store.n_rows(), 16, 256
    order = take_ids(BatchStream(store, SITE, batch_rows), n_rows // batch_rows)
    source = np.argsort(np.argsort(order)) * n_sources // len(order)
    counts = np.stack([np.bincount(batch, minlength=n_sources) for batch in source.reshape(-1, batch_rows)])
    share = 1 / n_sources
    variance = batch_rows * share * (1 - share) * (len(order) - batch_rows) / (len(order) - 1)
    assert np.abs(counts - batch_rows * share).max() < 4.5 * variance**0.5
    assert 0.5 < counts.var() / variance < 1.5


def test_a_batch_mean_varies_no_more_than_that_of_independent_rows(store: ActivationStore) -> None:
    """The window of a row is the most correlated thing there is; 60 epochs, mean window of each batch."""
    batch_rows = 128
    n_batches = store.n_rows() // batch_rows
    means, values = [], np.zeros(0)
    for seed in range(60):
        values = take_ids(BatchStream(store, SITE, batch_rows, seed=seed), n_batches).astype(np.float64) // CONTEXT
        means.append(values.reshape(n_batches, batch_rows).mean(axis=1))
    n = len(values)
    expected = values.var() / batch_rows * (n - batch_rows) / (n - 1)
    assert 0.5 < np.var(means) / expected < 1.1


def window_values(ids: np.ndarray) -> np.ndarray:
    """A number of each row's window that says nothing about any other window."""
    return (ids // CONTEXT * 2654435761 % 1009).astype(np.float64)


def test_windows_mix_as_a_uniform_shuffle_mixes_them(mixing: ActivationStore) -> None:
    """Rows of a window are as like as can be, windows are not: the variance of batch means over that of independent
    draws, 1 - (B - 1)/(n - 1) for a uniform shuffle, and the windows in a batch, over those of a uniform one."""
    n_rows, batch_rows = mixing.n_rows(), 256
    n_batches = n_rows // batch_rows
    means, distinct, values = [], [], np.zeros(0)
    for seed in range(40):
        ids = take_ids(BatchStream(mixing, SITE, batch_rows, seed=seed), n_batches)
        values = window_values(ids)
        means.append(values.reshape(n_batches, batch_rows).mean(axis=1))
        distinct.extend(len(set(batch.tolist())) for batch in (ids // CONTEXT).reshape(n_batches, batch_rows))
    every = window_values(np.array(list(rows_by_id(mixing, SITE))))
    excess = np.square(np.concatenate(means) - every.mean()).mean() / (every.var() / batch_rows)
    assert 0.85 < excess < 1.1
    of_windows = np.bincount(np.array(list(rows_by_id(mixing, SITE))) // CONTEXT)
    absent = [np.prod(1 - n_kept / (n_rows - np.arange(batch_rows))) for n_kept in of_windows]
    assert np.mean(distinct) > 0.98 * (1 - np.array(absent)).sum()


@pytest.fixture(scope="module")
def mixing(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """12 near-equal shards of about a thousand rows, as a layout is chosen, though of smaller chunks."""
    spec = StoreSpec(n_documents=380, document_tokens=40, chunk_rows=64, sites=((SITE, "fp32"),))
    n_rows = build_segment(spec, 0).record.parts["train"].n_rows
    spec = replace(spec, shard_rows=64 * -(-n_rows // (12 * 64)))
    found = CachedStore(write_store(tmp_path_factory.mktemp("mixing") / "store", spec))
    assert len(found.shards()) == 12
    return found


# Resume


@settings(max_examples=25, deadline=None)
@given(
    before=st.integers(0, 60),
    batch_rows=st.integers(1, 700),
    round_chunks=st.integers(1, 30),
    rank=st.integers(0, 2),
    n_ranks=st.integers(1, 3),
)
def test_a_resumed_stream_gives_the_same_bits(
    store: ActivationStore,
    reopened: ActivationStore,
    before: int,
    batch_rows: int,
    round_chunks: int,
    rank: int,
    n_ranks: int,
) -> None:
    options = {"budget_bytes": round_chunks * CHUNK_BYTES, "rank": rank % n_ranks, "n_ranks": n_ranks}
    stream = BatchStream(store, "resid_post.1", batch_rows, **options)
    batches = iter(stream)
    for _ in range(before):
        next(batches)
    state = stream.state_dict()
    resumed = BatchStream(reopened, "resid_post.1", batch_rows, **options)
    resumed.load_state_dict(state)
    for expected, found in islice(zip(batches, resumed, strict=False), 12):
        assert found.tobytes() == expected.tobytes()
    assert resumed.state_dict() == stream.state_dict()
    assert resumed.state_dict()["row"] == (before + 12) * batch_rows


def test_a_closed_iterator_and_a_new_one_continue(store: ActivationStore) -> None:
    stream = BatchStream(store, SITE, 100)
    pieces = np.concatenate([take_ids(stream, 3), take_ids(stream, 50)])
    np.testing.assert_array_equal(pieces, take_ids(BatchStream(store, SITE, 100), 53))


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"seed": 1}, "seed"),
        ({"budget_bytes": CHUNK_BYTES}, "chunks_per_round"),
        ({"part": "heldout"}, "part"),
        ({"rank": 1, "n_ranks": 2}, "rank"),
        ({"n_ranks": 2}, "n_ranks"),
    ],
)
def test_a_state_of_another_order_is_refused(store: ActivationStore, changed: dict[str, int], field: str) -> None:
    state = BatchStream(store, SITE, 8).state_dict()
    with pytest.raises(IdentityMismatch, match=f"the state was taken with {field} "):
        BatchStream(store, SITE, 8, **changed).load_state_dict(state)  # type: ignore[arg-type]


def test_a_state_of_other_rows_is_refused(store: ActivationStore, path: Path, tmp_path: Path) -> None:
    """Another store, and the same store before it was complete."""
    state = BatchStream(store, SITE, 8).state_dict()
    other = write_store(tmp_path / "other", StoreSpec(n_documents=10))
    partial = Path(shutil.copytree(path, tmp_path / "partial"))
    (partial / "commits/0001/sealed.json").unlink()
    (partial / "commits/0001/train/000003.json").unlink()
    for stream in (
        BatchStream(ActivationStore(other), SITE, 8),
        BatchStream(ActivationStore(partial, partial=True), SITE, 8),
    ):
        with pytest.raises(IdentityMismatch, match=r"the state was taken with (snapshot|chunks_per_round)"):
            stream.load_state_dict(state)


def test_a_stream_goes_on_where_it_was_though_the_store_has_grown(tmp_path: Path) -> None:
    path = write_store(tmp_path / "store", replace(SPEC, n_segments=1))
    stream = BatchStream(ActivationStore(path), SITE, 50)
    take_ids(stream, 7)
    state = stream.state_dict()
    write_store(path, SPEC)
    with pytest.raises(
        IdentityMismatch, match=r"the state was taken with snapshot .* open the same rows \(snapshot=\.\.\.\)"
    ):
        BatchStream(ActivationStore(path), SITE, 50).load_state_dict(state)
    resumed = BatchStream(ActivationStore(path, snapshot=state["snapshot"]), SITE, 50)
    resumed.load_state_dict(state)
    np.testing.assert_array_equal(take_ids(resumed, 40), take_ids(stream, 40))


def test_a_stream_of_epochs_is_resumed_and_ends_where_it_would_have(store: ActivationStore) -> None:
    whole = list(BatchStream(store, SITE, 300, epochs=2))
    stream = BatchStream(store, SITE, 300, epochs=2)
    take_ids(stream, 12)
    resumed = BatchStream(store, SITE, 300, epochs=2)
    resumed.load_state_dict(stream.state_dict())
    for found, expected in zip(resumed, whole[12:], strict=True):
        np.testing.assert_array_equal(found, expected)


# What is in a batch


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """The same rows in every encoding."""
    return ActivationStore(write_store(tmp_path_factory.mktemp("encoded") / "store", ENCODED))


ENCODED = replace(SPEC, sites=((SITE, "fp32"), ("a.0", "fp16"), ("b.0", "bf16"), ("c.0", "int8")))
EVERY_SITE = [site for site, _ in ENCODED.sites]


@pytest.mark.parametrize("site", EVERY_SITE)
@pytest.mark.parametrize("part", ["train", "heldout"])
def test_rows_are_those_that_the_reader_gives_in_every_encoding(encoded: ActivationStore, site: str, part: str) -> None:
    rows = rows_by_id(encoded, site, part)
    of_ids = BatchStream(encoded, SITE, 90, part=part, budget_bytes=5 * CHUNK_BYTES, epochs=1)
    of_site = BatchStream(encoded, site, 90, part=part, budget_bytes=5 * CHUNK_BYTES, epochs=1)
    for ids, batch in zip(of_ids, of_site, strict=True):
        assert batch.dtype == np.float32
        np.testing.assert_array_equal(batch, np.stack([rows[number] for number in ids[:, 0].astype(int).tolist()]))


def test_what_int8_rows_are_measured_by_is_read_once_for_each_segment(
    encoded: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though an epoch goes from one segment to another at every chunk, and readers have one segment's tables in memory."""
    n_read = 0

    def counted(*arguments: Any) -> Any:
        nonlocal n_read
        n_read += 1
        return read_table(*arguments)

    store = ActivationStore(encoded.url)
    monkeypatch.setattr(reader, "read_table", counted)
    for _ in BatchStream(store, "c.0", 50, epochs=2):
        pass
    assert n_read == len(store.segments) == 2


@pytest.mark.parametrize(("site", "dtype"), [(SITE, "float32"), ("a.0", "float16"), ("b.0", "uint16")])
def test_rows_as_kept_are_the_same_once_decoded(encoded: ActivationStore, site: str, dtype: str) -> None:
    kept = BatchStream(encoded, site, 90, epochs=2, as_kept=True)
    plain = BatchStream(encoded, site, 90, epochs=2)
    for batch, expected in zip(kept, plain, strict=True):
        assert batch.dtype == dtype
        np.testing.assert_array_equal(encoding_of(kept.array.encoding).decode(batch), expected)
    assert kept.state_dict() == plain.state_dict()


@pytest.mark.parametrize("site", EVERY_SITE)
@pytest.mark.parametrize("as_kept", [False, True])
@pytest.mark.parametrize("keeps", [lambda index: True, lambda index: index % 3 == 0, lambda index: index in (0, 9)])
def test_batches_that_the_caller_keeps_are_never_written_over(
    encoded: ActivationStore, site: str, as_kept: bool, keeps: Callable[[int], bool]
) -> None:
    if as_kept and encoded.manifest.array(f"acts/{site}").encoding == "int8":
        return
    stream = BatchStream(encoded, site, 20, budget_bytes=4 * CHUNK_BYTES, as_kept=as_kept)
    assert 150 * 20 // (stream.chunks_per_round * SPEC.chunk_rows) > 20, "the batches are of many rounds"
    kept = [(batch, batch.copy()) for index, batch in enumerate(islice(stream, 150)) if keeps(index)]
    for batch, then in kept:
        np.testing.assert_array_equal(batch, then)


def test_a_caller_may_write_into_its_batches(encoded: ActivationStore) -> None:
    for site in EVERY_SITE:
        for batch, expected in zip(*(BatchStream(encoded, site, 33, epochs=2) for _ in range(2)), strict=True):
            np.testing.assert_array_equal(batch, expected)
            batch[:] = np.nan


@pytest.mark.parametrize("site", EVERY_SITE)
@pytest.mark.parametrize("part", ["train", "heldout"])
def test_standardised_rows_have_the_training_rows_mean_and_deviation_taken_out(
    encoded: ActivationStore, site: str, part: str
) -> None:
    """Those of the rows as the model gave them, which the fp32 site has."""
    exact = np.stack(list(rows_by_id(encoded, SITE).values())).astype(np.float64)
    plain = np.concatenate(list(BatchStream(encoded, site, 90, part=part, epochs=1)))
    found = np.concatenate(list(BatchStream(encoded, site, 90, part=part, epochs=1, normalise="standardise")))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, (plain - exact.mean(axis=0)) / exact.std(axis=0), rtol=1e-4, atol=1e-4)
    if (site, part) == (SITE, "train"):
        np.testing.assert_allclose(found.mean(axis=0), 0, atol=1e-4)
        np.testing.assert_allclose(found.std(axis=0), 1, rtol=1e-4)


@pytest.mark.parametrize("site", EVERY_SITE)
def test_rows_of_mean_norm_have_the_square_root_of_their_width_as_mean_norm(encoded: ActivationStore, site: str) -> None:
    exact = np.stack(list(rows_by_id(encoded, SITE).values())).astype(np.float64)
    factor = np.sqrt(SPEC.d_model) / np.linalg.norm(exact, axis=1).mean()
    plain = np.concatenate(list(BatchStream(encoded, site, 90, epochs=1)))
    found = np.concatenate(list(BatchStream(encoded, site, 90, epochs=1, normalise="mean_norm")))
    np.testing.assert_allclose(found, plain * factor, rtol=1e-5)
    if site == SITE:
        np.testing.assert_allclose(np.linalg.norm(found, axis=1).mean(), np.sqrt(SPEC.d_model), rtol=1e-5)


def test_a_channel_that_does_not_vary_is_left_at_zero_and_not_divided_by_it(
    encoded: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    constant = SiteStatistics(10, np.array([3.0, 1.0]), np.array([9.0, 5.0]), 4.0)
    monkeypatch.setattr(ActivationStore, "statistics", lambda *_: constant)
    scaling = Scaling.recorded(encoded, SITE, "standardise")
    assert scaling is not None
    assert (scaling.shift.tolist(), scaling.factor.tolist()) == ([3, 1], [1, 0.5])


@pytest.mark.parametrize(
    ("site", "options", "message"),
    [
        (SITE, {"batch_rows": 0}, "batch rows 0, rank 0 of 1: at least 1"),
        (SITE, {"rank": 2, "n_ranks": 2}, "rank 2 of 2: at least 1, and a rank below their number"),
        (SITE, {"rank": -1}, "rank -1 of 1"),
        (SITE, {"n_ranks": 10_000}, "train chunks for 10000 ranks; use fewer, or collect more"),
        (SITE, {"normalise": "whiten"}, "normalise 'whiten': choose from none, standardise, mean_norm"),
        (SITE, {"normalise": "mean_norm", "as_kept": True}, "as_kept: int8 rows and normalised ones are computed"),
        ("c.0", {"as_kept": True}, "as_kept: int8 rows and normalised ones are computed"),
        ("nowhere.0", {}, r"no array acts/nowhere\.0 here"),
    ],
)
def test_what_a_stream_cannot_give_is_refused(
    encoded: ActivationStore, site: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        BatchStream(encoded, site, **{"batch_rows": 8, **options})


# Memory, threads, damage


def test_a_round_holds_what_the_budget_allows_and_one_chunk_of_each_shard_at_most(store: ActivationStore) -> None:
    for budget, chunks in [(0, 1), (CHUNK_BYTES, 1), (5 * CHUNK_BYTES - 1, 4), (2**40, len(store.shards()))]:
        assert BatchStream(store, SITE, 8, budget_bytes=budget).chunks_per_round == chunks


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """Rows of 2 KiB, so that what is not rows is little; ten rounds and more of half a MiB."""
    spec = StoreSpec(n_documents=70, document_tokens=60, shard_rows=256, chunk_rows=32, d_model=512, sites=ENCODED.sites)
    store = ActivationStore(write_store(tmp_path_factory.mktemp("wide") / "store", spec))
    assert store.n_rows() * spec.d_model * 4 > 10 * WIDE_BUDGET
    return store


WIDE_BUDGET = 1 << 19


class Memory:
    """What is allocated, from when this was made."""

    def __init__(self) -> None:
        tracemalloc.start()

    @property
    def now(self) -> int:
        return tracemalloc.get_traced_memory()[0]

    @property
    def peak(self) -> int:
        return tracemalloc.get_traced_memory()[1]


@pytest.fixture
def memory() -> Iterator[Memory]:
    yield Memory()
    tracemalloc.stop()


@pytest.mark.parametrize("site", EVERY_SITE)
@pytest.mark.parametrize("batch_rows", [20, 1000])
@pytest.mark.parametrize("options", [{}, {"normalise": "standardise"}, {"as_kept": True}])
def test_memory_stays_within_what_is_stated_and_the_batch_that_is_kept(
    wide: ActivationStore, site: str, batch_rows: int, options: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    if options.get("as_kept") and site == "c.0":
        return
    for _ in BatchStream(wide, site, batch_rows, budget_bytes=WIDE_BUDGET, epochs=1):
        pass  # what the store remembers of its shards is not the stream's
    stream = BatchStream(wide, site, batch_rows, budget_bytes=WIDE_BUDGET, epochs=2, **options)
    assert stream.chunks_per_round == 8
    kept_bytes = batch_rows * stream.d_model * 4
    memory: Memory = request.getfixturevalue("memory")  # from now on
    for _ in stream:
        pass
    pool_bytes = (
        stream.chunks_per_round * 32 * stream.d_model * (4 if site == "c.0" else np.dtype(stream.array.dtype).itemsize)
    )
    assert 2 * pool_bytes < memory.peak < stream.memory_bytes + kept_bytes + (1 << 18)


def test_memory_that_a_caller_has_let_go_of_is_not_kept(wide: ActivationStore, memory: Memory) -> None:
    """After many rounds were pinned at once, those that follow take no more than before."""
    stream = BatchStream(wide, SITE, 20, budget_bytes=WIDE_BUDGET)
    with closing(iter(stream)) as batches:  # type: ignore[type-var]
        kept = list(islice(batches, stream.n_rows // 20))
        assert memory.now > 10 * WIDE_BUDGET
        del kept
        for _ in islice(batches, 100):
            pass
        assert memory.now < stream.memory_bytes


def test_memory_of_batches_is_used_again_once_nobody_looks_at_it(wide: ActivationStore) -> None:
    """Be it that the caller keeps none or two at a time; views count as looks."""
    for n_kept in (1, 2):
        kept: list[np.ndarray] = []
        places = set()
        for batch in islice(BatchStream(wide, "a.0", 50, budget_bytes=WIDE_BUDGET, as_kept=True), 60):
            kept = [*kept, batch[10:].T][-n_kept:]
            places.add(batch.ctypes.data)
            del batch
        assert len(places) <= n_kept + 1


def n_open_files(folder: Path) -> int:
    """Files below a folder that this process has open; those that other threads open elsewhere do not matter."""
    n_open = 0
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            n_open += link.readlink().is_relative_to(folder)
    return n_open


def stream_over_many_shards(path: Path, n_shards: int, request: pytest.FixtureRequest) -> tuple[int, int, int, int]:
    """Write a store of tiny shards and stream it: shards, open files at most, bytes at most, bytes stated."""
    spec = StoreSpec(n_documents=n_shards // 8, document_tokens=40, shard_rows=4, chunk_rows=2, sites=((SITE, "fp32"),))
    store = ActivationStore(write_store(path / "store", spec))
    stream = BatchStream(store, SITE, 64, budget_bytes=64 * 2 * spec.d_model * 4, epochs=1)
    assert stream.chunks_per_round == 64
    memory: Memory = request.getfixturevalue("memory")
    ids, n_open = [], 0
    for batch in stream:
        ids.append(batch[:, 0].astype(int))
        n_open = max(n_open, n_open_files(path))
    peak = memory.peak
    assert sorted(np.concatenate(ids).tolist()) == sorted(rows_by_id(store, SITE))
    return len(store.shards()), n_open, peak, stream.memory_bytes


def assert_bounded(found: tuple[int, int, int, int]) -> None:
    n_shards, n_open, peak, stated = found
    assert n_open <= 4, "one for each thread that reads"
    assert peak < stated + (1 << 20) + 6_000 * n_shards, "a few KB for each shard: where its objects and chunks are"


def test_hundreds_of_shards_take_no_more_open_files_than_one(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    found = stream_over_many_shards(tmp_path, 240, request)
    assert found[0] > 200
    assert_bounded(found)


@pytest.mark.slow
def test_thousands_of_shards_take_no_more_open_files_than_one(
    tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    found = stream_over_many_shards(tmp_path, 2200, request)
    with capsys.disabled():
        print("\n{:,} shards: {} open files at most, {:,} bytes at most, {:,} stated".format(*found), end="")
        print(f"; {(found[2] - found[3]) / found[0]:,.0f} bytes a shard beyond it")
    assert found[0] > 2000
    assert_bounded(found)


def stream_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("actstore-stream")]


def test_a_closed_iterator_leaves_no_thread_behind(store: ActivationStore) -> None:
    batches = iter(BatchStream(store, SITE, 10))
    next(batches)
    assert stream_threads()
    batches.close()  # type: ignore[attr-defined]
    assert not stream_threads()


def test_leaving_the_loop_leaves_no_thread_behind(store: ActivationStore) -> None:
    for _ in BatchStream(store, SITE, 10):
        break
    gc.collect()
    assert not stream_threads()


def test_damage_is_raised_where_batches_are_read(path: Path, tmp_path: Path) -> None:
    shutil.copytree(path, tmp_path / "store")
    damaged = tmp_path / "store/data.zarr/segments/0000/train/acts" / SITE / "c/1/0"
    data = bytearray(damaged.read_bytes())
    data[7] ^= 1
    damaged.write_bytes(data)
    stream = BatchStream(ActivationStore(tmp_path / "store"), SITE, 10)
    with pytest.raises(DamagedStore, match=f"{SITE}/c/1/0"):
        take_ids(stream, stream.n_rows)
    assert not stream_threads()
