"""Errors as one line: which of them are expected, what is printed of these, and the first line of another library's."""

from __future__ import annotations

import errno

from actstore.errors import ActstoreError

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
SHOWN_CHARACTERS = 40
NO_MEMORY = ("out of memory", "allocate memory", "not enough memory", "start new thread", "map segment", "bad_alloc")
"""What libraries say when memory is refused."""


def is_expected(error: Exception) -> bool:
    """Whether an error is one that input, a disk or a machine can cause; any other is a fault of this program."""
    if isinstance(error, OSError) and not isinstance(error, ActstoreError):
        return bool(error.filename) or error.errno in (*FULL_DISK, errno.ENOMEM)
    if isinstance(error, UnicodeEncodeError):  # a byte of an argument that is not UTF-8, half a character of JSON
        return error.reason == "surrogates not allowed"
    return isinstance(error, ActstoreError) or is_out_of_memory(error)


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory was refused: libraries say so by several types, of which only some are known before they are loaded."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in NO_MEMORY)


def error_line(error: Exception) -> str:
    """What is printed of an error that is expected: the thing, what was wrong, and the remedy."""
    if isinstance(error, UnicodeEncodeError):
        shown = ascii(error.object[max(0, error.start - SHOWN_CHARACTERS) : error.end])
        return f"{shown}: ends in what UTF-8 cannot encode; rename it, or pass it in UTF-8."
    if not isinstance(error, ActstoreError) and is_out_of_memory(error):
        detail = " ".join(str(error).split())[:200] or type(error).__name__
        return (
            f"not enough memory ({detail}); do less at a time (a smaller --batch or --batch-windows, fewer --workers), or "
            "use a machine with more; everything committed is kept."
        )
    if isinstance(error, OSError) and not isinstance(error, ActstoreError):
        where = error.filename or "the output"
        remedy = (
            "free some space and run the same command again"
            if error.errno in FULL_DISK
            else "check the path and its permissions"
        )
        return f"{where}: {error.strerror}; {remedy}; everything committed is kept."
    return str(error).strip()


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type when it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".") if lines else type(error).__name__
