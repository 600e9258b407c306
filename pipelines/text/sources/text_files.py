"""Text files and Python sources: about 8 KiB of whole lines is a document; a Python source is one document."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pipelines.text.document import Document, documents_of
from pipelines.text.sources.decoding import HEAD_BYTES, decoded, source_encoding, without_mark
from pipelines.text.sources.opened import is_packed, opened

TEXT_PIECE_BYTES = 8 << 10
BLOCK_BYTES = 1 << 18


@dataclass(frozen=True)
class TextPiece:
    """The lines of a text file that begin in the byte range [start, stop)."""

    path: Path
    name: str
    start: int
    stop: int

    def documents(self) -> Iterator[Document]:
        with opened(self.path) as file:
            lines = Lines(file, seek_line(file, self.start, self.stop))
            yield from _documents(self.name, lines, self.stop, self.path)


@dataclass(frozen=True)
class PackedText:
    """A packed text file, which can be read from its start only: the documents that the unpacked file would have."""

    path: Path
    name: str

    def documents(self) -> Iterator[Document]:
        with opened(self.path) as file:
            lines = Lines(file)
            while not lines.ended:
                start = lines.at - lines.at % TEXT_PIECE_BYTES
                yield from _documents(f"{self.name}@{start}", lines, start + TEXT_PIECE_BYTES, self.path)


@dataclass(frozen=True)
class SourceFile:
    """A Python source, whole."""

    path: Path
    name: str

    def documents(self) -> Iterator[Document]:
        with opened(self.path) as file:
            head = file.read(HEAD_BYTES)
            encoding = source_encoding(head, self.path)
            blocks = _blocks(file, head)
            yield from documents_of(self.name, without_mark(decoded(blocks, self.path, encoding)))


class Lines:
    """Whole lines of a stream whose next byte, `at`, begins one."""

    def __init__(self, file: IO[bytes], at: int = 0):
        self.file, self.at, self.ended = file, at, False

    def until(self, stop: int) -> Iterator[bytes]:
        """All lines that begin before byte `stop`, in blocks."""
        block = b"\n"
        while self.at < stop or not block.endswith(b"\n"):
            limit = stop - self.at
            block = self.file.read(min(limit, BLOCK_BYTES)) if limit > 0 else self.file.readline(BLOCK_BYTES)
            if not block:
                self.ended = True
                return
            self.at += len(block)
            yield block


def seek_line(file: IO[bytes], start: int, stop: int) -> int:
    """Go to the first line that begins in the byte range [start, stop), or beyond it where there is none; gives the place.

    Every line of a file is in one of the ranges that cover the file.
    """
    if start:
        file.seek(start - 1)
        file.readline(stop - start + 1)  # no further: a file of one line would be read to its end in every range
    return file.tell()


def text_pieces(path: Path, name: str, n_bytes: int) -> list[TextPiece | PackedText]:
    if is_packed(path):
        return [PackedText(path, name)]
    return [TextPiece(path, *named_range) for named_range in named_ranges(name, n_bytes, TEXT_PIECE_BYTES)]


def named_ranges(name: str, n_bytes: int, piece_bytes: int) -> list[tuple[str, int, int]]:
    """(name, start, stop) of each piece of a file; a file of several adds the start to its name."""
    starts = range(0, n_bytes, piece_bytes)
    return [(name if len(starts) == 1 else f"{name}@{start}", start, min(start + piece_bytes, n_bytes)) for start in starts]


def _documents(name: str, lines: Lines, stop: int, path: Path) -> Iterator[Document]:
    at = lines.at
    pieces = decoded(lines.until(stop), path, at=at)
    yield from documents_of(name, pieces if at else without_mark(pieces))


def _blocks(file: IO[bytes], head: bytes) -> Iterator[bytes]:
    while head:
        yield head
        head = file.read(BLOCK_BYTES)
