"""A prefix of an object store such as S3, through obstore, the library under Zarr's own object stores.

Credentials, region and endpoint come from the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...), as every
other tool takes them. A PUT is whole or not at all, and one that must create fails when the name is taken.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any
from urllib.parse import quote

from actstore.errors import InputError, StoreError
from actstore.lease import held_lease
from actstore.place import Place

READERS = 16
CLIENT: Any = {
    "timeout": "30s",
    "connect_timeout": "3s",
    "allow_http": True,  # where the endpoint that the user names begins with http://
}
RETRIES: Any = {
    "max_retries": 7,
    "retry_timeout": timedelta(seconds=32),
    "backoff": {"init_backoff": timedelta(seconds=0.3), "max_backoff": timedelta(seconds=4), "base": 2},
}
"""A server that is away for some seconds is waited for. Measured, until the error: 3 to 13 s where nothing listens, 33 s
where nothing answers at all, 60 s where a server takes requests and stays silent."""
PARTS_AT_ONCE = 4
"""Parts of 5 MiB that are put at once for a large object; each must arrive within the timeout, over a slow line too."""
METADATA_SERVICE = "latest/api/token"


class Bucket(Place):
    """The objects below `s3://bucket/prefix` (or gs://, az://); the prefix is taken literally."""

    readers = READERS

    def __init__(self, url: str):
        try:
            import obstore
            from obstore.exceptions import BaseError
            from obstore.store import from_url
        except ImportError as error:
            raise InputError(f"{url}: reading a bucket needs obstore; pip install 'actstore[s3]'.") from error
        scheme, _, path = url.partition("://")
        path = path.rstrip("/")
        if {"", ".", ".."} & set(path.split("/")):
            raise InputError(f"{url}: names no place in a bucket; write it as {scheme}://bucket/prefix.")
        self.url = f"{scheme}://{path}"
        self._calls = obstore
        try:
            self.objects = from_url(f"{scheme}://{quote(path)}", client_options=CLIENT, retry_config=RETRIES)
        except (BaseError, ValueError) as error:
            raise InputError(
                f"{url}: {_reason(error)}; write it as {scheme}://bucket/prefix, and check the environment's credentials."
            ) from error

    def read(self, name: str) -> bytes:
        with self._errors(name):
            return bytes(self._calls.get(self.objects, name).bytes())

    def read_into(self, name: str, start: int, *buffers: memoryview) -> int:
        length = sum(buffer.nbytes for buffer in buffers)
        with self._errors(name):
            try:
                received = memoryview(self._calls.get_range(self.objects, name, start=start, length=length)).cast("B")
            except self._calls.exceptions.GenericError as error:
                if "416 Range Not Satisfiable" not in str(error):
                    raise
                return 0
        done = 0
        for buffer in buffers:
            piece = received[done : done + buffer.nbytes]
            buffer.cast("B")[: len(piece)] = piece
            done += len(piece)
        return done

    def n_bytes(self, name: str) -> int | None:
        try:
            with self._errors():
                return int(self._calls.head(self.objects, name)["size"])
        except FileNotFoundError:
            return None

    def names(self, prefix: str = "") -> dict[str, int]:
        with self._errors():
            pages = self._calls.list(self.objects, prefix=prefix or None)
            # An object with no name is the mark by which some tools show an empty folder.
            return {item["path"]: int(item["size"]) for page in pages for item in page if item["path"]}

    def entries(self) -> set[str]:
        with self._errors():
            listing = self._calls.list_with_delimiter(self.objects)
        files = {item["path"] for item in listing["objects"] if item["path"]}
        return files | {prefix.split("/")[-1] for prefix in listing["common_prefixes"]}

    def publish(self, name: str, data: bytes) -> None:
        with self._errors(writing=True):
            self._calls.put(self.objects, name, data, max_concurrency=PARTS_AT_ONCE)

    def create(self, name: str, data: bytes) -> bool:
        with self._errors(writing=True):
            try:
                self._calls.put(self.objects, name, data, mode="create", use_multipart=False)
            except self._calls.exceptions.AlreadyExistsError:
                return False
        return True

    def remove(self, name: str) -> None:
        try:
            with self._errors():
                self._calls.delete(self.objects, name)
        except FileNotFoundError:
            pass

    def clear_leftovers(self) -> None:
        """A PUT that was cut off leaves no object; of a large one, parts that a lifecycle rule of the bucket removes."""

    def require_space(self, needed_bytes: int, what: str) -> None:
        """A bucket has no limit of space."""

    def lock(self) -> AbstractContextManager[None]:
        return held_lease(self)

    @contextmanager
    def _errors(self, name: str = "", *, writing: bool = False) -> Iterator[None]:
        """Turn a server's refusal into one StoreError line, and a missing object into a FileNotFoundError that names it."""
        _require_no_fork(self.url)
        try:
            yield
        except (self._calls.exceptions.BaseError, FileNotFoundError) as error:
            what = _reason(error)
            is_missing = isinstance(error, self._calls.exceptions.NotFoundError | FileNotFoundError)
            if is_missing and not writing and "NoSuchBucket" not in what:
                raise FileNotFoundError(errno.ENOENT, what, f"{self.url}/{name}".rstrip("/")) from error
            raise StoreError(
                f"{self.url}: {what}; check the bucket, its credentials and AWS_ENDPOINT_URL; what was committed is kept."
            ) from error


def _reason(error: Exception) -> str:
    """One line from a server's long answer: its reason, or that it did not answer."""
    story = re.sub(r"<!\[CDATA\[(.*?)\]\]>", r"\1", str(error), flags=re.DOTALL)
    if METADATA_SERVICE in story:
        return "no credentials are set (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) and this machine has none of its own"
    if match := re.search(r"<Code>(.*?)</Code>\s*(?:<Message>(.*?)</Message>)?", story, re.DOTALL):
        return ": ".join(part for part in match.groups() if part).rstrip(". ")
    if match := re.search(r"Error performing \w+ (\w+://[^/\s]+)\S* in .*error sending request", story):
        return f"{match[1]} does not answer"
    if match := re.search(r"Server returned non-2xx status code: (\d+ [A-Z][A-Za-z ]*)", story):
        return f"the server answered {match[1].strip()}"
    return story.split("\n")[0].strip().rstrip(":. ")


_first_process: int | None = None


def _require_no_fork(url: str) -> None:
    """obstore's threads do not live on in a forked process: it would wait for them without end."""
    global _first_process
    if _first_process is None:
        _first_process = os.getpid()
    elif _first_process != os.getpid():
        raise StoreError(
            f"{url}: process {os.getpid()} was forked from {_first_process}, which had opened a bucket, and cannot read "
            "one; start processes by 'spawn' or 'forkserver' (in a DataLoader, multiprocessing_context='forkserver')."
        )
