"""A store as a PyTorch data set: every row once an epoch, whatever the number of workers and ranks."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from storekit import StoreSpec, write_store
from torch.utils.data import DataLoader

from actstore.errors import InputError
from actstore.reader import ActivationStore
from actstore.stream import BatchStream
from pipelines.torch_stream import ActivationDataset

EXACT, ROUNDED, INT8 = "resid_post.0", "resid_post.1", "resid_post.2"
SPEC = StoreSpec(n_documents=120, sites=((EXACT, "fp32"), (ROUNDED, "bf16"), (INT8, "int8")))
PROCESSES = multiprocessing.get_context("spawn")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("torch") / "store", SPEC)


@pytest.fixture(scope="module")
def all_ids(path: Path) -> list[int]:
    store = ActivationStore(path)
    return sorted(int(i) for shard in store.shards() for i in store.read(shard, f"acts/{EXACT}")[:, 0])


def ids(batches: list[torch.Tensor]) -> list[int]:
    return [int(i) for batch in batches for i in batch[:, 0]]


@pytest.mark.parametrize("n_workers", [0, 1, 2])
def test_the_workers_of_a_loader_give_each_row_once_an_epoch(path: Path, all_ids: list[int], n_workers: int) -> None:
    dataset = ActivationDataset(path, EXACT, 100, epochs=1, budget_bytes=30_000)
    assert sorted(ids(list(DataLoader(dataset, batch_size=None, num_workers=n_workers)))) == all_ids


def test_ranks_with_workers_share_every_epoch_without_overlap(path: Path, all_ids: list[int]) -> None:
    found = []
    for rank in range(2):
        dataset = ActivationDataset(path, EXACT, 100, epochs=1, rank=rank, n_ranks=2)
        found += ids(list(DataLoader(dataset, batch_size=None, num_workers=2)))
    assert sorted(found) == all_ids


def report_rank(rank: int, address: str, path: Path, folder: Path) -> None:
    """One process of a gloo group: stream this rank's share and write its row ids."""
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    dataset = ActivationDataset(path, EXACT, 100, epochs=1)
    np.save(folder / f"{rank}.npy", ids(list(dataset)))
    torch.distributed.destroy_process_group()


def test_ranks_are_those_of_the_process_group(path: Path, all_ids: list[int], tmp_path: Path) -> None:
    address = f"file://{tmp_path}/rendezvous"
    group = [PROCESSES.Process(target=report_rank, args=(rank, address, path, tmp_path)) for rank in range(2)]
    for process in group:
        process.start()
    for process in group:
        process.join(120)
        assert process.exitcode == 0
    shares = [np.load(tmp_path / f"{rank}.npy") for rank in range(2)]
    assert sorted(np.concatenate(shares)) == all_ids
    assert min(map(len, shares)) > 0.4 * len(all_ids)


@pytest.mark.parametrize("n_workers", [0, 2])
@pytest.mark.parametrize("given", [1, 6, 11])
def test_a_run_continued_from_its_number_of_batches_gets_the_same_bits(path: Path, given: int, n_workers: int) -> None:
    def first(n: int, start: int) -> list[torch.Tensor]:
        dataset = ActivationDataset(path, EXACT, 64, budget_bytes=20_000, start_batch=start)
        loader = iter(DataLoader(dataset, batch_size=None, num_workers=n_workers))
        return [next(loader) for _ in range(n)]

    assert all(torch.equal(a, b) for a, b in zip(first(20, 0)[given:], first(20 - given, given), strict=True))


def test_one_process_gives_what_the_stream_gives(path: Path) -> None:
    store = ActivationStore(path)
    for site, dtype in ((EXACT, torch.float32), (ROUNDED, torch.float32), (INT8, torch.float32)):
        tensors = list(ActivationDataset(store, site, 128, epochs=1, dtype=dtype))
        arrays = list(BatchStream(store, site, 128, epochs=1))
        assert all(np.array_equal(a.numpy(), b) for a, b in zip(tensors, arrays, strict=True))


def test_rows_as_they_are_kept_are_bfloat16_without_a_change_of_bits(path: Path) -> None:
    store = ActivationStore(path)
    kept = next(iter(ActivationDataset(store, ROUNDED, 128, dtype=None)))
    assert kept.dtype == torch.bfloat16
    assert torch.equal(kept.float(), next(iter(ActivationDataset(store, ROUNDED, 128))))


def test_normalised_rows_are_those_of_the_stream(path: Path) -> None:
    store = ActivationStore(path)
    found = next(iter(ActivationDataset(store, EXACT, 128, normalise="standardise")))
    assert np.array_equal(found.numpy(), next(iter(BatchStream(store, EXACT, 128, normalise="standardise"))))


@pytest.mark.parametrize(
    "wrong", [{"dtype": torch.int64}, {"start_batch": -1}, {"rank": 0}, {"dtype": None, "normalise": "mean_norm"}]
)
def test_options_that_make_no_sense_are_refused(path: Path, wrong: dict[str, object]) -> None:
    with pytest.raises(InputError):
        ActivationDataset(path, EXACT, 128, **wrong)  # type: ignore[arg-type]


def test_a_store_that_has_grown_is_continued_at_its_snapshot(tmp_path: Path) -> None:
    path = write_store(tmp_path / "store", SPEC)
    dataset = ActivationDataset(path, EXACT, 100, epochs=1)
    before = [batch.clone() for batch in dataset]
    write_store(path, StoreSpec(**{**vars(SPEC), "n_segments": 2}))
    again = ActivationDataset(path, EXACT, 100, epochs=1, snapshot=dataset.snapshot)
    assert all(torch.equal(a, b) for a, b in zip(before, again, strict=True))
