"""In: documents and a tokenizer. Out: the token table of a segment, and text again from its tokens.

Tokenising is cheap and deterministic, so it is a pass of its own, before the model runs. The table holds every
document's tokens followed by one separator; documents held out for evaluation come after all others.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from actstore.errors import InputError, StoreError
from actstore.reader import Store
from pipelines.shared.error_line import first_line
from pipelines.text.document import Document, without_lone_surrogates

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BATCH_DOCUMENTS, BATCH_CHARACTERS = 64, 1 << 19
HELDOUT_MODULUS_LARGE, HELDOUT_MODULI_SMALL = 50, (20, 10, 5, 3, 2)
LARGE_CORPUS_DOCUMENTS = 1000


@dataclass(frozen=True)
class TextCodec:
    """A tokenizer as the stages use it: ids from text, text and bytes from ids."""

    backend: Tokenizer
    bos_token_id: int
    separator_token_id: int

    @property
    def sha256(self) -> str:
        """Hash of the tokenizer's whole definition."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()

    def ids(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens; lone surrogates are read as U+FFFD, and counted on stderr."""
        whole = [without_lone_surrogates(text) for text in texts]
        if n_replaced := sum(n for _, n in whole):
            print(f"lone surrogates of the text, read as U+FFFD: {n_replaced:,}", file=sys.stderr)
        return [e.ids for e in self.backend.encode_batch_fast([text for text, _ in whole], add_special_tokens=False)]

    def text(self, ids: NDArray[np.integer] | list[int]) -> str:
        return str(self.backend.decode([int(i) for i in ids], skip_special_tokens=False))

    def token_texts(self) -> list[str]:
        """Every token of the vocabulary as text; a token that is part of a character shows U+FFFD."""
        return [self.text([i]) for i in range(self.backend.get_vocab_size())]

    def token_bytes(self) -> list[bytes]:
        """Every token of a byte-level vocabulary as the bytes it stands for; special tokens stand for none."""
        to_byte = {character: byte for byte, character in _byte_alphabet().items()}
        added = {
            i: b"" if token.special else token.content.encode()
            for i, token in self.backend.get_added_tokens_decoder().items()
        }
        return [
            added[i] if i in added else bytes(to_byte[c] for c in self.backend.id_to_token(i) or "")
            for i in range(self.backend.get_vocab_size())
        ]


@dataclass(frozen=True)
class TokenTable:
    """The tokens of a segment: all training documents, then the held-out ones, each followed by a separator.

    `offsets` (n_documents + 1,) are the documents' first tokens. `n_train_tokens` counts the training part,
    separators included. `begins` and `ends` are (document, token of it) in the corpus: the first that is in, and the
    first that is not.
    """

    ids: NDArray[Any]
    offsets: NDArray[np.int64]
    heldout: NDArray[np.uint8]
    names: list[str]
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


def open_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a hub id or local folder, as transformers gives it.

    Raises InputError when there is none, or it has no end-of-text token to separate documents with.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise InputError(
            f"model {name}: no tokenizer ({first_line(error)}); put the tokenizer's files beside the model."
        ) from error
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise InputError(
            f"model {name}: its tokenizer has no fast form or no end-of-text token; use a GPT-2-style tokenizer."
        )
    return tokenizer


def codec_of(tokenizer: PreTrainedTokenizerFast) -> TextCodec:
    """A transformers tokenizer as the stages use it; from now on it takes texts whole."""
    # A tokenizer's file may ask for a largest length, or for padding; documents are taken whole and as they are.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    eos = int(tokenizer.eos_token_id)
    bos = eos if tokenizer.bos_token_id is None else int(tokenizer.bos_token_id)
    return TextCodec(tokenizer.backend_tokenizer, bos, eos)


def load_tokenizer(name: str) -> tuple[TextCodec, dict[str, bytes]]:
    """The tokenizer of a hub id or local folder, and the files that a store keeps a copy of. Errors as `open_tokenizer`."""
    tokenizer = open_tokenizer(name)
    codec = codec_of(tokenizer)
    for key in ("is_local", "local_files_only"):  # how it was found this time is no part of it
        tokenizer.init_kwargs.pop(key, None)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
    return codec, files


def store_tokenizer(store: Store) -> TextCodec:
    """The tokenizer copy inside a store. Raises DamagedStore when it is missing or was changed."""
    policy = store.manifest.policy
    return parse_tokenizer(store.tokenizer_file(), store.url, policy.bos_token_id, policy.separator_token_id)


def parse_tokenizer(data: bytes, where: str, bos_token_id: int, separator_token_id: int) -> TextCodec:
    """A tokenizer from the bytes of its `tokenizer.json`. Raises StoreError when they are not one."""
    try:
        return TextCodec(Tokenizer.from_buffer(data), bos_token_id, separator_token_id)
    except Exception as error:
        raise StoreError(f"{where}: not a readable tokenizer ({first_line(error)}); restore it from a copy.") from error


class TokenSource:
    """A corpus's tokens from one place on, taken table after table; no document is read or tokenised twice.

    `document` and `token` say where the next table begins: behind the first `token` tokens of that document. `n_replaced`
    counts the lone surrogates that were replaced in the documents read so far.
    """

    def __init__(self, documents: Iterator[Document], codec: TextCodec, document: int = 0, token: int = 0):
        self.document, self.token = document, token
        self._documents, self._codec = documents, codec
        self._dtype = np.min_scalar_type(codec.backend.get_vocab_size() - 1)
        self.n_replaced = 0
        self._pending: deque[tuple[str, NDArray[Any]]] = deque()

    def take(self, n_tokens: int, heldout_modulus: int | None) -> TokenTable | None:
        """The table of the next `n_tokens` tokens, or None when no token is left; the next table goes on where it ends.

        A document is held out when sha256 of its name, first eight bytes, is 0 modulo `heldout_modulus`. None chooses
        it: 50 from 1,000 documents on, else 20, or the largest of 10, 5, 3, 2 that holds at least one of several
        documents out; 0 holds nothing out (a corpus of one document).
        """
        begins = self.document, self.token
        names: list[str] = []
        tokens: list[NDArray[Any]] = []
        left = n_tokens
        while left > 0 and self._fill():
            name, ids = self._pending[0]
            taken = ids[self.token : self.token + left]
            if self.token + len(taken) < len(ids):
                self.token += len(taken)
            else:
                self._pending.popleft()
                self.document, self.token = self.document + 1, 0
            if len(taken):
                names.append(name)
                tokens.append(taken)
                left -= len(taken)
        if not names:
            return None
        modulus = _choose_modulus(names) if heldout_modulus is None else heldout_modulus
        heldout = np.array([is_heldout(name, modulus) for name in names], np.uint8)
        order = np.argsort(heldout, kind="stable")
        lengths = np.array([len(tokens[i]) + 1 for i in order], np.int64)
        separator = np.array([self._codec.separator_token_id], self._dtype)
        return TokenTable(
            ids=np.concatenate([piece for i in order for piece in (tokens[i], separator)]),
            offsets=np.concatenate([[0], np.cumsum(lengths)]),
            heldout=heldout[order],
            names=[names[i] for i in order],
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
                self._pending.append((document.name.replace("\n", " "), np.asarray(ids, self._dtype)))
        return bool(self._pending)

    def _batch(self) -> list[Document]:
        """The next documents that are tokenised together: some of them, or few long ones."""
        batch: list[Document] = []
        left = BATCH_CHARACTERS
        while len(batch) < BATCH_DOCUMENTS and left > 0 and (document := next(self._documents, None)) is not None:
            batch.append(document)
            left -= len(document.text)
        return batch


def is_heldout(name: str, modulus: int) -> bool:
    """Whether a document belongs to the held-out split, from its name alone."""
    return modulus > 0 and int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % modulus == 0


def document_half(name: str) -> int:
    """0, the half of the documents on which things are chosen, or 1, on which they are scored; from its name alone.

    The bit that decides has no part in `is_heldout`.
    """
    return hashlib.sha256(name.encode()).digest()[8] & 1


def _choose_modulus(names: list[str]) -> int:
    if len(names) >= LARGE_CORPUS_DOCUMENTS:
        return HELDOUT_MODULUS_LARGE
    for modulus in HELDOUT_MODULI_SMALL:
        if 0 < sum(is_heldout(name, modulus) for name in names) < len(names):
            return modulus
    return 0


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's byte-level alphabet: printable bytes stand for themselves, the others for U+0100 and on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {byte: chr(byte) for byte in printable}
    alphabet |= {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in alphabet)}
    return alphabet
