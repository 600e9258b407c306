"""Records of .csv and .tsv files: the first line names the columns; a quoted field may hold line ends."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from actstore.errors import InputError
from pipelines.text.document import Document, documents_of
from pipelines.text.sources.decoding import decoded, without_mark
from pipelines.text.sources.opened import opened
from pipelines.text.sources.records import no_column
from pipelines.text.sources.text_files import BLOCK_BYTES

MOST_FIELD_CHARACTERS = 1 << 30


@dataclass(frozen=True)
class CsvFile:
    """The records of a file of separated fields."""

    path: Path
    name: str
    column: str
    delimiter: str

    def documents(self) -> Iterator[Document]:
        csv.field_size_limit(MOST_FIELD_CHARACTERS)
        with opened(self.path) as file:
            blocks = iter(lambda: file.read(BLOCK_BYTES), b"")
            records = csv.reader(_lines(without_mark(decoded(blocks, self.path))), delimiter=self.delimiter, strict=True)
            try:
                yield from self._documents(records)
            except csv.Error as error:
                where = f"{self.path}: line {records.line_num}"
                raise InputError(f"{where} is not well quoted ({error}); mend the file.") from error

    def _documents(self, records: Iterator[list[str]]) -> Iterator[Document]:
        header = next(records, [])
        if header.count(self.column) != 1:
            raise no_column(self.column, header, self.path)
        place = header.index(self.column)
        for index, fields in enumerate(fields for fields in records if fields):
            if len(fields) != len(header):
                raise InputError(
                    f"{self.path}: record {index} has {len(fields)} fields, the first line has {len(header)}; mend the file."
                )
            yield from documents_of(f"{self.name}:{index}", [fields[place]])


def _lines(pieces: Iterable[str]) -> Iterator[str]:
    """Lines with their ends; cut after a line feed and nowhere else."""
    begun: list[str] = []
    for piece in pieces:
        *ended, rest = piece.split("\n")
        for line in ended:
            yield "".join([*begun, line, "\n"])
            begun = []
        begun.append(rest)
    if last := "".join(begun):
        yield last
