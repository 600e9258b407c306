"""In: documents and a tokenizer. Out: the token table of a segment.

Tokenising is cheap and deterministic, so it is a pass of its own, before the model runs. The table holds every
document's tokens followed by one separator; documents held out for evaluation come after all others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.text.codec import TextCodec
from pipelines.text.document import Document
from pipelines.text.split import Keys, choose_modulus, is_heldout

BATCH_DOCUMENTS, BATCH_CHARACTERS = 64, 1 << 19


@dataclass(frozen=True)
class TokenTable:
    """The tokens of a segment: all training documents, then the held-out ones, each followed by a separator.

    `offsets` (n_documents + 1,) are the documents' first tokens, `keys` (n_documents,) the keys of their whole texts.
    `n_train_tokens` counts the training part, separators included. `begins` and `ends` are (document, token of it) in the
    corpus: the first that is in, and the first that is not.
    """

    ids: NDArray[Any]
    offsets: NDArray[np.int64]
    heldout: NDArray[np.uint8]
    names: list[str]
    keys: Keys
    n_train_tokens: int
    heldout_modulus: int
    begins: tuple[int, int] = (0, 0)
    ends: tuple[int, int] = (0, 0)

    def part_range(self, part: str) -> tuple[int, int]:
        """First and one-past-last token of a split."""
        return (0, self.n_train_tokens) if part == "train" else (self.n_train_tokens, len(self.ids))

    def part_documents(self, part: str) -> NDArray[np.int64]:
        """(n + 1,) first tokens of a split's documents, and its end."""
        start, stop = self.part_range(part)
        firsts = self.offsets[:-1]
        return np.append(firsts[(firsts >= start) & (firsts < stop)], stop)


class TokenSource:
    """A corpus's tokens from one place on, taken table after table; no document is read or tokenised twice.

    `document` and `token` say where the next table begins: behind the first `token` tokens of that document. `n_replaced`
    counts the lone surrogates that were replaced in the documents read so far, `n_control` the special tokens that the
    tokenizer gave for text.
    """

    def __init__(self, documents: Iterator[Document], codec: TextCodec, document: int = 0, token: int = 0):
        self.document, self.token = document, token
        self._documents, self._codec = documents, codec
        self._dtype = np.min_scalar_type(max(codec.n_vocabulary - 1, codec.separator_token_id))
        self.n_replaced = self.n_control = 0
        self._pending: deque[tuple[str, int, NDArray[Any]]] = deque()

    def take(self, n_tokens: int, heldout_modulus: int | None) -> TokenTable | None:
        """The table of the next `n_tokens` tokens, or None when no token is left; the next table goes on where it ends.

        A document is held out when the key of its whole text is 0 modulo `heldout_modulus`; all its pieces are. None
        chooses the modulus by the documents of this table (`choose_modulus`).
        """
        begins = self.document, self.token
        names: list[str] = []
        keys: list[int] = []
        tokens: list[NDArray[Any]] = []
        left = n_tokens
        while left > 0 and self._fill():
            name, key, ids = self._pending[0]
            taken = ids[self.token : self.token + left]
            if self.token + len(taken) < len(ids):
                self.token += len(taken)
            else:
                self._pending.popleft()
                self.document, self.token = self.document + 1, 0
            if len(taken):
                names.append(name)
                keys.append(key)
                tokens.append(taken)
                left -= len(taken)
        if not names:
            return None
        of_text = np.array(keys, np.uint64)
        modulus = choose_modulus(of_text) if heldout_modulus is None else heldout_modulus
        heldout = is_heldout(of_text, modulus).astype(np.uint8)
        order = np.argsort(heldout, kind="stable")
        lengths = np.array([len(tokens[i]) + 1 for i in order], np.int64)
        separator = np.array([self._codec.separator_token_id], self._dtype)
        return TokenTable(
            ids=np.concatenate([piece for i in order for piece in (tokens[i], separator)]),
            offsets=np.concatenate([[0], np.cumsum(lengths)]),
            heldout=heldout[order],
            names=[names[i] for i in order],
            keys=of_text[order],
            n_train_tokens=int(lengths[heldout[order] == 0].sum()),
            heldout_modulus=modulus,
            begins=begins,
            ends=(self.document, self.token),
        )

    def _fill(self) -> bool:
        """Tokenise some more documents when none is waiting; False at the end of the corpus."""
        if not self._pending:
            batch = self._batch()
            self.n_replaced += sum(document.n_replaced for document in batch)
            for document, ids in zip(batch, self._codec.ids([document.text for document in batch]), strict=True):
                self.n_control += self._codec.n_control(ids)
                name, key = document.name.replace("\n", " "), document.key
                self._pending.append((name, key, np.asarray(ids, self._dtype)))
        return bool(self._pending)

    def _batch(self) -> list[Document]:
        """The next documents that are tokenised together: some of them, or few long ones."""
        batch: list[Document] = []
        left = BATCH_CHARACTERS
        while len(batch) < BATCH_DOCUMENTS and left > 0 and (document := next(self._documents, None)) is not None:
            batch.append(document)
            left -= len(document.text)
        return batch
