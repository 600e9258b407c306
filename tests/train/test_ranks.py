"""Two processes that train one SAE together take the steps of one process on the rows of both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from modelkit import ROOT, run_cli
from storekit import StoreSpec, write_store

from actstore.reader import ActivationStore
from actstore.stream import BatchStream
from pipelines.sae.checkpoint import load_run
from pipelines.train.config import TrainConfig
from pipelines.train.log import METRICS
from pipelines.train.new_trainee import Samples, new_trainee
from pipelines.train.ranks import Ranks
from pipelines.train.saved_state import load_state
from pipelines.train.trainee import Trainee

pytestmark = pytest.mark.processes

SITE, BATCH, N_STEPS = "resid_post.0", 256, 20
SPEC = StoreSpec(n_documents=200, sites=((SITE, "fp32"),), d_model=16, shard_rows=512, chunk_rows=64)
WITHOUT_CUDA = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
STEPS = """
import sys, torch
from actstore.reader import ActivationStore
from actstore.stream import BatchStream
from pipelines.train.ranks import ranks_of_environment
from tests.train.test_ranks import BATCH, N_STEPS, SITE, config_of, first_steps
from pipelines.train.new_trainee import Samples, new_trainee

store, out = sys.argv[1:]
with ranks_of_environment("cpu") as ranks:
    opened = ActivationStore(store)
    trainee = new_trainee(config_of(store), SITE, opened, N_STEPS, "cpu", ranks, Samples(), fresh=True)
    stream = iter(BatchStream(opened, SITE, BATCH // 2, rank=ranks.rank, n_ranks=ranks.n_ranks))
    found = first_steps(trainee, [torch.from_numpy(next(stream).copy()) for _ in range(N_STEPS)])
    torch.save(found, f"{out}.{ranks.rank}")
"""
"""What each rank runs."""
STOPPED = """
import os, signal, sys
from pipelines.train.trainee import Trainee

step = Trainee.step
def stopping(self, rows, global_rows=None):
    if self.n_steps == 29 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return step(self, rows, global_rows)
Trainee.step = stopping

from actstore.__main__ import main
main()
"""
"""The command, which one of the ranks is asked to stop in its thirtieth step."""


def config_of(store: object) -> TrainConfig:
    return TrainConfig(
        store=str(store), out=Path("unused"), features=64, k=4, batch=BATCH, lr=1e-3, kernel="sparse-fp32", auxk=0.0
    )


def first_steps(trainee: Trainee, batches: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The gradients of the first step, and the loss of each."""
    found, losses = {}, []
    for rows in batches:
        losses.append(trainee.step(rows)[1].total.detach())
        if len(losses) == 1:
            found = {name: p.grad.clone() for name, p in trainee.sae.named_parameters() if p.grad is not None}
    return {**found, "losses": torch.stack(losses)}


@pytest.fixture(scope="module")
def rows_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("rows") / "store", SPEC)


def torchrun(n: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}", *map(str, arguments)]
    environment = {**os.environ, **WITHOUT_CUDA, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'kits'}"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)


def batches_of_both(store: Path) -> list[torch.Tensor]:
    """What two ranks read, step by step, put together."""
    streams = [iter(BatchStream(ActivationStore(store), SITE, BATCH // 2, rank=rank, n_ranks=2, seed=0)) for rank in (0, 1)]
    return [torch.cat([torch.from_numpy(next(stream).copy()) for stream in streams]) for _ in range(N_STEPS)]


def test_two_ranks_take_the_steps_of_one_process_on_the_rows_of_both(rows_store: Path, tmp_path: Path) -> None:
    (tmp_path / "steps.py").write_text(STEPS)
    done = torchrun(2, tmp_path / "steps.py", rows_store, tmp_path / "found")
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"found.{rank}") for rank in (0, 1))
    alone = new_trainee(
        config_of(rows_store), SITE, ActivationStore(rows_store), N_STEPS, "cpu", Ranks(), Samples(), fresh=True
    )
    expected = first_steps(alone, batches_of_both(rows_store))
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        assert torch.equal(first[name], second[name]), name
        assert float((first[name] - expected[name]).abs().max()) <= 1e-5 * float(expected[name].abs().max()), name
    both = (first["losses"] + second["losses"]) / 2
    torch.testing.assert_close(both, expected["losses"], rtol=1e-3, atol=0)
    assert both[-1] < 0.9 * both[0]


def test_a_training_of_two_ranks_is_one_run_and_may_be_resumed_by_one(rows_store: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    asked = ["train", rows_store, "--out", out, "--features", 64, "--k", 4, "--batch", BATCH, "--device", "cpu"]
    asked += ["--tokens", 60 * BATCH]
    stopper = tmp_path / "stopped_after_30_steps.py"
    stopper.write_text(STOPPED)
    assert torchrun(2, stopper, *asked).returncode != 0
    saved = load_state(out)
    assert saved is not None
    assert (saved.facts.rows_seen, saved.facts.history) == (30 * BATCH, [[0, 2]])
    assert run_cli(*asked, "--resume").returncode == 0
    sae, record = load_run(out)
    assert (record.rows_seen, record.history) == (60 * BATCH, [[0, 2], [30 * BATCH, 1]])
    assert [json.loads(line)["rows"] for line in (out / METRICS).read_text().splitlines()] == [6400, 12800, 15360]
    assert record.metrics["fve"] > 0
    assert sae.n_features == 64
