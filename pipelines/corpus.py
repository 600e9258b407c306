"""In: a corpus specification. Out: documents, each a name and its text, in one fixed order.

    stdlib                                    the Python sources on this machine, without tests and tables
    books/*.txt   notes.md   data.jsonl#body  local .txt .md .py .jsonl .parquet files, folders or globs
    hf:owner/name[:config][:split][#column]   streamed with the `datasets` library, in its own order

Local text is listed as pieces (a .py file; 8 KiB of lines of a .txt or .md file; a run of lines of a .jsonl file;
a row group of a .parquet file) and the pieces are permuted by the seed, so that the first N tokens are a sample of
the whole corpus and not its first file. A piece is found by its byte range, so listing reads no text.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actstore.errors import InputError
from actstore.plan import DOCUMENT_ORDER, permutation

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
        from pipelines.stdlib import stdlib_files

        files = [(file.path, file.name) for file in stdlib_files()]
        return _local(spec, files, None, seed)
    if spec.startswith("hf:"):
        return _hub(spec)
    pattern, column = (spec, None) if Path(spec).exists() else _split_column(spec)
    paths = _files_of(pattern)
    if not paths:
        raise InputError(
            f"corpus {spec}: no {', '.join(SUFFIXES)} file there; check the path, or use `stdlib` or `hf:owner/name`."
        )
    parent = paths[0].parent if len(paths) == 1 else Path(*_common_parts(paths))
    return _local(spec, [(path, path.relative_to(parent).as_posix()) for path in paths], column, seed)


@dataclass(frozen=True)
class _TextPiece:
    """The lines of a text file that begin in the byte range [start, stop)."""

    path: Path
    name: str
    start: int
    stop: int

    def documents(self) -> Iterator[Document]:
        data = _lines_in_range(self.path, self.start, self.stop)
        if self.path.suffix == ".py":
            encoding = tokenize.detect_encoding(io.BytesIO(data).readline)[0]
            yield Document(self.name, _decoded(data, encoding, self.path))
        else:
            yield Document(self.name, _decoded(data, "utf-8-sig", self.path))


@dataclass(frozen=True)
class _JsonlPiece:
    """The records of a .jsonl file that begin in the byte range [start, stop)."""

    path: Path
    name: str
    start: int
    stop: int
    column: str

    def documents(self) -> Iterator[Document]:
        data = _decoded(_lines_in_range(self.path, self.start, self.stop), "utf-8-sig", self.path)
        for index, line in enumerate(data.splitlines()):
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
            for index, text in enumerate(
                file.read_row_group(self.row_group, columns=[self.column])[self.column].to_pylist()
            ):
                yield Document(f"{self.name}:{index}", text or "")


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
            content = path.read_bytes()
        except OSError as error:
            raise InputError(f"corpus {spec}: cannot read {path}: {error.strerror}.") from error
        digest.update(name.encode() + b"\0" + hashlib.sha256(content).digest())
        pieces.extend(_pieces_of(path, name, len(content), column))
    order = permutation(len(pieces), seed, DOCUMENT_ORDER)
    return Corpus(spec, digest.hexdigest(), tuple(pieces[i] for i in order))


def _pieces_of(path: Path, name: str, n_bytes: int, column: str | None) -> list[Any]:
    if path.suffix == ".parquet":
        import pyarrow.parquet

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


def _lines_in_range(path: Path, start: int, stop: int) -> bytes:
    """Whole lines whose first byte lies in [start, stop): every line of a file is in one range."""
    with open(path, "rb") as file:
        if start:
            file.seek(start - 1)
            file.readline()
        begin = file.tell()
        if begin >= stop:
            return b""
        data = file.read(stop - begin)
        return data if data.endswith(b"\n") else data + file.readline()


def _decoded(data: bytes, encoding: str, path: Path) -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not {encoding}; convert the file to UTF-8.") from error


def _column_of(record: Any, column: str, where: object) -> str:
    if not isinstance(record, dict) or column not in record:
        raise _no_column(column, list(record) if isinstance(record, dict) else [], where)
    return str(record[column] or "")


def _no_column(column: str, there: list[str], where: object) -> InputError:
    return InputError(f"corpus {where}: no column {column!r}; it has {', '.join(there) or 'none'}: choose one with #column.")


def _split_column(spec: str) -> tuple[str, str | None]:
    pattern, mark, column = spec.rpartition("#")
    return (pattern, column) if mark else (spec, None)


def _files_of(pattern: str) -> list[Path]:
    if Path(pattern).is_dir():
        found = [path for path in Path(pattern).rglob("*") if path.is_file()]
    else:
        found = [Path(name) for name in glob.glob(pattern, recursive=True) if Path(name).is_file()]
    return sorted(path for path in found if path.suffix in SUFFIXES)


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
    with _hub_errors(name):
        import datasets

        builder = datasets.load_dataset_builder(name, config)
        fingerprint = hashlib.sha256(f"{builder.config_id} {builder.hash}".encode()).hexdigest()
    return Corpus(spec, fingerprint, (_HubPiece(name, config, split, column or DEFAULT_COLUMN),))


class _hub_errors:
    """Whatever the hub client raises becomes one line; our own errors pass through."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, InputError):
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise InputError(
                f"corpus hf:{self.name}: cannot be streamed ({reason}); check the name and the network, or use local files."
            ) from error
