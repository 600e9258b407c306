"""Where Dask tasks run: local worker processes, or a scheduler that is already there; and the two ways to use them."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing import resource_tracker
from typing import Any
from uuid import uuid4

from actstore.errors import InputError
from pipelines.compute.freed_memory import keep_freed_memory, release_freed_memory
from pipelines.shared.progress import track

CONNECT_TIMEOUT_S = 10
WORKERS_TIMEOUT_S = 30
NO_WORKERS_S = 60
QUIET = {
    "distributed.worker.profile.enabled": False,  # that of every second a worker has run stays in its memory
    "distributed.admin.tick.interval": "500ms",
    "distributed.admin.system-monitor.interval": "2s",
    "distributed.worker.memory.monitor-interval": "500ms",
}
"""Of local clusters. By default Dask looks after itself so often that two idle workers take 4.1 % of two cores; so, 0.8."""
KEPT_BYTES = 32 << 20
"""Of memory that tasks free, what a worker keeps for the next ones."""


@contextmanager
def connect(scheduler: str | None, workers: int, *, threads: bool = False) -> Iterator[Any]:
    """A Dask client of the scheduler at an address such as tcp://host:8786, or of `workers` local processes (or threads).

    The address of its dashboard, where one is served, is said on stderr.

    A scheduler whose workers are just starting, or starting again after they died, is given half a minute to have one.

    Raises InputError when the scheduler does not answer within ten seconds, or has no worker by then, when workers keep
    dying over one task, or when a minute long none of the local ones is left: Dask gives up one that dies while it starts.
    """
    from distributed import KilledWorker
    from distributed.scheduler import NoWorkerError

    if workers < 1:
        raise InputError(f"workers {workers}: need at least 1.")
    try:
        with _client(scheduler, workers, threads) as client:
            _register(client, _keeping_memory())
            if client.dashboard_link and client.scheduler_info(n_workers=0)["services"]:
                print(f"dashboard: {client.dashboard_link}", file=sys.stderr)
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


def _register(client: Any, plugin: Any) -> None:
    """With every worker. One that dies just then is not asked again: it is gone, or another has come in its place."""
    for tries_left in (2, 1, 0):
        try:
            client.register_plugin(plugin)
            return
        except OSError:
            if not tries_left:
                raise


def _keeping_memory() -> Any:
    """For every worker, also those that come later: freed memory is kept for the next block and the next task, whose new
    pages would take a fault each (two workers that count pairs are a sixth faster so). A task that leaves more than that
    has all of it given back; else what a worker holds would grow with the number of its tasks."""
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
                shape = {"n_workers": 1, "threads_per_worker": workers, "processes": False}
                if not threads:
                    shape = {"n_workers": workers, "threads_per_worker": 1}
                cluster = stack.enter_context(LocalCluster(**shape, dashboard_address=":0"))
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
    """Processes started here do not hear of Ctrl-C: the process that started them does, and closes them in order.

    A terminal sends it to all of them, and each worker would answer with a traceback. A blocked signal stays blocked
    in child processes and threads, but the resource tracker's first start unblocks it: so that comes first.
    """
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def own_device(device: str) -> str:
    """For a task on a worker of a machine with several GPUs, each worker's own; else what was asked for."""
    import torch
    from distributed import get_worker

    name = str(get_worker().name)
    if device not in ("auto", "cuda") or torch.cuda.device_count() < 2 or not name.isdecimal():
        return device
    return f"cuda:{int(name) % torch.cuda.device_count()}"


def share(client: Any, value: Any) -> Any:
    """A value that is sent once, to be given to many tasks in its place.

    As the result of a task, which the scheduler keeps: when every worker that had the value dies, another one gets it.
    (Dask's `scatter` leaves it with the workers alone, and ends with "lost dependencies".)
    """
    import dask

    with dask.config.set({"distributed.admin.large-graph-warning-threshold": sys.maxsize}):
        return client.submit(_Carried(value), key=f"share-{uuid4()}")


class _Carried:
    """A value for Dask to carry without looking into it."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __call__(self) -> Any:
        return self._value


def run_tasks(client: Any, label: str, function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]) -> list[Any]:
    """`function(*task)` for every task, results in the order of the tasks; a failed task's error is raised here."""
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
    """Merge `function(*task)` of every task in one fixed binary tree, whatever worker ran what; gives the root.

    The tree depends on the number of tasks alone, so that floating-point sums do not depend on the cluster either. It
    is submitted depth first: a merge goes before the tasks after it, and few results wait in memory for another.
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
    """`reduce_tasks` of several groups at once; `finish(*last[i], root)`, if given, makes the root of group i its result."""
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
        futures.clear()  # a result that has been merged may go
        for future in finished:
            if future.status != "finished":
                future.result()
            progress.advance(1)
    results: list[Any] = client.gather(roots)
    return results
