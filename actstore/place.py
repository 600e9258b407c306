"""Where a store's objects lie: a folder, or a prefix of a bucket. Bytes by name, and who may write.

Names are relative, with `/`. An object is published whole or not at all, and is durable when `publish` returns. The
rest of the package knows no other way to touch a disk or a server.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager


class Place(ABC):
    """The objects below one folder or prefix."""

    url: str
    """The name by which a user and another process open the place."""
    readers: int
    """Reads at a time: the number of cores for a disk, more for a distant server."""

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
        """Put a whole object under its name, durably; an object of that name is replaced."""

    @abstractmethod
    def create(self, name: str, data: bytes) -> bool:
        """`publish`, unless the name is taken. Of several processes that try, exactly one gets True."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove an object, if it is there."""

    @abstractmethod
    def clear_leftovers(self) -> None:
        """Remove half-written objects of killed writers. The caller holds the lock."""

    @abstractmethod
    def lock(self) -> AbstractContextManager[None]:
        """A context in which this process alone may write. Raises LockedStore while another one does."""

    @abstractmethod
    def require_space(self, needed_bytes: int, what: str) -> None:
        """Raises NoSpace, before anything is written, when `needed_bytes` do not fit."""

    def exists(self, name: str) -> bool:
        return self.n_bytes(name) is not None
