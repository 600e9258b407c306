"""A real S3 server on loopback, what another client finds in it, and writers that die in processes of their own."""

from __future__ import annotations

import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from forkkit import PROCESSES, preload

LEASE = {"HEARTBEAT_S": 0.1, "DEAD_AFTER_S": 1.2, "POLL_S": 0.02}
"""A lease's times in tests; with a store's own times, a writer that is killed fifty times would take minutes."""

SERVE = """
import os, sys, threading
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
from moto.server import main
from werkzeug.serving import WSGIRequestHandler
WSGIRequestHandler.protocol_version = "HTTP/1.1"  # connections are kept, as real servers do
main(sys.argv[1:])
"""
"""moto's server, which ends when the tests' process does, however that ends."""

preload("zarr.codecs", "actstore.reader", "obstore.store", "storekit", "pytest")


@dataclass(frozen=True)
class Server:
    """moto's S3 server, and its log of every request."""

    port: int
    log: Path

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to find it."""
        return {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_METADATA_ENDPOINT": "http://127.0.0.1:9",
        }

    def requests(self) -> list[tuple[str, str]]:
        """(method, path) of every request so far, those for the lease left out."""
        lines = re.findall(r'"(?:\x1b\[\d+m)*([A-Z]+) (\S+) HTTP', self.log.read_text(encoding="utf-8"))
        return [(method, path) for method, path in lines if "/lease" not in path and not path.startswith("/moto-api")]

    def bucket(self) -> str:
        """The URL of a new bucket: moto's lists take the longer, the more a bucket holds."""
        url = f"s3://acts-{uuid.uuid4().hex}"
        urllib.request.urlopen(urllib.request.Request(f"{self.endpoint}/{url[5:]}", method="PUT")).close()
        return url

    def refuse_everybody(self, refuse: bool) -> None:
        """Whether credentials are looked at, none of which are known here."""
        self._post("/moto-api/reset-auth", b"0" if refuse else b"inf")

    def objects(self, url: str) -> dict[str, bytes]:
        """Every object below an s3:// URL as another client reads it, without the lease."""
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        client = self.client()
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/")
        keys = [item["Key"] for page in pages for item in page.get("Contents", [])]
        names = {key.removeprefix(f"{prefix}/"): key for key in keys}
        return {
            name: client.get_object(Bucket=bucket, Key=key)["Body"].read()
            for name, key in names.items()
            if not name.startswith("lease/")
        }

    def put(self, url: str, data: bytes) -> None:
        """Put an object behind our back."""
        bucket, _, key = url.removeprefix("s3://").partition("/")
        self.client().put_object(Bucket=bucket, Key=key, Body=data)

    def client(self) -> Any:
        import boto3

        return boto3.client("s3", endpoint_url=self.endpoint)

    def _post(self, path: str, data: bytes) -> None:
        headers = {"Content-Type": "text/plain"}
        urllib.request.urlopen(urllib.request.Request(self.endpoint + path, data=data, headers=headers)).close()


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """The server, until the block ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Server(port, folder / "requests.log")
    with open(server.log, "wb") as log:
        command = [sys.executable, "-c", SERVE, "-H", "127.0.0.1", "-p", str(port)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True)
    try:
        _wait_for(server, process)
        yield server
    finally:
        process.kill()
        process.communicate()


def _wait_for(server: Server, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(f"{server.endpoint}/moto-api/").close()
            return
        except OSError:
            assert process.poll() is None, server.log.read_text(encoding="utf-8")
            assert time.monotonic() < deadline
            time.sleep(0.05)


class Gate:
    """A way to the server that can be closed: nothing listens then, and whoever was connected is cut off."""

    def __init__(self, server: Server):
        self.server = server
        self.port = 0
        self.open()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def open(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self.listener.getsockname()[1]
        self.sockets = [self.listener]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        for found in self.sockets:
            with suppress(OSError):
                found.shutdown(socket.SHUT_RDWR)
            found.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                onward = socket.create_connection(("127.0.0.1", self.server.port))
                self.sockets += [client, onward]
                for pair in ((client, onward), (onward, client)):
                    threading.Thread(target=_pump, args=pair, daemon=True).start()


def _pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


def kinds(requests: list[tuple[str, str]]) -> Counter[str]:
    """How many requests of each kind: LIST, and the HTTP methods of single objects."""
    return Counter(
        "LIST" if "list-type=2" in path else "DELETE" if "?delete" in path else method for method, path in requests
    )


def shorten_lease(patch: pytest.MonkeyPatch) -> None:
    from actstore import lease

    for name, seconds in LEASE.items():
        patch.setattr(lease, name, seconds)


# For processes of their own


def begin(function: Callable[..., object], server: Server, *arguments: Any) -> BaseProcess:
    """Start `function(*arguments)` in a process of its own, with the server's environment and short leases."""
    process = PROCESSES.Process(target=_run, args=(function, server.environment, *arguments))
    process.start()
    return process


def _run(function: Callable[..., object], environment: dict[str, str], *arguments: Any) -> None:
    from actstore import lease

    os.environ.update(environment)
    for name, seconds in LEASE.items():
        setattr(lease, name, seconds)
    function(*arguments)


def signalled(number: int, n_calls: int, function: Callable[..., object], *arguments: Any) -> None:
    """`function(*arguments)`; the process sends itself a signal when it is about to change the n-th object."""
    from actstore.bucket import Bucket

    left = itertools.count(n_calls - 1, -1)

    def counting(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(place: Bucket, name: str, *data: bytes) -> Any:
            if not name.startswith("lease") and not next(left):
                os.kill(os.getpid(), number)
            return call(place, name, *data)

        return counted

    for name in ("publish", "create", "remove"):
        setattr(Bucket, name, counting(getattr(Bucket, name)))
    function(*arguments)


def kill_at(n_calls: int, function: Callable[..., object], *arguments: Any) -> None:
    """`function(*arguments)`, killed when it is about to change the n-th object."""
    signalled(signal.SIGKILL, n_calls, function, *arguments)


def stop_at(n_calls: int, function: Callable[..., object], *arguments: Any) -> None:
    """`function(*arguments)`, stopped there until it is told to go on."""
    signalled(signal.SIGSTOP, n_calls, function, *arguments)


def wait_until_stopped(process: BaseProcess) -> bool:
    """Whether it stopped; False when it ended before."""
    while process.is_alive():
        try:
            status = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return False
        if status == "T":
            return True
        time.sleep(0.01)
    return False


def run_command(*arguments: object) -> None:
    """`actstore …`."""
    from cli import cli

    cli.main([str(argument) for argument in arguments])


def write_and_hold(url: str, spec: Any) -> None:
    """Take the store's lease and keep it until killed."""
    from storekit import write_store

    write_store(url, spec, on_locked=lambda: time.sleep(600))  # type: ignore[arg-type]


def create_each(url: str, names: list[str], mark: bytes, barrier: Any, results: Any) -> None:
    """Try to create every name; put those that this process created on a queue."""
    from actstore.open_place import open_place

    place = open_place(url)
    place.names()
    barrier.wait()
    results.put([name for name in names if place.create(name, mark)])
