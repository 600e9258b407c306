"""Workers that each compute whole shards write the very store that one process writes, whatever happens to them."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from commandkit import Command
from daskkit import address_of, dask_process, until, worker_processes
from modelkit import faults_in, folder_state, plant, records_of, run_cli
from storekit import files_of

from actstore.errors import IdentityMismatch, InputError
from actstore.reader import ActivationStore
from cli import cli
from pipelines.collect import fill
from pipelines.collect.collection import Collection
from pipelines.collect.config import CollectConfig
from pipelines.collect.stage import collect
from pipelines.shared.cluster import connect, run_tasks

pytestmark = pytest.mark.processes


@dataclass(frozen=True)
class Cluster:
    """A `dask scheduler` and two `dask worker`s, each in a process of its own."""

    address: str
    nannies: list[int]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    from distributed import Client

    folder = tmp_path_factory.mktemp("cluster")
    with ExitStack() as stack:
        stack.enter_context(dask_process("scheduler", "--port", "0", "--host", "127.0.0.1", folder=folder))
        address = address_of(folder)
        workers = [stack.enter_context(dask_process("worker", "--nthreads", n, folder=folder)) for n in ("1", "2")]
        with Client(address) as waiting:
            waiting.wait_for_workers(2, timeout=60)
        yield Cluster(address, [worker.process.pid for worker in workers])


@pytest.fixture(autouse=True)
def _no_memory_of_other_tests() -> Iterator[None]:
    """What a worker that is a thread of this process keeps of a store."""
    yield
    fill._opened.cache_clear()
    fill._collection.cache_clear()


@pytest.fixture(scope="module")
def slow_config(small_config: CollectConfig) -> CollectConfig:
    """Seconds of work: many forward passes, each over little."""
    return replace(small_config, tokens=5000, context=8, batch_windows=1)


@pytest.fixture(scope="module")
def slow_store(tmp_path_factory: pytest.TempPathFactory, slow_config: CollectConfig) -> Path:
    """The store that `slow_config` describes, by one process. Read-only."""
    out = tmp_path_factory.mktemp("slow") / "store"
    collect(replace(slow_config, out=out))
    return out


# The same store


def test_a_worker_of_several_threads_writes_the_same_store(
    small_store: Path, small_config: CollectConfig, tmp_path: Path
) -> None:
    """A model's hooks see the forward passes of every thread of their process."""
    from distributed import Client

    config = replace(small_config, out=tmp_path / "store", batch_windows=2)
    collect(replace(config, out=tmp_path / "alone"))
    with Client(processes=False, n_workers=1, threads_per_worker=3, dashboard_address=":0") as client:
        collect(replace(config, scheduler=client.scheduler.address))
    assert files_of(tmp_path / "store") == files_of(tmp_path / "alone")


