"""Where a store's objects lie: a folder, or a prefix of a bucket. Bytes by name, and who may write.

Names are relative, with `/`. An object is published whole or not at all, and is durable when `publish` returns. The
rest of the package knows no other way to touch a disk or a server.
"""

from __future__ import annotations

import errno
import os
import stat
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from actstore.errors import InputError
from actstore.files import fsync_path, publish_bytes, require_free_space, write_beside
from actstore.lease import held_lease, held_lock

LOCK = "lock"
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK)
BUCKET_SCHEMES = ("s3", "gs", "az")


class Place(ABC):
    """The objects below one folder or prefix."""

    url: str
    """How a user names it, and how another process opens it."""
    readers: int
    """How many reads at a time are worth it: cores for a disk, more for a server that is far away."""

    def __str__(self) -> str:
        return self.url

    @abstractmethod
    def read(self, name: str) -> bytes:
        """A whole object. Raises FileNotFoundError."""

    @abstractmethod
    def read_into(self, name: str, start: int, *buffers: memoryview) -> int:
        """Fill the buffers, one after another, with an object's bytes from `start` on; how many there were.

        Raises FileNotFoundError.
        """

    @abstractmethod
    def n_bytes(self, name: str) -> int | None:
        """Length of an object; None when there is none."""

    @abstractmethod
    def names(self, prefix: str = "") -> dict[str, int]:
        """Length of every object whose name begins with the folder `prefix`."""

    @abstractmethod
    def entries(self) -> set[str]:
        """What lies directly at the place: first parts of names. A file in place of a folder is an entry `.`."""

    @abstractmethod
    def publish(self, name: str, data: bytes) -> None:
        """Put a whole object under its name, in place of any that was there, and onto the disk."""

    @abstractmethod
    def create(self, name: str, data: bytes) -> bool:
        """`publish`, unless the name is taken: of several who try, one is told True."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove an object, if it is there."""

    @abstractmethod
    def clear_leftovers(self) -> None:
        """Remove what killed writers left half-written. For the one who holds the lock."""

    @abstractmethod
    def lock(self) -> AbstractContextManager[None]:
        """A context in which this process alone may write. Raises LockedStore while another one does."""

    @abstractmethod
    def require_space(self, needed_bytes: int, what: str) -> None:
        """Raises NoSpace, before anything is written, when `needed_bytes` do not fit."""

    def exists(self, name: str) -> bool:
        return self.n_bytes(name) is not None


class Folder(Place):
    """A folder of a file system."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.url = str(path)
        self.readers = max(1, min(4, len(os.sched_getaffinity(0))))

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def read_into(self, name: str, start: int, *buffers: memoryview) -> int:
        descriptor = os.open(f"{self.url}/{name}", os.O_RDONLY)
        try:
            return os.preadv(descriptor, buffers, start)
        finally:
            os.close(descriptor)

    def n_bytes(self, name: str) -> int | None:
        try:
            return (self.path / name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def names(self, prefix: str = "") -> dict[str, int]:
        found = {}
        for file in (self.path / prefix).rglob("*"):
            if not is_temporary(file.name):
                with suppress(FileNotFoundError):  # a writer may remove it meanwhile
                    status = file.stat()
                    if stat.S_ISREG(status.st_mode):
                        found[file.relative_to(self.path).as_posix()] = status.st_size
        return found

    def entries(self) -> set[str]:
        if not self.path.exists():
            return set()
        return {entry.name for entry in self.path.iterdir()} if self.path.is_dir() else {"."}

    def publish(self, name: str, data: bytes) -> None:
        publish_bytes(self.path / name, data, _own_mark())

    def create(self, name: str, data: bytes) -> bool:
        path = self.path / name
        temporary = write_beside(path, data, _own_mark())
        try:
            os.link(temporary, path)  # unlike a rename, fails when the name is taken
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            if path.exists():
                return False
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        fsync_path(path.parent)
        return True

    def remove(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def clear_leftovers(self) -> None:
        for file in self.path.rglob(".*.tmp"):
            file.unlink(missing_ok=True)

    @contextmanager
    def lock(self) -> Iterator[None]:
        self.path.mkdir(parents=True, exist_ok=True)
        with held_lock(self.path / LOCK) as works:
            if works:
                yield
                return
            with held_lease(self):  # a file system without locks
                yield

    def require_space(self, needed_bytes: int, what: str) -> None:
        require_free_space(self.path, needed_bytes, what)


def _own_mark() -> str:
    """Of the temporary files of one publication: several workers may publish the same object at the same time."""
    return f".{uuid.uuid4().hex[:8]}"


def is_temporary(file_name: str) -> bool:
    """Whether a file is one that is being published, or that a killed writer left."""
    return file_name.startswith(".") and file_name.endswith(".tmp")


def absolute(url: str | Path) -> str:
    """A place as a process with another working folder finds it."""
    return str(url) if "://" in str(url) else str(Path(url).absolute())


def open_place(url: str | Path | Place) -> Place:
    """The place a path, a URL such as s3://bucket/prefix, or a place names. Raises InputError for an unknown scheme."""
    if isinstance(url, Place):
        return url
    scheme, separator, _ = str(url).partition("://")
    if not separator:
        return Folder(url)
    if scheme not in BUCKET_SCHEMES:
        raise InputError(f"{url}: scheme {scheme!r} is not known; use a path or one of {', '.join(BUCKET_SCHEMES)}.")
    from actstore.bucket import Bucket

    return Bucket(str(url))
