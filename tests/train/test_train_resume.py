"""A training that is killed or stopped is continued to the same bits, and nothing else is taken for it."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commandkit import Command
from daskkit import until
from storekit import StoreSpec, write_store

from actstore.errors import DamagedStore, IdentityMismatch, InputError, OutputExists
from actstore.reader import ActivationStore
from pipelines.sae.checkpoint import RECORD, WEIGHTS, load_run
from pipelines.train import session
from pipelines.train.config import TrainConfig
from pipelines.train.log import METRICS
from pipelines.train.saved_state import STATE, load_state
from pipelines.train.stage import train

pytestmark = pytest.mark.processes

SPEC = StoreSpec(n_documents=200, sites=(("resid_post.0", "fp16"),), d_model=16, shard_rows=512, chunk_rows=64)
SHAPE = {"features": 1024, "k": 4, "batch": 256, "tokens": 256 * 150, "lr": 0.003}
ALWAYS = 1e-9
"""Minutes between states: a state after each step."""


@pytest.fixture(scope="module")
def rows_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("rows") / "store", SPEC)


@pytest.fixture
def config(rows_store: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(store=rows_store, out=tmp_path / "run", device="cpu", **SHAPE)  # type: ignore[arg-type]


class Interrupted(Exception):
    pass


def interrupt_after(config: TrainConfig, n_states: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, and be cut off right after a state was saved."""
    left = [n_states]
    save = session.save_state

    def counted(*arguments: Any) -> None:
        save(*arguments)
        left[0] -= 1
        if not left[0]:
            raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(session, "save_state", counted)
        with pytest.raises(Interrupted):
            train(replace(config, checkpoint_minutes=ALWAYS))


def options(store: Path, out: Path, *more: object) -> list[object]:
    shape = [f"--{name}={value}" for name, value in SHAPE.items()]
    return ["train", store, "--out", out, *shape, "--device", "cpu", "--checkpoint-minutes", ALWAYS, *more]


def results(run: Path) -> dict[str, bytes]:
    return {name: (run / name).read_bytes() for name in (WEIGHTS, METRICS, RECORD)}


def until_kill(command: Command, out: Path, moments: random.Random) -> bool:
    """Kill a training somewhere after its first saved state of this start; False when it ended before."""
    before = (out / STATE).stat().st_mtime_ns if (out / STATE).exists() else 0
    path = out / STATE
    until(lambda: command.has_ended or (path.exists() and path.stat().st_mtime_ns > before) or None)
    time.sleep(moments.uniform(0, 0.25))
    if command.has_ended:
        return False
    os.kill(command.pid, signal.SIGKILL)
    return command.join() == -signal.SIGKILL


def kill_and_resume(store: Path, folder: Path, n_kills: int, moments: random.Random) -> int:
    """Kills of one training; how many there were before it ended. Compares the end with an undisturbed run."""
    assert Command.forked(folder, *options(store, folder / "undisturbed")).join() == 0
    out, n_killed = folder / "run", 0
    while n_killed < n_kills:
        more = ["--resume"] if (out / STATE).exists() else []
        if not until_kill(Command.forked(folder, *options(store, out, *more)), out, moments):
            break
        n_killed += 1
    if not (out / RECORD).exists():
        assert Command.forked(folder, *options(store, out, "--resume")).join() == 0
    assert results(out) == results(folder / "undisturbed")
    assert {file.name for file in out.iterdir()} == {WEIGHTS, METRICS, RECORD, "lock"}
    return n_killed


def test_a_training_killed_three_times_and_resumed_ends_with_the_same_bits(rows_store: Path, tmp_path: Path) -> None:
    assert kill_and_resume(rows_store, tmp_path, 3, random.Random(0)) == 3


@pytest.mark.slow
def test_a_training_killed_twenty_times_and_resumed_ends_with_the_same_bits(rows_store: Path, tmp_path: Path) -> None:
    n_killed = n_trainings = 0
    while n_killed < 20:
        folder = tmp_path / str(n_trainings)
        folder.mkdir()
        n_killed += kill_and_resume(rows_store, folder, 20 - n_killed, random.Random(n_trainings))
        n_trainings += 1
    print(f"{n_killed} kills over {n_trainings} trainings; weights, metrics and record bit-identical each time")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "Ctrl-C"])
