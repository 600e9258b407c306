"""Dask clusters: local workers or a running scheduler, and two ways to use them (`run_tasks` and `reduce_tasks`)."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing import resource_tracker
from typing import Any
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

from actstore.errors import InputError
from pipelines.compute.freed_memory import keep_freed_memory, release_freed_memory
from pipelines.shared.progress import track
from pipelines.shared.visible_text import say

CONNECT_TIMEOUT_S = 10
WORKERS_TIMEOUT_S = 30
NO_WORKERS_S = 60
QUIET = {
    "distributed.worker.profile.enabled": False,  # profiles of every second pile up in memory
    "distributed.admin.tick.interval": "500ms",
    "distributed.admin.system-monitor.interval": "2s",
    "distributed.worker.memory.monitor-interval": "500ms",
}
"""Settings of local clusters. Two idle workers take 0.8 % of two cores; with Dask's default intervals, 4.1 %."""
DASHBOARD, LOOPBACK = "actstore.dashboard-address", "127.0.0.1:0"
"""The key of the address in Dask's configuration (DASK_ACTSTORE__DASHBOARD_ADDRESS in the environment), and the default."""
KEPT_BYTES = 32 << 20
"""Freed memory that a worker keeps for its next tasks."""


@contextmanager
def connect(scheduler: str | None, workers: int, *, threads: bool = False) -> Iterator[Any]:
    """A Dask client of the scheduler at an address such as tcp://host:8786, or of `workers` local processes (or threads).

    No workers are one thread of this process.

    The dashboard's address is printed to stderr where a dashboard is served; that of local workers listens on this machine
    alone, unless Dask's configuration has another address under `DASHBOARD`. A scheduler without workers, because they are
    starting or restarting, has half a minute to get one.

    Raises InputError in four cases: the scheduler does not answer within ten seconds; it has no worker after half a minute;
    workers keep dying over one task; no local worker is left for a minute (Dask does not restart one that dies while it
    starts).
    """
    from distributed import KilledWorker
    from distributed.scheduler import NoWorkerError

    if workers < 0:
        raise InputError(f"workers {workers}: need at least 0, which is in this process.")
    try:
        with _client(scheduler, max(1, workers), threads or not workers) as client:
            _register(client, _memory_plugin())
            if link := _dashboard_link(client, scheduler):
                say(f"dashboard: {link}", err=True)
            yield client
    except KilledWorker as error:
        raise InputError(
            f"workers: died again and again over one task ({error.task}), most likely for want of memory; "
            "use fewer --workers, or machines with more memory; what was committed is kept."
        ) from error
    except NoWorkerError as error:
        raise InputError(
            f"workers: none was left for {NO_WORKERS_S} s, they died while they started, most likely for want of memory; "
            "run the same command again, with fewer --workers; what was committed is kept."
        ) from error


def _dashboard_link(client: Any, scheduler: str | None) -> str:
    """Where the dashboard can be seen; empty where none is served."""
    if not client.dashboard_link or not client.scheduler_info(n_workers=0)["services"]:
        return ""
    link = urlsplit(client.dashboard_link)
    host = "" if scheduler else _dashboard_address().rpartition(":")[0]
    # a cluster of threads has no address of its own, and Dask then shows that of the machine's network
    return urlunsplit(link._replace(netloc=f"{host}:{link.port}") if host else link)


def _dashboard_address() -> str:
    """Where the dashboard of local workers listens, as HOST:PORT or :PORT. Raises InputError for anything else."""
    import dask

    address = str(dask.config.get(DASHBOARD, LOOPBACK))
    if not re.fullmatch(r".*:\d{1,5}", address):
        raise InputError(
            f"{DASHBOARD} {address} (Dask's configuration): no address; give it as HOST:PORT, such as {LOOPBACK}."
        )
    return address


def _register(client: Any, plugin: Any) -> None:
    """Register a plugin with every worker. If one dies meanwhile, ask again those that are left, at most twice."""
    for tries_left in (2, 1, 0):
        try:
            client.register_plugin(plugin)
            return
        except OSError:
            if not tries_left:
                raise


def _memory_plugin() -> Any:
    """A plugin, also for workers that join later, by which a worker keeps up to `KEPT_BYTES` of freed memory.

    Reused pages cost no page fault: two workers that count pairs are a sixth faster. After a task that leaves more freed
    memory, all of it is returned; otherwise a worker's memory would grow with the number of its tasks.
    """
    from distributed import WorkerPlugin

    class KeepsMemory(WorkerPlugin):
        name = "actstore-memory"

        def setup(self, worker: Any) -> None:
            keep_freed_memory(KEPT_BYTES)

        def transition(self, key: Any, start: str, finish: str, **named: Any) -> None:
            if start == "executing":
                release_freed_memory(KEPT_BYTES)

    return KeepsMemory()


