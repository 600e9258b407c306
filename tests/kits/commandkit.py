"""Commands under way in processes of their own, to be watched and disturbed."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from forkkit import PROCESSES, preload
from modelkit import ROOT

preload(
    "modelkit",
    "cli",
    "pipelines.collect.stage",
    "pipelines.train.sweep",
    "zarr.codecs",
    "transformers.models.gpt2.modeling_gpt2",
)


@dataclass
class Command:
    """`actstore ...` under way in a process of its own; what it prints goes to a folder."""

    pid: int
    join: Callable[[], int]
    """Waits for its end, and gives its exit status."""
    output: Path

    @classmethod
    def forked(cls, folder: Path, *arguments: object) -> Command:
        """In a process forked from one that has imported everything: starting Python anew takes seconds."""
        output = Path(tempfile.mkdtemp(prefix="command-", dir=folder))
        process = PROCESSES.Process(target=_run, args=([str(argument) for argument in arguments], output))
        process.start()
        assert process.pid is not None

        def join() -> int:
            process.join()
            assert process.exitcode is not None
            return process.exitcode

        return cls(process.pid, join, output)

    @classmethod
    def started(cls, folder: Path, *arguments: object) -> Command:
        """`python cli.py ...`."""
        output = Path(tempfile.mkdtemp(prefix="command-", dir=folder))
        with open(output / "stdout", "wb") as stdout, open(output / "stderr", "wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, str(ROOT / "cli.py"), *map(str, arguments)],
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
                stdout=stdout,
                stderr=stderr,
            )
        return cls(process.pid, process.wait, output)

    @property
    def has_ended(self) -> bool:
        try:
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:  # a child of the fork server
            return not Path(f"/proc/{self.pid}").exists()

    def result(self) -> subprocess.CompletedProcess[str]:
        """Its exit status and all that it printed, once it has ended."""
        status = self.join()
        stdout, stderr = ((self.output / name).read_text(encoding="utf-8") for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess([], status, stdout, stderr)


def _run(arguments: list[str], output: Path) -> None:
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(output / name, os.O_WRONLY | os.O_CREAT, 0o644), descriptor)
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)  # enough for small matrices; a second one is waited for on a busy machine
    sys.argv = ["actstore", *arguments]
    from actstore.__main__ import main

    main()
