"""The standard library's own sources, as a text corpus that needs no download.

`stdlib_files()` lists the hand-written `.py` files of the running Python, sorted by module name: the same Python always
gives the same list. Tests, third-party and bundled packages, build configuration and machine-written tables are left out;
the tables are data in the form of source, and would teach a language model nothing but digits. This module imports only the
standard library.
"""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

TEST_DIRECTORIES = frozenset({"test", "tests", "idle_test"})
OTHER_DIRECTORIES = frozenset({"__pycache__", "site-packages", "dist-packages", "_bundled", "lib-dynload"})
TABLE_MODULES = frozenset({"html.entities", "pydoc_data.topics", "stringprep"})
CHARMAP_MARKS = (b"charmap_build(", b"decoding_map = ", b"gencodec.py")


@dataclass(frozen=True)
class StdlibFile:
    """One source file: its dotted module name, its top-level package or module, and its path."""

    name: str
    package: str
    path: Path


def is_test_module(relative: Path) -> bool:
    """Whether a path relative to the library is a test: it lies in a test folder or is named like a test."""
    if not TEST_DIRECTORIES.isdisjoint(relative.parts[:-1]):
        return True
    return any(
        part in TEST_DIRECTORIES or part.startswith("test_") or part.endswith(("_test", "_tests"))
        for part in relative.with_suffix("").parts
    )


def is_machine_made(name: str, path: Path) -> bool:
    """Whether a module is a table written by a program.

    True for `TABLE_MODULES`, for `_sysconfigdata*` (the recorded build variables), and for every module of `encodings` that
    holds a character map (`gencodec.py` wrote these, or was their model).
    """
    if name in TABLE_MODULES or name.startswith("_sysconfigdata"):
        return True
    if not name.startswith("encodings."):
        return False
    content = path.read_bytes()
    return any(mark in content for mark in CHARMAP_MARKS)


def module_name(relative: Path) -> str:
    """The dotted name of a source file, given its path relative to the library: `json/__init__.py` -> `json`."""
    parts = list(relative.with_suffix("").parts)
    if parts[-1] == "__init__" and len(parts) > 1:
        parts.pop()
    return ".".join(parts)


def stdlib_files(root: Path | None = None) -> list[StdlibFile]:
    """The hand-written modules of the standard library under `root`, sorted by name.

    `root` is the library's folder; the default is that of the running Python.
    """
    library = Path(sysconfig.get_path("stdlib")) if root is None else root
    if not library.is_dir():
        raise FileNotFoundError(f"standard library folder {library} does not exist; use a Python installed with its sources")
    files = []
    for path in library.rglob("*.py"):
        relative = path.relative_to(library)
        folders = relative.parts[:-1]
        if not OTHER_DIRECTORIES.isdisjoint(folders) or any(f.startswith("config-") for f in folders):
            continue
        if is_test_module(relative):
            continue
        name = module_name(relative)
        if path.stat().st_size > 0 and not is_machine_made(name, path):
            files.append(StdlibFile(name=name, package=relative.with_suffix("").parts[0], path=path))
    return sorted(files, key=lambda file: file.name)