@contextmanager
def _client(scheduler: str | None, workers: int, threads: bool) -> Iterator[Any]:
    import dask
    from distributed import Client, LocalCluster

    if scheduler is None:
        settings = QUIET | {"distributed.scheduler.no-workers-timeout": NO_WORKERS_S}
        with ExitStack() as stack:
            with _spared_interrupts(), dask.config.set(settings):
                shape: dict[str, Any] = {"n_workers": workers, "threads_per_worker": 1}
                if threads:
                    # such a worker has no address either, and its own server would listen on all interfaces
                    shape = {"n_workers": 1, "threads_per_worker": workers, "processes": False}
                    shape["worker_dashboard_address"] = LOOPBACK
                cluster = stack.enter_context(LocalCluster(**shape, dashboard_address=_dashboard_address()))
            yield stack.enter_context(Client(cluster))
        return
    try:
        client = Client(scheduler, timeout=CONNECT_TIMEOUT_S)
    except (OSError, ValueError, TimeoutError) as error:
        raise InputError(
            f"scheduler {scheduler}: does not answer within {CONNECT_TIMEOUT_S} s; check the address and that "
            "`dask scheduler` runs there, or leave --scheduler out to use this machine."
        ) from error
    with client:
        try:
            client.wait_for_workers(1, timeout=WORKERS_TIMEOUT_S)
        except TimeoutError as error:
            raise InputError(
                f"scheduler {scheduler}: has no workers after {WORKERS_TIMEOUT_S} s; start `dask worker {scheduler}` first."
            ) from error
        yield client


@contextmanager
def _spared_interrupts() -> Iterator[None]:
    """Processes started in the block do not receive Ctrl-C; the process that started them does, and closes them in order.

    A terminal sends Ctrl-C to every process, and each worker would print a traceback. A blocked signal stays blocked in
    child processes and threads, but the resource tracker unblocks SIGINT when it first starts: the tracker is started
    before the signal is blocked.
    """
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def own_device(device: str) -> str:
    """The device of a task: where a machine has several GPUs, each worker's own; else `device`."""
    import torch
    from distributed import get_worker

    name = str(get_worker().name)
    if device not in ("auto", "cuda") or torch.cuda.device_count() < 2 or not name.isdecimal():
        return device
    return f"cuda:{int(name) % torch.cuda.device_count()}"


def share(client: Any, value: Any) -> Any:
    """A future of a value, which is sent once; pass the future to many tasks in place of the value.

    The future is a task's result, and the scheduler keeps the task: if every worker that holds the value dies, another
    worker computes it again. Dask's `scatter` keeps a value on workers only, and then fails with "lost dependencies".
    """
    import dask

    with dask.config.set({"distributed.admin.large-graph-warning-threshold": sys.maxsize}):
        return client.submit(_Carried(value), key=f"share-{uuid4()}")


class _Carried:
    """A value that Dask carries without inspecting its content."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __call__(self) -> Any:
        return self._value


def run_tasks(client: Any, label: str, function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]) -> list[Any]:
    """`function(*task)` for every task; results in the order of the tasks. A failed task's error is raised here."""
    from distributed import as_completed

    futures = [client.submit(function, *task, pure=False) for task in tasks]
    with track(label, len(futures), "shards") as progress:
        for future in as_completed(futures):
            if future.status != "finished":
                future.result()
            progress.advance(1)
    results: list[Any] = client.gather(futures)
    return results


def reduce_tasks(
    client: Any, label: str, function: Callable[..., Any], merge: Callable[[Any, Any], Any], tasks: Sequence[tuple[Any, ...]]
) -> Any:
    """Merge `function(*task)` of every task in one fixed binary tree, and return its root.

    The tree depends only on the number of tasks, so floating-point sums do not depend on the cluster. The tree is submitted
    depth first: a merge runs before the tasks that follow, and few results wait in memory.
    """
    (root,) = reduce_groups(client, label, function, merge, None, [tasks], [()])
    return root


def reduce_groups(
    client: Any,
    label: str,
    function: Callable[..., Any],
    merge: Callable[[Any, Any], Any],
    finish: Callable[..., Any] | None,
    groups: Sequence[Sequence[tuple[Any, ...]]],
    last: Sequence[tuple[Any, ...]],
) -> list[Any]:
    """`reduce_tasks` of several groups at once. With `finish`, the result of group i is `finish(*last[i], root)`."""
    from distributed import as_completed

    futures = []

    def submit(call: Callable[..., Any], *arguments: Any) -> Any:
        futures.append(client.submit(call, *arguments, pure=False))
        return futures[-1]

    def tree(tasks: Sequence[tuple[Any, ...]]) -> Any:
        if len(tasks) == 1:
            return submit(function, *tasks[0])
        middle = len(tasks) // 2
        return submit(merge, tree(tasks[:middle]), tree(tasks[middle:]))

    roots = []
    for tasks, arguments in zip(groups, last, strict=True):
        root = tree(tasks)
        roots.append(root if finish is None else submit(finish, *arguments, root))
    del root
    with track(label, len(futures), "tasks") as progress:
        finished = as_completed(futures)
        futures.clear()  # lets Dask free a result that has been merged
        for future in finished:
            if future.status != "finished":
                future.result()
            progress.advance(1)
    results: list[Any] = client.gather(roots)
    return results
