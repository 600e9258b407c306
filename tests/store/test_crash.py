"""Killed at any moment and started again, a collection ends as if nothing had happened, and loses nothing on the way."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import pytest
from commandkit import Command
from daskkit import worker_processes
from forkkit import PROCESSES
from modelkit import collect_and_die, faults_in, run_cli, write_texts
from storekit import files_of

from actstore.reader import ActivationStore
from actstore.schema import PARTS
from pipelines.collect.config import CollectConfig
from pipelines.collect.stage import collect

pytestmark = pytest.mark.processes

PATIENCE_S = 300


def test_killed_three_times_and_continued_the_store_is_bit_identical(
    small_store: Path, small_config: CollectConfig, tmp_path: Path
) -> None:
    out = tmp_path / "store"
    moments = random.Random(0)
    n_committed = [0]
    # A whole run does about 490 things to files: 245 until the first segment is published (fewer when objects of a killed
    # attempt are there), then 18 for each shard.
    for earliest, latest in ((1, 240), (170, 250), (20, 60)):
        process = PROCESSES.Process(
            target=collect_and_die, args=(replace(small_config, out=out), moments.randint(earliest, latest))
        )
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        n_committed.append(len(list(out.glob("commits/**/*.json"))))
        if (out / "manifest.json").exists():
            ActivationStore(out, partial=True)
            assert [fault for fault in faults_in(out) if "sealed.json: missing" not in fault] == []
    assert n_committed == sorted(n_committed)
    result = collect(replace(small_config, out=out))
    assert 0 < result["shards_committed_before"] < result["shards"]
    assert files_of(out) == files_of(small_store)


# Kills at random moments, from outside


@dataclass
class Kills:
    """Kills of one collection at random moments; after each, everything that was committed must be there and read."""

    out: Path
    moments: random.Random
    start_s: float
    """About what a command takes to start, and shards to be computed."""
    n_commands: int = 0
    n_workers: int = 0
    n_while_locked: int = 0
    n_half_written: int = 0
    shards_at_resume: list[int] = field(default_factory=list)
    committed: dict[str, bytes] = field(default_factory=dict)
    """Every commit record that was ever there, and the objects it names."""

    @property
    def n(self) -> int:
        return self.n_commands + self.n_workers

    def of(self, command: Command, n_worker_kills: int = 0) -> None:
        """Kill some of a command's workers, one after another, and then the command."""
        for _ in range(n_worker_kills):
            self._wait(command)
            if victims := worker_processes(command.pid):
                self.moments.choice(victims).kill()
                self.n_workers += 1
                with held_still(command.pid):
                    self.check()
        self._wait(command)
        if command.has_ended:
            result = command.result()
            assert result.returncode != 0, f"the collection was finished before it could be killed so often: {self}"
            assert "\nerror: workers: " in result.stderr  # all of them died while they started, or four over one task
            self.check()
            return
        self.n_while_locked += self.is_locked
        os.kill(command.pid, signal.SIGKILL)
        assert command.join() == -signal.SIGKILL
        self.n_commands += 1
        self.n_half_written += self.is_half_written
        self.check()
        self.shards_at_resume.append(len(self.records))

    def _wait(self, command: Command) -> None:
        """Until a random moment: of the start, of the work on the first shards, or right after some shard.

        However fast the machine, few shards are committed meanwhile: what is left to do must last for all the kills.
        """
        n_before = len(self.records)
        if self.moments.random() < 0.1:
            seconds, n_more = self.moments.uniform(0, self.start_s), 1
        else:
            n_more = self.moments.choice([0, 0, 0, 1, 1, 2])
            is_so_far = self._sleep(command, PATIENCE_S, lambda: self.is_locked and len(self.records) >= n_before + n_more)
            assert is_so_far, f"no lock or no shard in {PATIENCE_S} s; {self}"
            seconds = self.moments.uniform(0, self.start_s / 15)
        self._sleep(command, seconds, lambda: len(self.records) > n_before + n_more)

    def _sleep(self, command: Command, seconds: float, is_enough: Callable[[], bool]) -> bool:
        """Until there is enough, or the command has ended; False when neither came about in time."""
        deadline = time.monotonic() + seconds
        while not command.has_ended and not is_enough():
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.002)
        return True

    @property
    def records(self) -> list[Path]:
        """The commit records of shards."""
        return list(self.out.glob("commits/*/*/[0-9]*.json"))

    @property
    def is_locked(self) -> bool:
        """Whether somebody writes the store; to try the lock might keep a command from getting it."""
        try:
            lock = (self.out / "lock").stat().st_ino
        except FileNotFoundError:
            return False
        return f":{lock} 0 EOF" in Path("/proc/locks").read_text()

    @property
    def is_half_written(self) -> bool:
        """Whether temporary files lie there, or objects of a shard without a record."""
        objects = {file.relative_to(self.out).as_posix() for file in self.out.glob("data.zarr/**/rows/window/c/*")}
        named = {name for record in self.records for name in json.loads(record.read_bytes())["objects"]}
        return bool(objects - named) or any(self.out.rglob(".*.tmp"))

    def check(self) -> None:
        """No committed shard is lost or changed, and each one reads."""
        for name, data in self.committed.items():
            assert (self.out / name).read_bytes() == data, name
        if not (self.out / "manifest.json").exists():
            assert not self.committed
            return
        store = ActivationStore(self.out, partial=True)
        for part in PARTS:
            for shard in store.shards(part):
                for array in store.manifest.arrays:
                    assert len(store.read(shard, array.name)) == shard.n_rows
        for record in self.records:
            self.committed[record.relative_to(self.out).as_posix()] = record.read_bytes()
            for name in json.loads(record.read_bytes())["objects"]:
                self.committed[name] = (self.out / name).read_bytes()

    def __str__(self) -> str:
        return (
            f"{self.n} kills: {self.n_commands} of the command, {self.n_workers} of workers; {self.n_while_locked} commands "
            f"while they held the store, {self.n_half_written} left something half-written; committed shards at each "
            f"resume: {' '.join(map(str, self.shards_at_resume))}"
        )


