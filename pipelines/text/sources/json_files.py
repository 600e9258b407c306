"""Records of JSON: a .jsonl file has one a line; a .json file is a list of them, one of them, or lines of them.

A long record is not decoded whole: the text of its column is taken piece by piece from the bytes of its line.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from actstore.errors import InputError
from pipelines.text.document import Document, documents_of
from pipelines.text.sources.decoding import MARK, text_of
from pipelines.text.sources.opened import is_packed, opened
from pipelines.text.sources.records import text_pieces_of, value_at
from pipelines.text.sources.text_files import named_ranges, seek_line

JSONL_PIECE_BYTES = 1 << 20
LONG_RECORD_BYTES = 1 << 20
LINE_SHOWN = 60

_WHOLE_ESCAPES = re.compile(
    rb"""(?: [^\\]++
    | \\u[dD][89abAB][0-9a-fA-F]{2} (?: \\u[dD][c-fC-F][0-9a-fA-F]{2} | (?=.{6}) )
    | \\u(?![dD][89abAB])[0-9a-fA-F]{4}
    | \\[^u] )++""",
    re.DOTALL | re.VERBOSE,
)
"""The longest run of a JSON string in which no escape is cut, nor a pair of escapes that is one character."""


@dataclass(frozen=True)
class JsonlPiece:
    """The records of a .jsonl file whose lines begin in the byte range [start, stop)."""

    path: Path
    name: str
    start: int
    stop: int
    column: str

    def documents(self) -> Iterator[Document]:
        with opened(self.path) as file:
            at = seek_line(file, self.start, self.stop) if self.start else 0
            index = 0
            while at < self.stop and (line := file.readline()):
                yield from _record_documents(f"{self.name}:{index}", line, at, self.column, self.path)
                at, index = at + len(line), index + 1


@dataclass(frozen=True)
class JsonFile:
    """The records of a .json file. Its bytes are held at once, unless it has a record a line."""

    path: Path
    name: str
    column: str

    def documents(self) -> Iterator[Document]:
        with opened(self.path) as file:
            first = file.readline()
            is_lines = _is_object(first.removeprefix(MARK))
            data = first if is_lines else first + file.read()
        if is_lines:
            yield from JsonlPiece(self.path, self.name, 0, sys.maxsize, self.column).documents()
            return
        for index, record in enumerate(self._records(data.removeprefix(MARK))):
            name = f"{self.name}:{index}"
            if isinstance(record, msgspec.Raw):
                yield from _record_documents(name, bytes(record), None, self.column, self.path)
            else:
                yield from _value_documents(name, record, self.column, self.path)

    def _records(self, data: bytes) -> list[Any]:
        try:
            return msgspec.json.decode(data, type=list[msgspec.Raw])
        except (msgspec.DecodeError, RecursionError):
            value = _parsed(text_of(data, self.path), self.path, "JSON")
            return value if isinstance(value, list) else [value]


def json_pieces(path: Path, name: str, n_bytes: int, column: str, *, is_lines: bool) -> list[JsonlPiece | JsonFile]:
    if not is_lines:
        return [JsonFile(path, name, column)]
    if is_packed(path):
        return [JsonlPiece(path, name, 0, sys.maxsize, column)]
    return [JsonlPiece(path, *named_range, column) for named_range in named_ranges(name, n_bytes, JSONL_PIECE_BYTES)]


def _record_documents(name: str, line: bytes, at: int | None, column: str, path: Path) -> Iterator[Document]:
    """The documents of one record, whose bytes begin at byte `at` of its file, where that is known."""
    if at == 0:
        line, at = line.removeprefix(MARK), 0
    if len(line) > LONG_RECORD_BYTES and (raw := _raw_at(line, column)) is not None and raw[0] == ord('"'):
        yield from documents_of(name, _string_pieces(raw, f"{path}: {name}"))
        return
    where = path if at is not None else f"{path}: {name}"
    text = text_of(line, where, at or 0)
    if text.strip():
        yield from _value_documents(name, _parsed(text, path), column, path)


def _value_documents(name: str, record: Any, column: str, path: Path) -> Iterator[Document]:
    value = value_at(record, column, path)
    yield from documents_of(name, text_pieces_of(value, column, f"{path}: {name}"))


def _parsed(text: str, path: Path, what: str = "a line of JSON") -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        shown = text[:LINE_SHOWN]
        raise InputError(f"{path}: not {what} ({error}): {shown!r}") from error


def _is_object(line: bytes) -> bool:
    if not re.match(rb"\s*\{", line):
        return False
    try:
        msgspec.json.decode(line, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, RecursionError):
        try:
            json.loads(line.decode())
        except (ValueError, RecursionError):
            return False
    return True


def _raw_at(line: bytes | memoryview, column: str) -> memoryview | None:
    """The bytes of a record's value in a column, not copied. None where there is none, or the record must be read whole."""
    try:
        fields = msgspec.json.decode(line, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, RecursionError):  # also of a lone surrogate or NaN anywhere in it
        return None
    if column in fields:
        return memoryview(fields[column])
    key, dot, rest = column.partition(".")
    return _raw_at(memoryview(fields[key]), rest) if dot and key in fields else None


def _string_pieces(raw: memoryview, where: str) -> Iterator[str]:
    """The text of a string of JSON, quotation marks included, piece by piece; no escape or character is cut."""
    at, end = 1, len(raw) - 1
    while at < end:
        stop = end
        if end - at > LONG_RECORD_BYTES and (whole := _WHOLE_ESCAPES.match(raw, at, at + LONG_RECORD_BYTES)):
            stop = whole.end()
            while raw[stop] & 0xC0 == 0x80:  # inside a character
                stop -= 1
        yield json.loads(f'"{text_of(raw[at:stop], where, at - 1)}"')
        at = stop
