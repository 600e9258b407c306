"""What the tasks of a command are given stays to be had as long as the command runs, whichever workers die."""

from __future__ import annotations

import os
import signal
import warnings
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipelines.shared.cluster import _register, connect, run_tasks, share


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
