"""In: a corpus specification. Out: documents, each a name and its text, in one fixed order.

    stdlib                                    the Python sources on this machine, without tests and tables
    books/*.txt   notes.md   data.jsonl#body  local .txt .md .py .jsonl .parquet files, folders or globs
    hf:owner/name[:config][:split][#column]   streamed with the `datasets` library, in its own order

Local text is listed as pieces (a .py file; 8 KiB of lines of a .txt or .md file; a run of lines of a .jsonl file;
a row group of a .parquet file) and the pieces are permuted by the seed, so that the first N tokens are a sample of
the whole corpus and not its first file. A piece is found by its byte range: listing hashes files and keeps no text.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import tokenize
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actstore.errors import InputError
from actstore.plan import DOCUMENT_ORDER, permutation
from pipelines.shared.hub_connection import go_offline_if_unreachable

SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".parquet")
TEXT_PIECE_BYTES = 8 << 10
JSONL_PIECE_BYTES = 1 << 20
DEFAULT_COLUMN = "text"


@dataclass(frozen=True)
class Document:
    """One text and where it came from."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """A named, ordered set of documents that can be read again from any document on."""

    spec: str
    fingerprint: str
    pieces: tuple[Any, ...]

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
        return _hub(spec)
    paths, column = _files_of(spec), None
    if not paths:
        pattern, column = _split_column(spec)
        paths = _files_of(pattern)
    if not paths:
        raise InputError(
            f"corpus {spec}: no {', '.join(SUFFIXES)} file there; check the path, or use `stdlib` or `hf:owner/name`."
        )
    parent = paths[0].parent if len(paths) == 1 else Path(*_common_parts(paths))
    return _local(spec, [(path, _printable(path.relative_to(parent))) for path in paths], column, seed)


@dataclass(frozen=True)
class _TextPiece:
    """The lines of a text file that begin in the byte range [start, stop)."""

    path: Path
    name: str
    start: int
    stop: int

    def documents(self) -> Iterator[Document]:
        begin, data = _lines_in_range(self.path, self.start, self.stop)
        encoding = _source_encoding(data, self.path) if self.path.suffix == ".py" else "utf-8"
        yield Document(self.name, _decoded(data, encoding, self.path, begin))


@dataclass(frozen=True)
class _JsonlPiece:
    """The records of a .jsonl file that begin in the byte range [start, stop)."""

    path: Path
    name: str
    start: int
    stop: int
    column: str

    def documents(self) -> Iterator[Document]:
        begin, data = _lines_in_range(self.path, self.start, self.stop)
        # str.splitlines would also cut at U+2028 and the like, which JSON strings may hold as they are
        for index, line in enumerate(_decoded(data, "utf-8", self.path, begin).split("\n")):
            if line.strip():
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise InputError(f"{self.path}: not a line of JSON ({error}): {line[:60]!r}") from error
                yield Document(f"{self.name}:{index}", _column_of(record, self.column, self.path))


@dataclass(frozen=True)
class _ParquetPiece:
    """One row group of a .parquet file."""

    path: Path
    name: str
    row_group: int
    column: str

    def documents(self) -> Iterator[Document]:
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(self.path) as file:
            if self.column not in file.schema_arrow.names:
                raise _no_column(self.column, file.schema_arrow.names, self.path)
            with _parquet_errors(self.path):
                group = file.read_row_group(self.row_group, columns=[self.column])
            for index, text in enumerate(group[self.column].to_pylist()):
                yield Document(f"{self.name}:{index}", _text_of(text))


@dataclass(frozen=True)
class _HubPiece:
    """A split of a dataset, streamed; its network errors come out as one line."""

    name: str
    config: str | None
    split: str
    column: str

    def documents(self) -> Iterator[Document]:
        with _hub_errors(self.name):
            import datasets

            stream = datasets.load_dataset(self.name, self.config, split=self.split, streaming=True)
            for index, record in enumerate(stream):
                yield Document(f"{self.name}:{self.split}:{index}", _column_of(record, self.column, self.name))


def _local(spec: str, files: list[tuple[Path, str]], column: str | None, seed: int) -> Corpus:
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
    return Corpus(spec, digest.hexdigest(), tuple(pieces[i] for i in order))


def _pieces_of(path: Path, name: str, n_bytes: int, column: str | None) -> list[Any]:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        with _parquet_errors(path):
            n_groups = pyarrow.parquet.read_metadata(path).num_row_groups
        return [_ParquetPiece(path, f"{name}:{group}", group, column or DEFAULT_COLUMN) for group in range(n_groups)]
    if column is not None and path.suffix != ".jsonl":
        raise InputError(f"{path}: a {path.suffix} file has no column {column!r}; leave `#{column}` out.")
    if path.suffix == ".py":
        return [_TextPiece(path, name, 0, n_bytes)]
    piece_bytes = JSONL_PIECE_BYTES if path.suffix == ".jsonl" else TEXT_PIECE_BYTES
    ranges = [(start, min(start + piece_bytes, n_bytes)) for start in range(0, n_bytes, piece_bytes)]
    names = [name if len(ranges) == 1 else f"{name}@{start}" for start, _ in ranges]
    if path.suffix == ".jsonl":
        return [_JsonlPiece(path, n, *r, column or DEFAULT_COLUMN) for n, r in zip(names, ranges, strict=True)]
    return [_TextPiece(path, n, *r) for n, r in zip(names, ranges, strict=True)]


def _lines_in_range(path: Path, start: int, stop: int) -> tuple[int, bytes]:
    """Whole lines whose first byte lies in [start, stop), and where they begin: every line of a file is in one range."""
    with open(path, "rb") as file:
        if start:
            file.seek(start - 1)
            file.readline(stop - start + 1)  # no further: a file of one line would be read to its end in every range
        begin = file.tell()
        if begin >= stop:
            return begin, b""
        data = file.read(stop - begin)
        return begin, data if data.endswith(b"\n") else data + file.readline()


def _source_encoding(data: bytes, path: Path) -> str:
    """The encoding of a Python source: that of its coding line, else UTF-8."""
    try:
        encoding = tokenize.detect_encoding(io.BytesIO(data).readline)[0]
    except SyntaxError as error:
        raise InputError(f"{path}: {error.msg}; convert the file to UTF-8.") from error
    return encoding.removesuffix("-sig")


def _decoded(data: bytes, encoding: str, path: Path, begin: int) -> str:
    """Text of bytes that begin at byte `begin` of a file, without a byte-order mark at the file's start."""
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {begin + error.start} is not {encoding}; convert the file to UTF-8.") from error
    return text if begin else text.removeprefix("\ufeff")


