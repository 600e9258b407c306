"""How often a corpus says the same twice: documents with the text of another, and held-out documents that are nearly
training text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.text.tokens import TokenTable

SEQUENCE_TOKENS = 13
"""The length of the sequences by which texts are compared (Brown et al. 2020, appendix C)."""
SHARED_SHARE = 0.5
MOST_SEQUENCES = 1 << 22
"""From this many tokens on, a sample of sequences is compared, the same of every document: those whose hash divides by a
power of two."""
_BASE = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Copies:
    """What a token table says twice.

    `repeated` counts the documents whose text another document before them has; they are on its side of the split.
    `near` counts the held-out documents half of whose sequences of 13 tokens are in training text as well.
    """

    documents: int = 0
    heldout: int = 0
    heldout_tokens: int = 0
    tokens: int = 0
    repeated: int = 0
    near: int = 0

    @classmethod
    def of(cls, table: TokenTable) -> Copies:
        """What one table says twice; documents of other segments are not compared."""
        lengths = np.diff(table.offsets) - 1
        return cls(
            documents=len(table.names),
            heldout=int(table.heldout.sum()),
            heldout_tokens=int(lengths[table.heldout == 1].sum()),
            tokens=int(lengths.sum()),
            repeated=len(table.keys) - len(np.unique(table.keys)),
            near=int(_near(table).sum()),
        )

    def __add__(self, other: Copies) -> Copies:
        return Copies(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


def _near(table: TokenTable) -> NDArray[np.bool_]:
    """(n_heldout,) whether at least half of the sequences of each held-out document are in training text."""
    n_train = int((table.heldout == 0).sum())
    bounds = table.offsets[n_train:]
    if len(bounds) < 2 or not n_train:
        return np.zeros(max(0, len(bounds) - 1), np.bool_)
    every = np.uint64((1 << (len(table.ids) // MOST_SEQUENCES).bit_length()) - 1)
    train, _ = _sequences(table, 0, n_train, every)
    heldout, documents = _sequences(table, n_train, len(table.heldout), every)
    known = np.isin(heldout, train, kind="sort")  # NumPy 2.0 overflows in its other way
    n_all = np.bincount(documents, minlength=len(bounds) - 1)
    n_known = np.bincount(documents[known], minlength=len(bounds) - 1)
    return (n_all > 0) & (n_known >= SHARED_SHARE * n_all)


def _sequences(table: TokenTable, first: int, last: int, every: np.uint64) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """(n,) hashes of the sequences that lie inside documents [first, last), and which of these documents each lies in.

    A sequence is left out unless its hash has none of the bits of `every`.
    """
    offsets = table.offsets[first : last + 1]
    ids = table.ids[offsets[0] : offsets[-1]].astype(np.uint64)
    n = len(ids) - SEQUENCE_TOKENS + 1
    if n < 1:
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    hashes = np.zeros(n, np.uint64)
    for place in range(SEQUENCE_TOKENS):
        hashes = (hashes + ids[place : place + n] + np.uint64(1)) * _BASE
        hashes ^= hashes >> np.uint64(29)
    starts = np.arange(n) + offsets[0]
    document = np.searchsorted(offsets, starts, side="right") - 1
    inside = (starts + SEQUENCE_TOKENS < offsets[document + 1]) & ((hashes & every) == 0)  # without the separator
    return hashes[inside], document[inside]
