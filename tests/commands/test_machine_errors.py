"""What the machine runs out of: memory of the process or the device, an object of a bucket. One line each, at one place."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from modelkit import ROOT

from cli import cli
from pipelines.train.trainee import Trainee

ASKED = ("--layer", "2", "--features", "64", "--k", "4", "--batch", "64", "--tokens", "640", "--device", "cpu")
REMEDY = "ask for less at once (a smaller --batch, fewer --workers or --features), or take a machine with more"


def trained(store: Path, out: Path, *more: str) -> tuple[int, str]:
    """The exit status of a training, and the one line that it ends with after its options."""
    result = CliRunner().invoke(cli, ["train", str(store), "--out", str(out), *ASKED, *more])
    lines = [line for line in result.stderr.splitlines() if not line.startswith("train: ")]
    assert len(lines) == 1, result.output
    return result.exit_code, lines[0]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "memory: used up (MemoryError)"),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
            ),
            "memory: used up ([enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has a total capacity of 2 GiB"),
            "the device's memory: used up (CUDA out of memory. Tried to allocate 20.00 MiB)",
        ),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
            "the device's memory: used up (CUDA",
        ),
        (RuntimeError("can't start new thread"), "memory: used up (can't start new thread)"),
        (OSError(12, "Cannot allocate memory"), "memory: used up ([Errno 12] Cannot allocate memory)"),
        (OSError(28, "No space left on device"), "the output: No space left on device; free some space"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "the output: No space left on device"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_machine_runs_out_of_is_one_line(
    error: Exception, said: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr(Trainee, "step", fails)
    status, line = trained(store, tmp_path / "run")
    assert status == 1
    assert line.startswith(f"error: {said}")
    assert line.endswith("; everything committed is kept.")
    assert ("used up" in said) == (REMEDY in line)


def test_an_allocation_that_pytorch_refuses_is_one_line(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actstore.files.free_bytes", lambda path: 1 << 60)
    status, line = trained(store, tmp_path / "run", "--features", str(1 << 40))
    assert status == 1
    assert line.startswith("error: memory: used up (")


@pytest.mark.parametrize(
    "bug", [KeyError("x"), RuntimeError("shape mismatch"), ValueError("no"), OSError(9, "Bad descriptor")]
)
def test_a_bug_is_still_a_traceback(bug: Exception, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise bug

    monkeypatch.setattr(Trainee, "step", fails)
    result = CliRunner().invoke(cli, ["train", str(store), "--out", str(tmp_path / "run"), *ASKED])
    assert result.exception is bug


@pytest.mark.processes
@pytest.mark.parametrize("megabytes", [250, 700, 850])
def test_a_process_that_may_have_little_memory_ends_in_one_line(megabytes: int, store: Path, tmp_path: Path) -> None:
    """Too little to load PyTorch, to load the rest, to train."""
    asked = ["train", str(store), "--out", str(tmp_path / "run"), *ASKED, "--features", "200000"]
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({megabytes} << 20,) * 2)\n"
    code = f"{limited}import sys; sys.argv = ['actstore', *{asked!r}]\nfrom actstore.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("train: ")]
    assert done.returncode == 1
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: memory: used up (")
