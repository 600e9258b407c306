"""Which documents are held out, and on which half of them things are chosen: decided by a document's text alone.

Two documents of one text fall on the same side, whatever they are called, and so do two that differ only in ASCII case,
white space and punctuation: what is measured on held-out text was not trained on.
"""

from __future__ import annotations

import hashlib
import re

import numpy as np
from numpy.typing import NDArray

HELDOUT_MODULUS_LARGE, HELDOUT_MODULI_SMALL = 50, (20, 10, 5, 3, 2)
LARGE_CORPUS_DOCUMENTS = 1000
Keys = NDArray[np.uint64]
_BETWEEN_WORDS = re.compile(rb"[^0-9a-z\x80-\xff]+")


class TextKey:
    """The key of a text that comes in pieces, each a str.

    >>> key = TextKey()
    >>> key.update("Hello, wor")
    >>> key.update("ld!")
    >>> key.value == text_key("hello world")
    True
    """

    def __init__(self) -> None:
        self._words, self._raw = hashlib.sha256(), hashlib.sha256()
        self._began = self._is_between = False

    def update(self, piece: str) -> None:
        data = piece.encode("utf-8")
        if not self._began:
            self._raw.update(data)  # decides only where there is no word
        words = _BETWEEN_WORDS.sub(b" ", data.lower())
        inner = words.strip(b" ")
        if inner:
            if self._began and (self._is_between or words[:1] == b" "):
                self._words.update(b" ")
            self._words.update(inner)
            self._began, self._is_between = True, words[-1:] == b" "
        else:
            self._is_between |= bool(words)

    @property
    def value(self) -> int:
        """The first eight bytes, as a big-endian integer, of the SHA-256 of the words; of the text, where it has no word."""
        return int.from_bytes((self._words if self._began else self._raw).digest()[:8], "big")


def text_key(text: str) -> int:
    """The key of a whole text: 0 to 2^64 - 1."""
    key = TextKey()
    key.update(text)
    return key.value


def is_heldout(keys: Keys, modulus: int) -> NDArray[np.bool_]:
    """(n,) whether each document belongs to the held-out split; modulus 0 holds nothing out."""
    return keys % np.uint64(modulus) == 0 if modulus else np.zeros(len(keys), np.bool_)


def document_halves(keys: Keys) -> NDArray[np.int64]:
    """(n,) of each document: 0, the half on which things are chosen, or 1, the half on which they are scored.

    The highest bit of the key decides, which says nothing of its remainder.
    """
    return (keys >> np.uint64(63)).astype(np.int64)


def choose_modulus(keys: Keys) -> int:
    """50 from 1,000 documents on; else 20, or the largest of 10, 5, 3, 2 that holds out at least one of several documents
    but not all; 0 where none does."""
    if len(keys) >= LARGE_CORPUS_DOCUMENTS:
        return HELDOUT_MODULUS_LARGE
    for modulus in HELDOUT_MODULI_SMALL:
        if 0 < is_heldout(keys, modulus).sum() < len(keys):
            return modulus
    return 0