@pytest.mark.cluster
@pytest.mark.parametrize("encoding", ["fp32", "int8"])
def test_a_scheduler_and_workers_of_their_own_write_the_same_store(
    encoding: str,
    small_config: CollectConfig,
    cluster: Cluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Store and model are named by relative paths that mean nothing in the folder the workers run in."""
    (tmp_path / "model").symlink_to(small_config.model)
    monkeypatch.chdir(tmp_path)
    config = replace(small_config, model="model", encoding=encoding, layer=(0, 2))
    collect(replace(config, out="alone"))
    for n_tokens in (700, 1500):
        collect(replace(config, out="grown-alone", tokens=n_tokens))
    result = collect(replace(config, out="store", scheduler=cluster.address))
    assert result["shards"] > 8
    assert files_of(tmp_path / "store") == files_of(tmp_path / "alone")
    for n_tokens in (700, 1500):
        collect(replace(config, out="grown", tokens=n_tokens, scheduler=cluster.address))
    assert files_of(tmp_path / "grown") == files_of(tmp_path / "grown-alone")


@pytest.mark.cluster
def test_local_worker_processes_write_the_same_store(small_store: Path, small_config: CollectConfig, tmp_path: Path) -> None:
    collect(replace(small_config, out=tmp_path / "store", workers=2))
    assert files_of(tmp_path / "store") == files_of(small_store)


# Hardware


def test_a_worker_that_computes_other_bits_refuses_unless_accepted(
    own_store: Path, small_config: CollectConfig, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (own_store / "commits/0000/sealed.json").unlink()
    (own_store / "commits/0000/train/000002.json").unlink()
    (own_store / "commits/0000/heldout/000000.json").unlink()
    before = folder_state(own_store)
    monkeypatch.setattr(Collection, "probe", lambda collection, windows: "00000000")
    config = replace(small_config, out=own_store, scheduler=client.scheduler.address)
    with pytest.raises(IdentityMismatch, match=r"here it is 00000000; .*--mixed-hardware"):
        collect(config)
    assert folder_state(own_store) == before
    collect(replace(config, mixed_hardware=True))
    assert faults_in(own_store) == []
    store = ActivationStore(own_store)
    environment = json.loads((own_store / "commits/0000/mixed-00000000.json").read_text())
    assert environment["probe_crc32c"] == "00000000"
    assert environment.items() >= {"batch_windows": 32, "device": "cpu"}.items()
    assert environment["cpu"] == store.segments[0].environment["cpu"]
    probes = {
        (shard.part, shard.index): store.notes(shard)["probe_crc32c"]
        for p in ("train", "heldout")
        for shard in store.shards(p)
    }
    assert {shard for shard, probe in probes.items() if probe == "00000000"} == {("train", 2), ("heldout", 0)}
    assert len(set(probes.values())) == 2


def test_a_worker_that_sees_another_model_refuses(
    own_store: Path, small_config: CollectConfig, client: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As where the same path holds other weights on another machine."""
    (own_store / "commits/0000/sealed.json").unlink()
    (own_store / "commits/0000/train/000002.json").unlink()
    before = folder_state(own_store)
    plant(Path(small_config.model), tmp_path / "other", "transformer.h.0.ln_1.bias", 0, 1.0)
    monkeypatch.setattr(fill, "absolute", lambda path: str(tmp_path / "other") if path == small_config.model else str(path))
    with pytest.raises(IdentityMismatch, match=r"has weights \w{12} here, the store comes from \w{12}; show every worker"):
        collect(replace(small_config, out=own_store, scheduler=client.scheduler.address))
    assert folder_state(own_store) == before


def test_a_worker_that_sees_another_disk_refuses(
    own_store: Path,
    small_store: Path,
    small_config: CollectConfig,
    client: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    (own_store / "commits/0000/sealed.json").unlink()
    (own_store / "commits/0000/train/000002.json").unlink()
    other = tmp_path / "elsewhere"
    collect(replace(small_config, out=other, tokens=500))
    monkeypatch.setattr(fill, "absolute", lambda path: str(other) if path == own_store else str(path))
    with pytest.raises(InputError, match="is another store on this worker; show every worker the same disk"):
        collect(replace(small_config, out=own_store, scheduler=client.scheduler.address))


# What goes wrong on a worker


def test_a_value_that_does_not_fit_on_a_worker_is_the_commands_one_line(
    small_config: CollectConfig, client: Any, tmp_path: Path
) -> None:
    token = plant(Path(small_config.model), tmp_path / "model", "transformer.wte.weight", " owl", 1e5)
    arguments = ["--model", tmp_path / "model", "--corpus", small_config.corpus, "--layer", 0, "--tokens", 1500]
    arguments += ["--context", 32, "--site", "resid_pre", "--scheduler", client.scheduler.address]
    result = CliRunner().invoke(cli, ["collect", "--out", str(tmp_path / "store"), *map(str, arguments)])
    assert result.exit_code == 1
    assert_names_the_value(result.stderr.splitlines()[-1], tmp_path / "store", token)


def test_a_command_that_has_lost_all_its_workers_ends_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dask gives up a worker that dies while it starts: with the last one gone, tasks would wait for ever."""
    monkeypatch.setattr("pipelines.shared.cluster.NO_WORKERS_S", 1)

    def lose_all() -> None:
        with connect(None, 1) as client:
            client.sync(client.cluster.workers[0].close)
            run_tasks(client, "tasks", abs, [(-1,), (-2,)])

    with pytest.raises(InputError, match=r"workers: none was left for 1 s.* run the same command again"):
        lose_all()


@pytest.mark.slow
def test_a_value_that_does_not_fit_is_all_that_worker_processes_say(small_config: CollectConfig, tmp_path: Path) -> None:
    token = plant(Path(small_config.model), tmp_path / "model", "transformer.wte.weight", " owl", 1e5)
    arguments = ["--model", tmp_path / "model", "--corpus", small_config.corpus, "--layer", 0, "--tokens", 1500]
    result = run_cli(
        "collect", "--out", tmp_path / "store", *arguments, "--context", 32, "--site", "resid_pre", "--workers", 2
    )
    assert (result.returncode, result.stdout) == (1, "")
    *before, line = result.stderr.splitlines()
    assert all(said.startswith(("collect: ", "dashboard: ")) for said in before), result.stderr
    assert_names_the_value(line, tmp_path / "store", token)
    assert not list((tmp_path / "store").rglob(".*.tmp"))


def assert_names_the_value(line: str, path: Path, token: int) -> None:
    """Site, document, position and value; and that the token there is the one with the large value."""
    store = ActivationStore(path, partial=True)
    found = re.fullmatch(
        r"error: resid_pre\.0: (\S+), token (\d+) of the segment's table, position (\d+) of its window: value (\S+) in "
        r"channel 5 does not fit fp16; bf16 keeps up to 3.39e38, fp32 any finite value\.",
        line,
    )
    assert found, line
    index = int(found[2])
    assert store.table(0, "tokens/ids")[index] == token
    document = np.searchsorted(store.table(0, "documents/offsets"), index, side="right") - 1
    assert store.document_names(0)[document] == found[1]
    assert float(found[4]) == pytest.approx(1e5, rel=1e-3)


@pytest.mark.cluster
def test_workers_that_outlive_a_killed_command_do_no_harm(
    slow_store: Path, slow_config: CollectConfig, cluster: Cluster, tmp_path: Path
) -> None:
    """The next command begins while they still compute shards for the first."""
    out = tmp_path / "store"
    options = ["--model", slow_config.model, "--corpus", slow_config.corpus, "--layer", "0", "--tokens", "5000"]
    options += ["--context", "8", "--batch-windows", "1", "--encoding", "fp32", "--scheduler", cluster.address]
    first = Command.forked(tmp_path, "collect", "--out", out, *options)
    until(lambda: len(records_of(out)) >= 2 or None)
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    kept = records_of(out)
    assert 2 <= len(kept) < len(records_of(slow_store))
    collect(replace(slow_config, out=out))
    assert records_of(out).items() >= kept.items()
    assert files_of(out) == files_of(slow_store)


def test_what_a_killed_worker_left_half_written_is_cleared_away(
    small_store: Path, small_config: CollectConfig, client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_tasks = fill.run_tasks

    def with_a_death(*arguments: Any) -> None:
        run_tasks(*arguments)
        (tmp_path / "store/data.zarr/segments/0000/train/acts/resid_post.0/c/3/.0.0a1b2c3d.tmp").write_bytes(b"half")

    monkeypatch.setattr(fill, "run_tasks", with_a_death)
    collect(replace(small_config, out=tmp_path / "store", scheduler=client.scheduler.address))
    assert files_of(tmp_path / "store") == files_of(small_store)


@pytest.mark.cluster
def test_a_worker_killed_in_the_midst_changes_nothing(
    slow_store: Path, slow_config: CollectConfig, cluster: Cluster, tmp_path: Path
) -> None:
    out, seen = tmp_path / "store", []

    def kill_one() -> None:
        until(lambda: records_of(out) or None)
        time.sleep(random.Random(0).uniform(0, 0.1))
        for worker in worker_processes(cluster.nannies[0]):
            seen.append(len(records_of(out)))
            worker.kill()

    killer = threading.Thread(target=kill_one)
    killer.start()
    collect(replace(slow_config, out=out, scheduler=cluster.address))
    killer.join()
    assert len(seen) == 1
    assert seen[0] < len(records_of(slow_store))
    assert files_of(out) == files_of(slow_store)
