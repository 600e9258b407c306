"""A real Dask cluster for tests: `dask ...` processes that share a scheduler file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil
from modelkit import ROOT

T = TypeVar("T")


class dask_process:
    """A `dask scheduler` or `dask worker` process, ended with the block. `folder` holds the scheduler file."""

    def __init__(self, *arguments: str, folder: Path):
        options = ["--scheduler-file", str(folder / "scheduler.json"), "--no-dashboard"]
        command = [sys.executable, "-m", "dask", *arguments, *options]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def __enter__(self) -> dask_process:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(30)


def address_of(folder: Path) -> str:
    """The address of the scheduler that was started there, once it listens."""
    file = folder / "scheduler.json"
    return until(lambda: str(json.loads(file.read_text())["address"]) if file.exists() else None)


def worker_processes(nanny: int) -> list[psutil.Process]:
    """The processes that do the work below a process that starts and watches them."""
    try:
        below = psutil.Process(nanny).children(recursive=True)
        return [process for process in below if any("spawn_main" in part for part in process.cmdline())]
    except psutil.NoSuchProcess:
        return []


def until(found: Callable[[], T | None], seconds: float = 120) -> T:
    """Call a function until its value is not None, and return that value."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if (value := found()) is not None:
                return value
        except ValueError:  # a file is being written
            pass
        time.sleep(0.005)
    raise TimeoutError
