"""Which files are read, by their suffixes in any case; and their bytes, unpacked where they are packed."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from actstore.errors import InputError

TEXT = (".txt", ".text", ".md", ".rst")
SOURCE = (".py",)
JSON_LINES = (".jsonl", ".ndjson")
JSON = (".json",)
CSV = (".csv", ".tsv")
PARQUET = (".parquet",)
PACKED = (".gz", ".bz2", ".xz", ".zst")
READ = f"{', '.join((*TEXT, *SOURCE, *JSON_LINES, *JSON, *CSV))}, each also followed by {', '.join(PACKED)}; and .parquet"


def kind_of(path: Path) -> str:
    """The suffix that says how a file is read, in lower case; empty for a file that is not read.

    >>> [kind_of(Path(name)) for name in ("a.TXT", "b.jsonl.gz", "c.pdf", "d.parquet.gz", "e.gz")]
    ['.txt', '.jsonl', '', '', '']
    """
    suffixes = _suffixes(path)
    packed = suffixes[-1:] if suffixes[-1:] in [[suffix] for suffix in PACKED] else []
    kind = suffixes[-1 - len(packed)] if len(suffixes) > len(packed) else ""
    return kind if kind in TEXT + SOURCE + JSON_LINES + JSON + CSV or (kind in PARQUET and not packed) else ""


def is_packed(path: Path) -> bool:
    return path.suffix.lower() in PACKED


def suffix_shown(path: Path) -> str:
    """A file's suffix for a message: `.tar.gz`, `.pdf`, `no suffix`."""
    suffixes = _suffixes(path)
    return "".join(suffixes[-2:] if is_packed(path) else suffixes[-1:]) or "no suffix"


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """A file's bytes, unpacked. Raises InputError, also while it is read, when the packed file is damaged or cut short."""
    try:
        with _unpacked(path) as file:
            yield file
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise InputError(f"{path}: cannot be read ({error.strerror}); check the file and its permissions.") from error
        raise InputError(f"{path}: not a whole {path.suffix} file ({error}); restore it from a copy.") from error


def _unpacked(path: Path) -> IO[bytes]:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast(IO[bytes], gzip.open(path))
    if suffix == ".bz2":
        return bz2.open(path)
    if suffix == ".xz":
        return lzma.open(path)
    if suffix == ".zst":
        import io

        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(open(path, "rb"), compression="zstd"))
    return open(path, "rb")


def _suffixes(path: Path) -> list[str]:
    return [suffix.lower() for suffix in path.suffixes]
