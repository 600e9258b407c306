"""Errors of other libraries and of the machine as one line: the first line of any error, and the line of those that a user
can mend. A bug has none, and shows its traceback."""

from __future__ import annotations

import errno
import os
import re
import resource
from collections.abc import Iterator
from pathlib import Path

from actstore.errors import ActstoreError, system_error

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_MEMORY = re.compile(
    r"can't allocate memory|cannot allocate memory|out of memory|failed to map segment|bad_alloc|ALLOC_FAILED|"
    r"unable to mmap|can't start new thread|failed to spawn thread|Resource temporarily unavailable",
    re.IGNORECASE,
)
"""How PyTorch, CUDA, cuBLAS, C++, the loader of libraries and Rust say that memory, or the room for a thread, is used up."""
DEVICE_MEMORY = re.compile(r"CUDA|CUBLAS|HIP|MPS", re.IGNORECASE)
NEAR = 0.9
SHOWN_CHARACTERS = 40
OF_RUST = ("SafetensorError", "PanicException")
KEPT = "everything committed is kept"


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type when it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".") if lines else type(error).__name__


def mendable_line(error: BaseException) -> str | None:
    """What to tell a user of an error that they, their disk or their machine caused; None for a bug.

    >>> mendable_line(MemoryError()).split("; ")[0]
    'memory: used up (MemoryError)'
    >>> mendable_line(OSError(errno.ENOSPC, "No space left on device", "run/sae.safetensors")).split(";")[0]
    'run/sae.safetensors: No space left on device'
    >>> mendable_line(KeyError("a bug")) is None
    True
    """
    if isinstance(error, ActstoreError):
        return str(error).strip()
    if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
        # a byte of an argument that is not UTF-8, half a character of JSON
        shown = ascii(error.object[max(0, error.start - SHOWN_CHARACTERS) : error.end])
        return f"{shown}: ends in what UTF-8 cannot encode; rename it, or pass it in UTF-8."
    if (memory := _memory_error(error)) is not None:
        where = "the device's memory" if DEVICE_MEMORY.search(str(memory)) else "memory"
        return (
            f"{where}: used up ({first_line(memory)[:200]}); ask for less at once (a smaller --batch, fewer --workers or "
            f"--features), or take a machine with more; {KEPT}."
        )
    number = error.errno if isinstance(error, OSError) else system_error(error)
    if number in FULL_DISK:
        where, said = getattr(error, "filename", None) or "the output", os.strerror(number)
        return f"{where}: {said}; free some space and run the same command again; {KEPT}."
    if isinstance(error, OSError) and error.filename:
        said = " ".join((error.strerror or first_line(error)).split())
        return f"{error.filename}: {said}; check the path and its permissions; {KEPT}."
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is, or was raised while handling, that memory is used up."""
    return _memory_error(error) is not None


def _memory_error(error: BaseException) -> BaseException | None:
    return next(filter(_is_memory, _chain(error)), None)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and those during whose handling it was raised: an import that fails for want of memory has many."""
    seen: list[BaseException] = []
    while error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__ or error


def _is_memory(error: BaseException) -> bool:
    """Whether memory is used up: by Python's own type, by the words of a library that has no type for it, or because a
    module could not be loaded while hardly any memory of this process's limit is left."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    if isinstance(error, ImportError | SystemError) and _limit_is_near():
        return True
    of_library = isinstance(error, RuntimeError | ImportError) or type(error).__name__ in OF_RUST
    return of_library and NO_MEMORY.search(str(error)) is not None


def _limit_is_near() -> bool:
    """Whether this process has nine tenths of the memory that it may have at most (`ulimit -v`)."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return False
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return False
    return pages * resource.getpagesize() > NEAR * limit
