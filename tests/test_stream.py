"""What the stream promises: every row once an epoch, a new order each time, bounded memory, resume to the bit."""

from __future__ import annotations

import gc
import shutil
import threading
import tracemalloc
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from storekit import CONTEXT, StoreSpec, write_store

from actstore.errors import DamagedStore, IdentityMismatch, InputError
from actstore.reader import ActivationStore
from actstore.stream import BatchStream

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
        self.read_chunk = cache(super().read_chunk)  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def store(path: Path) -> ActivationStore:
    return CachedStore(path)


@pytest.fixture(scope="module")
def reopened(path: Path) -> ActivationStore:
    return CachedStore(path)


@pytest.fixture(scope="module")
def all_ids(store: ActivationStore) -> list[int]:
    return sorted(np.concatenate([store.read(shard, f"acts/{SITE}")[:, 0] for shard in store.shards()]).astype(int).tolist())


def take_ids(stream: BatchStream, n_batches: int) -> np.ndarray:
    """Channel 0 of the next batches: which rows they are."""
    return np.concatenate([batch[:, 0] for batch in islice(stream, n_batches)]).astype(np.int64)


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
    assert 0.8 < np.var(means) / expected < 1.2


# Resume


@settings(max_examples=25, deadline=None)
@given(before=st.integers(0, 60), batch_rows=st.integers(1, 700), round_chunks=st.integers(1, 30))
def test_a_resumed_stream_gives_the_same_bits(
    store: ActivationStore, reopened: ActivationStore, before: int, batch_rows: int, round_chunks: int
) -> None:
    budget = round_chunks * CHUNK_BYTES
    stream = BatchStream(store, "resid_post.1", batch_rows, budget_bytes=budget)
    batches = iter(stream)
    for _ in range(before):
        next(batches)
    state = stream.state_dict()
    resumed = BatchStream(reopened, "resid_post.1", batch_rows, budget_bytes=budget)
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
    [({"seed": 1}, "seed"), ({"budget_bytes": CHUNK_BYTES}, "chunks_per_round"), ({"part": "heldout"}, "part")],
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


# Memory, threads, damage


def test_a_round_holds_what_the_budget_allows_and_one_chunk_of_each_shard_at_most(store: ActivationStore) -> None:
    for budget, chunks in [(0, 1), (CHUNK_BYTES, 1), (5 * CHUNK_BYTES - 1, 4), (2**40, len(store.shards()))]:
        assert BatchStream(store, SITE, 8, budget_bytes=budget).chunks_per_round == chunks


def test_memory_stays_within_about_two_rounds(tmp_path: Path) -> None:
    spec = StoreSpec(n_documents=40, document_tokens=80, shard_rows=256, chunk_rows=32, d_model=1024)
    spec = replace(spec, sites=((SITE, "fp32"),))
    store = ActivationStore(write_store(tmp_path / "store", spec))
    stream = BatchStream(store, SITE, 20, budget_bytes=1 << 20)
    round_bytes = stream.chunks_per_round * spec.chunk_rows * spec.d_model * 4
    assert round_bytes == 1 << 20
    batches = iter(stream)
    next(batches)
    tracemalloc.start()
    for _ in islice(batches, store.n_rows() // 20):
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    in_flight = 8 * spec.chunk_rows + 3 * stream.batch_rows
    assert peak < 2 * round_bytes + in_flight * spec.d_model * 4
    assert store.n_rows() * spec.d_model * 4 > 10 * round_bytes


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
