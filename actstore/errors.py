"""Errors that a user can mend. Each message names the thing, both values where there are two, and the remedy.

A bug in this project raises anything else; the command line shows these as one line and a bug as a traceback.
"""

from __future__ import annotations

import re


class ActstoreError(Exception):
    """Base of everything a user, their input or their disk can cause."""


class InputError(ActstoreError):
    """The input cannot give what a stage was asked for."""


class StoreError(ActstoreError):
    """Base of the errors of a store on disk."""


class NotAStore(StoreError):
    """The path holds no store, or one of another kind or format version."""


class IncompleteStore(StoreError):
    """The store is half-written: some shards have no commit record yet."""


class DamagedStore(StoreError):
    """An object is missing, or its bytes differ from what was committed."""


class IdentityMismatch(StoreError):
    """Two things that must come from the same model, corpus or policy do not."""


class WidthMismatch(StoreError):
    """Two things that must have the same width do not."""


class OutputExists(StoreError):
    """The output is already there; nothing is overwritten."""


class NoSpace(StoreError):
    """The disk cannot hold what was asked for."""


class LockedStore(StoreError):
    """Another process is writing there."""


class EncodingError(StoreError):
    """A value cannot be kept in the chosen encoding; `row` is its row in the array that was to be encoded."""

    def __init__(self, message: str, row: int):
        super().__init__(message)
        self.row = row

    def at(self, site: str, document: str, token: int, position: int) -> EncodingError:
        """The same error, with where its row stands: a token of its segment's table, a position of its window."""
        where = f"{document}, token {token} of the segment's table, position {position} of its window"
        return type(self)(f"{site}: {where}: {self}", self.row)

    def __reduce__(self) -> tuple[type[EncodingError], tuple[str, int]]:
        """Lets the error pass from a worker process to the process that asked."""
        return type(self), (str(self), self.row)


def system_error(error: BaseException) -> int | None:
    """The number of the operating system's error that a library written in Rust puts into its message; None without one.

    >>> system_error(RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"))
    28
    """
    match = re.search(r"\(os error (\d+)\)", str(error))
    return int(match[1]) if match else None
