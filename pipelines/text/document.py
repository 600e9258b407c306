"""A document: one text and its name. A longer text than a document may hold becomes several."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

MOST_CHARACTERS = 1 << 20
"""The longest document. Tokenising takes up to 150 bytes of memory a character."""
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Document:
    """One text and where it came from; `n_replaced` counts the lone surrogates for which U+FFFD stands in it."""

    name: str
    text: str
    n_replaced: int = 0


def documents_of(name: str, pieces: Iterable[str]) -> Iterator[Document]:
    """The documents of one text that comes in pieces: one, or several of at most `MOST_CHARACTERS` each.

    A longer text is cut after the last line end in the second half of that length, else before the last space there, else at
    that length. Their texts, joined, are the whole. The first has the text's name; each other adds the number of characters
    before it: `book.txt`, `book.txt+1048576`. No text gives no document.
    """
    n_before = 0
    for part in _parts(pieces):
        text, n_replaced = without_lone_surrogates(part)
        yield Document(f"{name}+{n_before}" if n_before else name, text, n_replaced)
        n_before += len(part)


def without_lone_surrogates(text: str) -> tuple[str, int]:
    """A text that UTF-8 can encode, with U+FFFD for each lone surrogate, and how many there were.

    JSON may hold half of a surrogate pair; Python shows bytes of an argument that are not UTF-8 as such halves.

    >>> without_lone_surrogates("caf\\udce9")
    ('caf\ufffd', 1)
    """
    return (text, 0) if text.isascii() else _LONE_SURROGATE.subn("\ufffd", text)


def _parts(pieces: Iterable[str]) -> Iterator[str]:
    held = ""
    for piece in pieces:
        for start in range(0, len(piece), MOST_CHARACTERS):
            held += piece[start : start + MOST_CHARACTERS]
            while len(held) > MOST_CHARACTERS:
                cut = _cut(held)
                yield held[:cut]
                held = held[cut:]
    if held:
        yield held


def _cut(text: str) -> int:
    half = (MOST_CHARACTERS + 1) // 2
    after_line = text.rfind("\n", half, MOST_CHARACTERS) + 1
    return after_line or max(text.rfind(" ", half, MOST_CHARACTERS), 0) or MOST_CHARACTERS
