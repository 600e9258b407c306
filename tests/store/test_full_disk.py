"""A disk that is full, or becomes so, or cannot be written: one clear line, and nothing that was committed is lost."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from commandkit import Command
from daskkit import until
from modelkit import faults_in, folder_state, records_of, write_texts
from storekit import files_of

from actstore.files import RESERVE_BYTES
from actstore.reader import ActivationStore
from cli import cli
from pipelines.sae.run_record import WEIGHTS
from pipelines.train.saved_state import STATE

pytestmark = pytest.mark.processes

Disk = Callable[[int], Path]
MIB = 1 << 20
FULL = "No space left on device; free some space and run the same command again; everything committed is kept."


def mount(*arguments: object) -> None:
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """Mounts a disk of this many bytes, in memory."""
    mounted: list[Path] = []

    def make(n_bytes: int) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        mount("-t", "tmpfs", "-o", f"size={n_bytes}", "tmpfs", folder)
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def filled(folder: Path) -> Iterator[None]:
    """The disk is full of something else."""
    filler = folder / "somebody-else"
    with open(filler, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(MIB))
        except OSError:
            pass
        try:  # the last piece of a page
            while True:
                file.write(b"x")
        except OSError:
            pass
    yield
    filler.unlink()


@pytest.fixture(scope="module")
def arguments(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """A collection that takes seconds: many forward passes, each over little."""
    texts = write_texts(tmp_path_factory.mktemp("many") / "texts", 40)
    options = ["--model", model_folder, "--corpus", texts, "--layer", 0, "--encoding", "fp32"]
    return ["collect", *options, "--context", 8, "--batch-windows", 1]


@pytest.fixture(scope="module")
def undisturbed(arguments: list[object], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the store, collected where there is space."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert Command.forked(folder, *arguments, "--out", folder / "store").join() == 0
    return files_of(folder / "store")


def the_line(result: subprocess.CompletedProcess[str], command: str = "collect") -> str:
    """The one line of an error, after what was asked for and how far it came."""
    assert result.returncode == 1, result
    assert result.stdout == ""
    *before, line = result.stderr.splitlines()
    assert all(said.startswith((f"{command}: ", "dashboard: ")) for said in before), result.stderr
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    ("free", "run"),
    [(RESERVE_BYTES // 2, Command.started), (RESERVE_BYTES + MIB, Command.forked)],
    ids=["below the reserve", "above it"],
)
def test_a_store_that_does_not_fit_is_refused_before_anything_is_written(
    free: int, run: Callable[..., Command], arguments: list[object], disk: Disk, tmp_path: Path
) -> None:
    folder = disk(free)
    line = the_line(run(tmp_path, *arguments, "--out", folder / "store").result())
    assert line.startswith(f"error: {folder / 'store'}: ")
    assert f"and 67 MB in reserve, the disk has {free / 1e6:,.0f} MB free; free some space, ask for less" in line
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("moment", ["manifest.json", "commits/0000/segment.json", "commits/0000/train/000001.json"])
def test_a_disk_that_is_filled_in_the_midst_loses_nothing_and_is_continued_with_space(
    moment: str, arguments: list[object], undisturbed: dict[str, bytes], disk: Disk, tmp_path: Path
) -> None:
    folder = disk(RESERVE_BYTES + 36 * MIB)
    out = folder / "store"
    command = Command.forked(tmp_path, *arguments, "--out", out)
    until(lambda: (out / moment).exists() or None)
    os.kill(command.pid, signal.SIGSTOP)  # or it may have ended before the disk is full
    with filled(folder):
        os.kill(command.pid, signal.SIGCONT)
        line = the_line(command.result())
        assert line.startswith((f"error: {out}/", f"error: {out}: "))
        if line.startswith(f"error: {out}/"):
            assert line.endswith(f": {FULL}")
        else:  # found when it was about to compute the shards
            assert re.search(
                r"needs \d MB and 67 MB in reserve, the disk has [\d,]+ MB free; free some space, ask for less", line
            )
            assert "train" not in moment
        assert not list(out.rglob(".*.tmp"))
        kept = records_of(out)
        assert len(kept) < sum(name.startswith("commits/0000/") for name in undisturbed) - 2
        if "/" in moment:
            store = ActivationStore(out, partial=True)
            assert len(store.shards()) == len(kept) >= ("train" in moment)
        again = the_line(Command.forked(tmp_path, *arguments, "--out", out).result())
        assert "in reserve, the disk has 0 MB free; free some space" in again or "No space left on device" in again
        assert records_of(out) == kept
    result = Command.forked(tmp_path, *arguments, "--out", out).result()
    assert result.returncode == 0, result.stderr
    assert records_of(out).items() >= kept.items()
    assert files_of(out) == undisturbed


def test_a_disk_that_is_filled_while_workers_write_is_one_line_too(
    arguments: list[object], undisturbed: dict[str, bytes], disk: Disk, client: Any, tmp_path: Path
) -> None:
    folder = disk(RESERVE_BYTES + 36 * MIB)
    out = folder / "store"
    has_ended = threading.Event()

    def fill() -> None:
        until(lambda: (out / "commits/0000/train/000001.json").exists() or None)
        with filled(folder):
            has_ended.wait()

    filler = threading.Thread(target=fill)
    filler.start()
    asked = [*map(str, arguments), "--out", str(out), "--scheduler", client.scheduler.address]
    result = CliRunner().invoke(cli, asked)
    has_ended.set()
    filler.join()
    line = the_line(subprocess.CompletedProcess([], result.exit_code, result.stdout, result.stderr))
    assert line.startswith(f"error: {out}/")
    assert line.endswith(f": {FULL}")
    assert not list(out.rglob(".*.tmp"))
    kept = records_of(out)
    assert Command.forked(tmp_path, *arguments, "--out", out).join() == 0
    assert records_of(out).items() >= kept.items()
    assert files_of(out) == undisturbed


def test_a_training_whose_disk_fills_up_is_one_line_and_goes_on_with_space(store: Path, disk: Disk, tmp_path: Path) -> None:
    """Tensors are written by a library of its own, whose error is no OSError."""
    asked = ["train", store, "--layer", 2, "--features", 2048, "--k", 4, "--batch", 64, "--epochs", 20]
    asked += ["--checkpoint-minutes", 0.0001]
    out = disk(RESERVE_BYTES + 36 * MIB) / "run"
    command = Command.forked(tmp_path, *asked, "--out", out)
    until(lambda: (out / STATE).exists() or None)
    os.kill(command.pid, signal.SIGSTOP)
    with filled(out.parent):
        os.kill(command.pid, signal.SIGCONT)
        line = the_line(command.result(), "train")
        assert line.startswith(f"error: {out}/{STATE}: ")
        assert line.endswith(f": {FULL}")
    assert Command.forked(tmp_path, *asked, "--out", out, "--resume").join() == 0
    assert Command.forked(tmp_path, *asked, "--out", tmp_path / "undisturbed").join() == 0
    assert (out / WEIGHTS).read_bytes() == (tmp_path / "undisturbed" / WEIGHTS).read_bytes()


def test_a_folder_that_cannot_be_written_is_one_line_and_can_still_be_read(
    arguments: list[object], undisturbed: dict[str, bytes], disk: Disk, tmp_path: Path
) -> None:
    folder = disk(RESERVE_BYTES + 36 * MIB)
    out = folder / "store"
    assert Command.forked(tmp_path, *arguments, "--out", out).join() == 0
    for name in ("sealed.json", "train/000003.json"):
        (out / "commits/0000" / name).unlink()
    mount("-o", "remount,ro", folder)
    before = folder_state(folder)
    for place in (out, folder / "new", folder / "new/below"):
        line = the_line(Command.forked(tmp_path, *arguments, "--out", place).result())
        named, _, what = line.removeprefix("error: ").partition(": ")
        assert named.startswith(str(place)) or Path(named) in place.parents
        assert what == "Read-only file system; check the path and its permissions; everything committed is kept."
    assert "Read-only file system" in the_line(Command.forked(tmp_path, "repair", out).result(), "repair")
    assert Command.forked(tmp_path, "info", out).join() == 0
    assert Command.forked(tmp_path, "verify", out).join() == 0
    assert folder_state(folder) == before
    mount("-o", "remount,rw", folder)
    assert Command.forked(tmp_path, *arguments, "--out", out).join() == 0
    assert files_of(out) == undisturbed
    assert faults_in(out) == []


WRITERS: dict[str, list[str]] = {
    "train": ["STORE", "--layer", "2", "--features", "2048", "--k", "4", "--batch", "64", "--tokens", "640"],
    "recode": ["STORE", "--encoding", "fp32"],
    "encode": ["STORE", "RUN", "--workers", "0"],
    "analyze": ["CODES", "--workers", "0"],
    "report": ["ANALYSIS"],
    "export": ["RUN"],
    "compare": ["RUN", "RUN"],
    "superposition": ["--steps", "1", "--sparsities", "2"],
    "effects": ["RUN", "CODES", "--top", "4", "--firings", "4", "--device", "cpu"],
    "structure": ["ANALYSIS", "--draws", "20", "--rows", "2000", "--workers", "0"],
    "concepts": ["CODES", "--labels", "LABELS", "--no-probe", "--workers", "0"],
}


@pytest.mark.parametrize("command", WRITERS)
def test_a_disk_that_turns_out_to_be_full_is_one_line_in_every_command_that_writes(
    command: str,
    store: Path,
    run: Path,
    codes: Path,
    analysis: Path,
    disk: Disk,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The space seemed to be enough when it was asked for."""
    labels = tmp_path / "labels.jsonl"
    labels.write_text('{"document": "story00.txt", "start": 0, "stop": 7, "label": "a"}\n')
    monkeypatch.setattr("actstore.files.free_bytes", lambda path: 1 << 50)
    folder = disk(1 << 15)
    places = {"STORE": store, "RUN": run, "CODES": codes, "ANALYSIS": analysis, "LABELS": labels}
    out = folder / ("new.npz" if command == "export" else "new")
    with filled(folder):
        asked = [str(places.get(part, part)) for part in WRITERS[command]]
        result = CliRunner().invoke(cli, [command, *asked, "--out", str(out)])
    *before, line = result.stderr.splitlines()
    assert (result.exit_code, result.stdout) == (1, "")
    assert line.startswith("error: ")
    assert not [said for said in before if said.startswith(("error", "Traceback"))], result.stderr
    assert "No space left on device; free some space and run the same command again" in line, line
    assert not list(folder.rglob("*.making")), "nothing half-written is left"
