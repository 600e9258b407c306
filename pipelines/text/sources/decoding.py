"""In: bytes in blocks. Out: their text in pieces, character by character as it is in the source.

Text is UTF-8; a Python source is as its coding line says. A byte-order mark at the very start of a file is not part of its
text; a U+FEFF anywhere else is. Line ends and NUL stay as they are. What is not UTF-8 is refused with its place.
"""

from __future__ import annotations

import codecs
import io
import re
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

from actstore.errors import InputError

HEAD_BYTES = 4096
LEAST_UTF16_BYTES = 8
MARK = b"\xef\xbb\xbf"
_OTHER_MARKS = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def decoded(blocks: Iterable[bytes | memoryview], where: object, encoding: str = "utf-8", at: int = 0) -> Iterator[str]:
    """The text of blocks of bytes, the first of which is byte `at` of `where`.

    Raises InputError for the first byte that is not in the encoding.
    """
    decoder = codecs.getincrementaldecoder(encoding)()
    for block, is_last in _with_end(blocks):
        try:
            yield decoder.decode(block, is_last)
        except UnicodeDecodeError as error:
            n_held = len(error.object) - len(block)  # bytes of a character that began in the block before
            raise _not_encoded(where, at - n_held + error.start, encoding) from error
        except UnicodeError as error:
            raise InputError(f"{where}: cannot be read as {encoding} ({error}); convert the file to UTF-8.") from error
        at += len(block)


def text_of(data: bytes | memoryview, where: object, at: int = 0) -> str:
    """The text of UTF-8 bytes, the first of which is byte `at` of `where`. Raises InputError as `decoded` does."""
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError as error:
        raise _not_encoded(where, at + error.start, "utf-8") from error


def without_mark(pieces: Iterable[str]) -> Iterator[str]:
    """The text of a whole file without the byte-order mark at its start."""
    pieces = iter(pieces)
    for piece in pieces:
        if piece:
            yield piece.removeprefix("\ufeff")
            break
    yield from pieces


def require_not_utf16(head: bytes, path: Path) -> None:
    """Raises InputError for a file that begins as UTF-16 or UTF-32 does.

    Without a mark, that is a NUL in most bytes at even places and none at odd ones, or the other way round: such bytes are
    UTF-8 as well, of a text with a NUL after each letter.
    """
    found = next((name for mark, name in _OTHER_MARKS.items() if head.startswith(mark)), "")
    nul_even, nul_odd = head[::2].count(0), head[1::2].count(0)
    if not found and len(head) >= LEAST_UTF16_BYTES and not min(nul_even, nul_odd) and nul_even + nul_odd > len(head) // 4:
        found = "UTF-16"
    if found:
        raise InputError(f"{path}: is {found}, by its first bytes; convert the file to UTF-8 (`iconv -f {found} -t UTF-8`).")


def source_encoding(head: bytes, path: Path) -> str:
    """The encoding of a Python source that begins with `head`: that of its coding line, else UTF-8."""
    mark = MARK if head.startswith(MARK) else b""
    ascii_only = re.sub(rb"[\x80-\xff]", b"?", head[len(mark) :])  # a character cut at the head's end is no fault
    try:
        encoding = tokenize.detect_encoding(io.BytesIO(mark + ascii_only).readline)[0].removesuffix("-sig")
        b"x".decode(encoding)  # a coding line may name what is no encoding of text
    except (SyntaxError, LookupError, UnicodeError) as error:
        raise InputError(f"{path}: {getattr(error, 'msg', error)}; convert the file to UTF-8.") from error
    return encoding


def _not_encoded(where: object, byte: int, encoding: str) -> InputError:
    return InputError(f"{where}: byte {byte} is not {encoding}; convert the file to UTF-8.")


def _with_end(blocks: Iterable[bytes | memoryview]) -> Iterator[tuple[bytes | memoryview, bool]]:
    for block in blocks:
        yield block, False
    yield b"", True
