"""In: documents and a tokenizer. Out: the token table of a segment, and text again from its tokens.

Tokenising is cheap and deterministic, so it is a pass of its own, before the model runs. The table holds every
document's tokens followed by one separator; documents held out for evaluation come after all others.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from actstore import paths
from actstore.errors import InputError, StoreError
from pipelines.corpus import Document

BATCH_DOCUMENTS = 64
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
        """Token ids of each text, without special tokens."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

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
    separators included.
    """

    ids: NDArray[Any]
    offsets: NDArray[np.int64]
    heldout: NDArray[np.uint8]
    names: list[str]
    n_train_tokens: int
    heldout_modulus: int

    def part_range(self, part: str) -> tuple[int, int]:
        """First and one-past-last token of a split."""
        return (0, self.n_train_tokens) if part == "train" else (self.n_train_tokens, len(self.ids))

    def part_documents(self, part: str) -> NDArray[np.int64]:
        """(n + 1,) first tokens of a split's documents, and its end."""
        start, stop = self.part_range(part)
        firsts = self.offsets[:-1]
        return np.append(firsts[(firsts >= start) & (firsts < stop)], stop)


def load_tokenizer(name: str) -> tuple[TextCodec, dict[str, bytes]]:
    """The fast tokenizer of a hub id or local folder, and the files that a store keeps a copy of.

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
    # A tokenizer's file may ask for a largest length, or for padding; documents are taken whole and as they are.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    eos = int(tokenizer.eos_token_id)
    bos = eos if tokenizer.bos_token_id is None else int(tokenizer.bos_token_id)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
    return TextCodec(tokenizer.backend_tokenizer, bos, eos), files


def store_tokenizer(store: Path, bos_token_id: int, separator_token_id: int) -> TextCodec:
    """The tokenizer copy inside a store or analysis. Raises StoreError when it is missing or unreadable."""
    file = store / paths.TOKENIZER / "tokenizer.json"
    try:
        return TextCodec(Tokenizer.from_file(str(file)), bos_token_id, separator_token_id)
    except Exception as error:
        raise StoreError(f"{file}: not a readable tokenizer ({first_line(error)}); restore it from a copy.") from error


def tokenize_documents(
    documents: Iterator[Document], codec: TextCodec, n_tokens: int, heldout_modulus: int | None
) -> TokenTable | None:
    """The table of the next `n_tokens` tokens (the last document is cut there), or None when no document is left.

    A document is held out when sha256 of its name, first eight bytes, is 0 modulo `heldout_modulus`. None chooses
    it: 50 from 1,000 documents on, else 20, or the largest of 10, 5, 3, 2 that holds at least one of several
    documents out; 0 holds nothing out (a corpus of one document).
    """
    names: list[str] = []
    tokens: list[NDArray[np.int64]] = []
    left = n_tokens
    while left > 0 and (batch := list(islice(documents, BATCH_DOCUMENTS))):
        for document, ids in zip(batch, codec.ids([document.text for document in batch]), strict=True):
            if left > 0 and ids:
                names.append(document.name.replace("\n", " "))
                tokens.append(np.asarray(ids[:left], np.int64))
                left -= len(tokens[-1])
    if not names:
        return None
    modulus = _choose_modulus(names) if heldout_modulus is None else heldout_modulus
    heldout = np.array([is_heldout(name, modulus) for name in names], np.uint8)
    order = np.argsort(heldout, kind="stable")
    lengths = np.array([len(tokens[i]) + 1 for i in order], np.int64)
    stream = np.concatenate([np.append(tokens[i], codec.separator_token_id) for i in order])
    return TokenTable(
        ids=stream.astype(np.min_scalar_type(codec.backend.get_vocab_size() - 1)),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        heldout=heldout[order],
        names=[names[i] for i in order],
        n_train_tokens=int(lengths[heldout[order] == 0].sum()),
        heldout_modulus=modulus,
    )


def is_heldout(name: str, modulus: int) -> bool:
    """Whether a document belongs to the held-out split, from its name alone."""
    return modulus > 0 and int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % modulus == 0


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type when it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".") if lines else type(error).__name__


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
