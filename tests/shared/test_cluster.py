"""What the tasks of a command are given stays to be had as long as the command runs, whichever workers die."""

from __future__ import annotations

import os
import signal
import warnings
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
from numpy.typing import NDArray

from actstore.errors import InputError
from pipelines.shared.cluster import DASHBOARD, _register, connect, run_tasks, share


def plus(shared: tuple[NDArray[np.int64], str], number: int) -> int:
    return int(shared[0][number]) + number


def test_a_shared_value_outlives_every_worker_that_had_it() -> None:
    tasks = range(6)
    with connect(None, 2) as client:
        shared = share(client, (np.arange(1000) * 10, "a name"))
        expected = [11 * number for number in tasks]
        assert run_tasks(client, "before", plus, [(shared, number) for number in tasks]) == expected
        for pid in client.run(os.getpid).values():
            os.kill(pid, signal.SIGKILL)
        assert run_tasks(client, "after", plus, [(shared, number) for number in tasks]) == expected


def test_a_large_shared_value_is_sent_without_a_warning(client: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shared = share(client, (np.zeros(3_000_000, np.int64), "more than the 10 MB from which Dask warns"))
    assert run_tasks(client, "large", plus, [(shared, 7)]) == [7]


class Unsteady:
    """A client some of whose workers die while they are told of a plugin."""

    def __init__(self, n_deaths: int) -> None:
        self.n_deaths = n_deaths

    def register_plugin(self, plugin: Any) -> None:
        if self.n_deaths:
            self.n_deaths -= 1
            raise OSError("Timed out trying to connect")


def test_a_worker_that_dies_while_a_command_connects_does_not_end_it() -> None:
    _register(Unsteady(2), None)
    with pytest.raises(OSError, match="Timed out"):
        _register(Unsteady(3), None)


def listens_on(n_processes: int) -> set[str]:
    """The addresses with their ports, as the kernel writes them, at which this process and its children take connections."""
    processes, sockets, addresses = [os.getpid()], set(), set()
    for process in processes:
        for children in Path(f"/proc/{process}/task").glob("*/children"):
            processes += map(int, children.read_text().split())
        for descriptor in Path(f"/proc/{process}/fd").iterdir():
            sockets.add(str(descriptor.readlink()) if descriptor.is_symlink() else "")
    assert len(processes) > n_processes
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                addresses.add(fields[1])
    return addresses


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="the kernel tells who listens under Linux alone")
@pytest.mark.parametrize("threads", [False, True])
def test_local_workers_listen_on_this_machine_alone(threads: bool, capfd: pytest.CaptureFixture[str]) -> None:
    before = listens_on(0)
    with connect(None, 2, threads=threads):
        opened = listens_on(0 if threads else 2) - before
    assert opened
    assert {address.partition(":")[0] for address in opened} == {"0100007F"}
    assert "dashboard: http://127.0.0.1:" in capfd.readouterr().err


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="the kernel tells who listens under Linux alone")
def test_the_dashboard_listens_elsewhere_when_that_is_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    before = listens_on(0)
    with dask.config.set({DASHBOARD: "0.0.0.0:0"}), connect(None, 1, threads=True):
        opened = listens_on(0) - before
    assert any(address.startswith("00000000:") for address in opened)
    assert "dashboard: http://0.0.0.0:" in capfd.readouterr().err


def test_an_address_that_is_none_is_refused() -> None:
    with dask.config.set({DASHBOARD: 8787}), pytest.raises(InputError, match=r"dashboard-address 8787"), connect(None, 1):
        raise AssertionError