def _printable(name: Path) -> str:
    """A file's name as text that can be encoded, in one line, since a store keeps a name a line; whatever bytes it has."""
    return os.fsencode(name.as_posix()).decode(errors="replace").replace("\n", "⏎")


def _column_of(record: Any, column: str, where: object) -> str:
    if not isinstance(record, dict) or column not in record:
        raise _no_column(column, list(record) if isinstance(record, dict) else [], where)
    return _text_of(record[column])


def _text_of(value: Any) -> str:
    """A column's value as text; nothing for a null."""
    return "" if value is None else str(value)


def _no_column(column: str, there: list[str], where: object) -> InputError:
    return InputError(f"corpus {where}: no column {column!r}; it has {', '.join(there) or 'none'}: choose one with #column.")


def _split_column(spec: str) -> tuple[str, str | None]:
    pattern, mark, column = spec.rpartition("#")
    return (pattern, column) if mark else (spec, None)


def _files_of(pattern: str) -> list[Path]:
    """The text files of a folder, a file or a glob, sorted; a file of that very name comes before the glob."""
    path = Path(pattern)
    if path.is_dir():
        paths = list(path.rglob("*"))
    elif path.is_file():
        paths = [path]
    else:
        paths = [Path(name) for name in glob.glob(pattern, recursive=True)]
    return sorted(path for path in paths if path.suffix in SUFFIXES and path.is_file())


def _common_parts(paths: list[Path]) -> tuple[str, ...]:
    common = []
    for parts in zip(*(path.parent.parts for path in paths), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return tuple(common)


def _hub(spec: str) -> Corpus:
    location, column = _split_column(spec.removeprefix("hf:"))
    name, *rest = location.split(":")
    config = rest[0] if len(rest) > 1 else None
    split = rest[-1] if rest else "train"
    if not Path(name).exists():
        go_offline_if_unreachable()
    with _hub_errors(name):
        import datasets

        builder = datasets.load_dataset_builder(name, config)
        fingerprint = hashlib.sha256(f"{builder.config_id} {builder.hash}".encode()).hexdigest()
    return Corpus(spec, fingerprint, (_HubPiece(name, config, split, column or DEFAULT_COLUMN),))


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """Whatever the hub client raises becomes one line; our own errors pass through."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"corpus hf:{name}: cannot be streamed ({reason}); check the name and the network, or use local files."
        ) from error


@contextmanager
def _parquet_errors(path: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except pyarrow.ArrowException as error:
        raise InputError(
            f"{path}: not a readable parquet file ({str(error).splitlines()[0]}); restore it from a copy."
        ) from error
