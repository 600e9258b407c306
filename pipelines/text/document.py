"""A document: one text and its name. A longer text than a document may hold becomes several."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pipelines.text.split import text_key

MOST_CHARACTERS = 1 << 20
"""The longest document. Tokenising takes up to 150 bytes of memory a character."""
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Document:
    """One text and where it came from; `n_replaced` counts the lone surrogates for which U+FFFD stands in it.

    `begun_by` is the text's key that a document which goes on a longer text has of its first document.
    """

    name: str
    text: str
    n_replaced: int = 0
    begun_by: int | None = None

    @property
    def key(self) -> int:
        """What decides on which side of the split it falls, the same for all documents of one text."""
        return text_key(self.text) if self.begun_by is None else self.begun_by


def documents_of(name: str, pieces: Iterable[str]) -> Iterator[Document]:
    """The documents of one text that comes in pieces: one, or several of at most `MOST_CHARACTERS` each.

    A longer text is cut after the last line end in the second half of that length, else before the last space there, else at
    that length. Their texts, joined, are the whole. The first has the text's name; each other adds the number of characters
    before it: `book.txt`, `book.txt+1048576`; and has the first one's key. No text gives no document.
    """
    n_before, first = 0, None
    for part in _parts(pieces):
        text, n_replaced = without_lone_surrogates(part)
        if first is None:
            yield (first := Document(name, text, n_replaced))
        else:
            yield Document(f"{name}+{n_before}", text, n_replaced, first.key)
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