def test_a_training_that_is_asked_to_stop_saves_its_state_first(
    number: int, status: int, rows_store: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    asked = [*options(rows_store, out), "--checkpoint-minutes", 0]
    command = Command.forked(tmp_path, *asked)
    until(lambda: ((out / METRICS).exists() and (out / METRICS).stat().st_size) or None)
    assert not (out / STATE).exists()
    os.kill(command.pid, number)
    assert command.join() == status
    saved = load_state(out)
    assert saved is not None
    assert saved.facts.rows_seen > 0
    assert Command.forked(tmp_path, *asked, "--resume").join() == 0
    assert Command.forked(tmp_path, *options(rows_store, tmp_path / "undisturbed")).join() == 0
    assert results(out) == results(tmp_path / "undisturbed")


def test_an_interrupted_training_is_neither_overwritten_nor_taken_for_a_run(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_after(config, 3, monkeypatch)
    before = {file.name: file.read_bytes() for file in config.out.iterdir()}
    with pytest.raises(OutputExists, match=r"interrupted after 768 rows; continue it with --resume"):
        train(config)
    assert {file.name: file.read_bytes() for file in config.out.iterdir()} == before


def test_only_the_same_training_is_resumed(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_after(config, 3, monkeypatch)
    for change in ({"k": 3}, {"lr": 0.1}, {"seed": 1}, {"order_seed": 1}, {"batch": 128}, {"recipe": "textbook"}):
        ((name, value),) = change.items()
        wanted = rf"is another training: {name} \(there .*, asked {value}\); give the options it began with"
        with pytest.raises((IdentityMismatch, InputError), match=wanted):
            train(replace(config, resume=True, **change))  # type: ignore[arg-type]


def test_a_resumed_training_reads_the_rows_it_began_with_when_the_store_has_grown(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = train(replace(config, out=tmp_path / "undisturbed"))
    grown = write_store(tmp_path / "grown", SPEC)
    config = replace(config, store=grown)
    interrupt_after(config, 30, monkeypatch)
    snapshot = ActivationStore(grown).snapshot
    write_store(tmp_path / "grown", replace(SPEC, n_segments=2))
    assert ActivationStore(grown).snapshot != snapshot
    found = train(replace(config, resume=True))
    assert found["snapshot"] == snapshot
    assert found["sae_sha256"] == undisturbed["sae_sha256"]


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty"])
def test_a_damaged_state_is_refused(config: TrainConfig, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_after(config, 2, monkeypatch)
    path = config.out / STATE
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 1
    path.write_bytes(b"" if damage == "empty" else data[:-100] if damage == "truncated" else data)
    with pytest.raises(DamagedStore, match=re.escape(str(path)) + r": cannot be continued from \(.*\); move it away"):
        train(replace(config, resume=True))


def test_resume_without_a_state_begins(config: TrainConfig) -> None:
    found = train(replace(config, resume=True, tokens=1024))
    assert found["history"] == [[0, 1]]
    assert json.loads((config.out / RECORD).read_text())["rows_seen"] == 1024
    assert load_run(config.out)[1].run_id == found["run_id"]


def test_a_state_saved_right_after_a_resume_keeps_the_log_whole(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """States at steps 30, then 40 of the resumed training, then the rest: lines are written at 25, 50, ..."""
    interrupt_after(config, 30, monkeypatch)
    interrupt_after(replace(config, resume=True), 10, monkeypatch)
    train(replace(config, resume=True))
    train(replace(config, out=tmp_path / "undisturbed"))
    assert results(config.out) == results(tmp_path / "undisturbed")


def test_a_log_that_lost_lines_is_not_continued(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_after(config, 30, monkeypatch)
    (config.out / METRICS).write_bytes(b"")
    with pytest.raises(DamagedStore, match=r"metrics\.jsonl: has lost lines that were saved"):
        train(replace(config, resume=True))


@pytest.mark.parametrize("left_out", [{"lr": 0.0}, {"kernel": "dense"}])
def test_a_resume_without_an_option_it_began_with_is_refused(
    config: TrainConfig, left_out: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_after(config, 3, monkeypatch)
    with pytest.raises(IdentityMismatch, match="is another training: " + next(iter(left_out))):
        train(replace(config, resume=True, **left_out))


def test_a_training_cut_off_between_its_record_and_its_end_is_finished_by_resume(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.train.stage.finish", _cut_off)
        with pytest.raises(Interrupted):
            train(replace(config, checkpoint_minutes=ALWAYS))
    before = results(config.out)
    assert (config.out / STATE).exists()
    train(replace(config, resume=True))
    assert results(config.out) == before
    assert not (config.out / STATE).exists()


def _cut_off(*_: Any) -> None:
    raise Interrupted
