"""Killed at random moments and started again, a command ends with what it would have given undisturbed.

Each round removes the output, starts the command, and kills it once or several times, the command alone or with all its
processes; then the same command runs to its end. `ACTSTORE_KILLS` sets the number of kills, 3 by default.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from modelkit import ROOT, write_texts
from storekit import files_of

N_KILLS = int(os.environ.get("ACTSTORE_KILLS", "3"))
PATIENCE_S = 120
CLI = [sys.executable, str(ROOT / "cli.py")]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
RESULTS = {
    "train": ("sae.safetensors",),
    "sweep": ("sae.safetensors",),
}
"""By command, the files in which two undisturbed runs agree, where these are not all: the others hold times."""
DONE_BEFORE = ("holds a finished sweep", "out: exists; choose another --out")
pytestmark = [pytest.mark.processes, pytest.mark.slow]


@dataclass(frozen=True)
class Made:
    """What the commands start from."""

    model: Path
    texts: Path
    store: Path
    run: Path
    codes: Path
    analysis: Path


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path, store: Path, run: Path, codes: Path, analysis: Path
) -> Made:
    texts = write_texts(tmp_path_factory.mktemp("many") / "texts", 120)
    return Made(model_folder, texts, store, run, codes, analysis)


def arguments_of(name: str, made: Made) -> list[object]:
    """A command that takes long enough to be killed in its midst."""
    training = ["--layer", 2, "--features", 256, "--k", 4, "--batch", 64, "--epochs", 12, "--checkpoint-minutes", 0.002]
    return {
        "collect": ["collect", "--model", made.model, "--corpus", made.texts, "--layer", 1, "--context", 16, "--workers", 2],
        "train": ["train", made.store, *training],
        "sweep": ["train", made.store, *training, "--k", 8],
        "encode": ["encode", made.store, made.run, "--workers", 2],
        "analyze": ["analyze", made.codes, "--workers", 2],
        "structure": ["structure", made.analysis, "--run", made.run, "--draws", 30],
        "effects": ["effects", made.run, made.codes, "--analysis", made.analysis, "--top", 20, "--firings", 30],
    }[name]


def started(name: str, made: Made, out: Path, log: Path) -> subprocess.Popen[bytes]:
    """The command in a process group of its own, writing to `out`; it goes on with what is there."""
    command = [*CLI, *map(str, arguments_of(name, made)), "--out", str(out)]
    if name in RESULTS and out.exists() and any(out.rglob("training.safetensors")):
        command.append("--resume")
    with log.open("wb") as file:
        return subprocess.Popen(command, env=ENVIRONMENT, stdout=file, stderr=file, start_new_session=True, cwd=ROOT)


def finished(name: str, made: Made, out: Path, log: Path) -> float:
    """Run the command to its end; the seconds it took."""
    start = time.perf_counter()
    process = started(name, made, out, log)
    process.wait(PATIENCE_S)
    require_done(process, log)
    return time.perf_counter() - start


def require_done(process: subprocess.Popen[bytes], log: Path) -> None:
    """A command that has ended has done its work, or says that it was done before: a kill can come when all is written."""
    said = log.read_text(errors="replace")
    assert process.returncode == 0 or any(sign in said for sign in DONE_BEFORE), said[-2000:]


def result_of(name: str, out: Path) -> dict[str, bytes]:
    """The files of a finished output that any two runs of the command have in common."""
    files = {file: data for file, data in files_of(out).items() if not Path(file).name.startswith("lock")}
    return {file: data for file, data in files.items() if name not in RESULTS or Path(file).name in RESULTS[name]}


def kill(process: subprocess.Popen[bytes], with_children: bool) -> None:
    """SIGKILL, to the process alone, or to all that it started. Children that it leaves may end their work: they still hold
    the output's lock."""
    own = psutil.Process(process.pid)
    children = own.children(recursive=True)
    for victim in (own, *(children if with_children else ())):
        with suppress(psutil.NoSuchProcess):
            victim.kill()
    process.wait()
    psutil.wait_procs(children, PATIENCE_S)


def until(holds: Callable[[], bool], seconds: float) -> bool:
    """Wait for something to hold; whether it did."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        if holds():
            return True
        time.sleep(0.02)
    return False


NAMES = ["collect", "sweep", "encode", "analyze", "structure", "effects"]


@pytest.mark.parametrize("name", NAMES)
def test_killed_and_started_again_it_ends_with_the_same_result(name: str, made: Made, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    seconds = finished(name, made, tmp_path / "whole", log)
    expected = result_of(name, tmp_path / "whole")
    assert expected
    rng, n_kills, n_in_midst, n_rounds = random.Random(name), 0, 0, 0
    while n_kills < N_KILLS:
        shutil.rmtree(out, ignore_errors=True)
        n_rounds += 1
        for _ in range(rng.randint(1, min(4, N_KILLS - n_kills))):
            process = started(name, made, out, log)
            until(lambda process=process: out.exists() or process.poll() is not None, PATIENCE_S)
            has_ended = until(lambda process=process: process.poll() is not None, rng.uniform(0, 0.7 * seconds))
            n_in_midst += not has_ended and out.exists()
            if has_ended:
                require_done(process, log)
            else:
                kill(process, with_children=rng.random() < 0.5)
            n_kills += 1
        finished(name, made, out, log)
        assert result_of(name, out) == expected
    print(f"\n{name}: {n_kills} kills in {n_rounds} rounds, {n_in_midst} in its midst; undisturbed {seconds:.1f} s")
