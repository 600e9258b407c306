"""In: a corpus specification. Out: documents, each a name and its text, in one fixed order.

    stdlib                                    the Python sources on this machine, without tests and tables
    books/*.txt   notes.md.gz   data.jsonl#body   local files, folders or globs; what is read: `sources/opened.py`
    hf:owner/name[:config][:split][#column]   streamed with the `datasets` library, in its own order

Local text is listed as pieces (a .py file; 8 KiB of lines of a text file; a run of lines of a .jsonl file; a row group of a
.parquet file; a file of another kind, or a packed one, as a whole) and the pieces are permuted by the seed, so that the
first N tokens are a sample of the whole corpus and not its first file. A piece is found by its byte range: listing hashes
files and keeps no text.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actstore.errors import InputError
from actstore.plan import DOCUMENT_ORDER, permutation
from pipelines.text.document import Document
from pipelines.text.sources.csv_files import CsvFile
from pipelines.text.sources.decoding import HEAD_BYTES, require_not_utf16
from pipelines.text.sources.hub_dataset import hub_piece
from pipelines.text.sources.json_files import json_pieces
from pipelines.text.sources.opened import CSV, JSON, JSON_LINES, PARQUET, READ, SOURCE, kind_of, opened, suffix_shown
from pipelines.text.sources.parquet_files import parquet_pieces
from pipelines.text.sources.records import DEFAULT_COLUMN
from pipelines.text.sources.text_files import SourceFile, text_pieces

KINDS_SHOWN = 5


@dataclass(frozen=True)
class Corpus:
    """A named, ordered set of documents that can be read again from any document on.

    `spec` can be encoded, which the name of a file need not be. `skipped` says how many of the named files are left out, and
    of which kinds; empty where none.
    """

    spec: str
    fingerprint: str
    pieces: tuple[Any, ...]
    skipped: str = ""

    def documents(self, skip: int = 0) -> Iterator[Document]:
        """Every document after the first `skip`; empty texts are left out."""
        stream = (document for piece in self.pieces for document in piece.documents() if document.text)
        for _ in range(skip):
            if next(stream, None) is None:
                return
        yield from stream


def open_corpus(spec: str, seed: int) -> Corpus:
    """The corpus a specification names. Raises InputError when it names nothing that can be read."""
    if spec == "stdlib":
        from pipelines.shared.stdlib_sources import stdlib_files

        try:
            files = [(file.path, file.name) for file in stdlib_files()]
        except FileNotFoundError as error:
            raise InputError(f"corpus {spec}: {error}.") from error
        return _local(spec, files, None, seed)
    if spec.startswith("hf:"):
        location, column = _split_column(spec.removeprefix("hf:"))
        piece, fingerprint = hub_piece(location, column or DEFAULT_COLUMN)
        return Corpus(_printable(spec), fingerprint, (piece,))
    found, column = _files_of(spec), None
    if not found:
        pattern, column = _split_column(spec)
        found = _files_of(pattern)
    paths = [path for path in found if kind_of(path)]
    skipped = _skipped([path for path in found if not kind_of(path)])
    if not found:
        raise InputError(f"corpus {spec}: no file there; check the path, or use `stdlib` or `hf:owner/name`.")
    if not paths:
        raise InputError(f"corpus {spec}: {skipped}; read are {READ}.")
    parent = paths[0].parent if len(paths) == 1 else Path(*_common_parts(paths))
    return _local(spec, [(path, _printable(path.relative_to(parent).as_posix())) for path in paths], column, seed, skipped)


def _skipped(paths: list[Path]) -> str:
    """How many files are not read, and of which kinds: `3 files of a kind that is not read (.pdf 2, no suffix 1)`."""
    if not paths:
        return ""
    kinds = [f"{suffix} {n:,}" for suffix, n in Counter(map(suffix_shown, paths)).most_common()]
    more = [f"{len(kinds) - KINDS_SHOWN:,} other kinds"] if len(kinds) > KINDS_SHOWN else []
    noun = "file" if len(paths) == 1 else "files"
    return f"{len(paths):,} {noun} of a kind that is not read ({', '.join(kinds[:KINDS_SHOWN] + more)})"


def _local(spec: str, files: list[tuple[Path, str]], column: str | None, seed: int, skipped: str = "") -> Corpus:
    digest = hashlib.sha256()
    pieces: list[Any] = []
    for path, name in files:
        try:
            with open(path, "rb") as file:
                content = hashlib.file_digest(file, "sha256").digest()
                n_bytes = file.tell()
        except OSError as error:
            raise InputError(f"corpus {spec}: cannot read {path}: {error.strerror}; check its permissions.") from error
        digest.update(name.encode() + b"\0" + content)
        pieces.extend(_pieces_of(path, name, n_bytes, column))
    order = permutation(len(pieces), seed, DOCUMENT_ORDER)
    return Corpus(_printable(spec), digest.hexdigest(), tuple(pieces[i] for i in order), skipped)


def _pieces_of(path: Path, name: str, n_bytes: int, column: str | None) -> list[Any]:
    kind = kind_of(path)
    chosen = column or DEFAULT_COLUMN
    if kind in PARQUET:
        return list(parquet_pieces(path, name, chosen))
    if column is not None and kind not in JSON_LINES + JSON + CSV:
        raise InputError(f"{path}: a {kind} file has no column {column!r}; leave `#{column}` out.")
    with opened(path) as file:
        head = file.read(HEAD_BYTES)
    if not head:
        return []
    require_not_utf16(head, path)
    if kind in SOURCE:
        return [SourceFile(path, name)]
    if kind in JSON_LINES + JSON:
        return list(json_pieces(path, name, n_bytes, chosen, is_lines=kind in JSON_LINES))
    if kind in CSV:
        return [CsvFile(path, name, chosen, "\t" if kind == ".tsv" else ",")]
    return list(text_pieces(path, name, n_bytes))


def _printable(name: str) -> str:
    """A name as text that can be encoded, in one line, since a store keeps a name a line; whatever bytes it has."""
    return os.fsencode(name).decode(errors="replace").replace("\n", "⏎")


def _split_column(spec: str) -> tuple[str, str | None]:
    pattern, mark, column = spec.rpartition("#")
    return (pattern, column) if mark else (spec, None)


def _files_of(pattern: str) -> list[Path]:
    """The files of a folder, a file or a glob, sorted; a file of that very name comes before the glob."""
    path = Path(pattern)
    if not pattern:
        return []
    if path.is_dir():
        paths = list(path.rglob("*"))
    elif path.is_file():
        paths = [path]
    else:
        paths = [Path(name) for name in glob.glob(pattern, recursive=True)]
    return sorted(path for path in paths if path.is_file())


def _common_parts(paths: list[Path]) -> tuple[str, ...]:
    common = []
    for parts in zip(*(path.parent.parts for path in paths), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return tuple(common)