@contextmanager
def held_still(pid: int) -> Iterator[None]:
    """A process and all below it do nothing meanwhile."""
    above = psutil.Process(pid)
    above.suspend()  # first: it starts others
    held = [above, *above.children(recursive=True)]
    try:
        for process in held[1:]:
            with suppress(psutil.NoSuchProcess):  # the one just killed
                process.suspend()
        yield
    finally:
        for process in held:
            with suppress(psutil.NoSuchProcess):
                process.resume()


def test_whenever_a_command_is_killed_no_committed_shard_is_lost(model_folder: Path, tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts", 50)
    arguments = ["collect", "--model", model_folder, "--corpus", texts, "--layer", 0, "--encoding", "fp32"]
    arguments += ["--context", 8, "--batch-windows", 1]
    assert Command.forked(tmp_path, *arguments, "--out", tmp_path / "whole").join() == 0
    kills = Kills(tmp_path / "store", random.Random(1), start_s=0.5)
    while kills.n < 4:
        kills.of(Command.forked(tmp_path, *arguments, "--out", kills.out))
    assert Command.forked(tmp_path, *arguments, "--out", kills.out).join() == 0
    print(kills)
    kills.check()
    assert files_of(kills.out) == files_of(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_fifty_times_and_continued_the_store_is_bit_identical(
    workers: int, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With workers, of a command's workers some are killed, before it is."""
    texts = write_texts(tmp_path / "texts", 5000)
    arguments = ["collect", "--model", model_folder, "--corpus", texts, "--layer", 0, "--encoding", "fp32"]
    arguments += ["--context", 64, "--batch-windows", 8, "--shard-mib", 1]
    whole = run_cli(*arguments, "--out", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    kills = Kills(tmp_path / "store", random.Random(workers), start_s=3)
    while kills.n < 50:
        n_worker_kills = min(kills.moments.randint(0, 4), 49 - kills.n) if workers else 0
        kills.of(Command.started(tmp_path, *arguments, "--workers", workers, "--out", kills.out), n_worker_kills)
    finished = run_cli(*arguments, "--workers", workers, "--out", kills.out)
    assert finished.returncode == 0, finished.stderr
    with capsys.disabled():
        print(f"\n--workers {workers}: {kills}")
    kills.check()
    assert kills.n == 50
    assert kills.n_while_locked > kills.n_commands / 2
    assert files_of(kills.out) == files_of(tmp_path / "whole")
    assert faults_in(kills.out) == []
