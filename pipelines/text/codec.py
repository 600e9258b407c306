"""A tokenizer as the stages use it. In: text. Out: ids; and from ids text again, whole runs or token by token."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import AnyStr, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from pipelines.shared.visible_text import say
from pipelines.text.document import without_lone_surrogates

REPLACEMENT = "�"
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")
"""A token of byte fallback: one byte of a character that the vocabulary does not have."""
LONGEST_FRAME = 3


class Frame(NamedTuple):
    """Tokens put around others so that these decode as they do inside a text, and the text that the frame itself gives."""

    before: list[int]
    text_before: str
    after: list[int]
    text_after: str


@dataclass(frozen=True)
class TextCodec:
    """A tokenizer: ids from text, text and bytes from ids. `definition` is what `sha256` hashes; by default all of it."""

    backend: Tokenizer
    bos_token_id: int
    separator_token_id: int
    definition: str = ""

    @property
    def sha256(self) -> str:
        """Hash of the tokenizer's definition: equal for tokenizers that are the same file and give the same ids."""
        return hashlib.sha256((self.definition or self.backend.to_str()).encode()).hexdigest()

    @cached_property
    def n_vocabulary(self) -> int:
        """Size of the vocabulary: the largest id and one more. Some ids below it may be no token's."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """Ids of the special tokens, such as start and end of text."""
        return frozenset(i for i, token in self.backend.get_added_tokens_decoder().items() if token.special)

    def ids(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text. No special token is added; one that is spelt out in a text is text like any other. Lone
        surrogates are read as U+FFFD, and counted on stderr.

        A vocabulary that itself holds a special token's text as a piece (Unigram) can still give its id: see `n_control`.
        """
        whole = [without_lone_surrogates(text) for text in texts]
        if n_replaced := sum(n for _, n in whole):
            say(f"lone surrogates of the text, read as U+FFFD: {n_replaced:,}", err=True)
        # Set each time: transformers sets it back whenever it uses the same tokenizer.
        self.backend.encode_special_tokens = True
        return [e.ids for e in self.backend.encode_batch_fast([text for text, _ in whole], add_special_tokens=False)]

    def n_control(self, ids: list[int]) -> int:
        """How many ids of a text are special tokens' all the same."""
        return 0 if self.control_ids.isdisjoint(ids) else sum(i in self.control_ids for i in ids)

    def text(self, ids: NDArray[np.integer] | list[int]) -> str:
        """The text of a run of tokens, as the tokenizer's decoder gives it; an id that is no token's shows as `<4100>`."""
        return self._run_text(ids, is_inner=False)

    def token_text(self, token: int) -> str:
        """One token as it reads inside a text, with its space; a part of a character shows U+FFFD."""
        return self._inner_text([token]) if self._is_token(token) else f"<{token}>"

    def token_texts(self) -> list[str]:
        """`token_text` of every id of the vocabulary."""
        return [self.token_text(i) for i in range(self.n_vocabulary)]

    def around(self, ids: NDArray[np.integer] | list[int], at: int) -> tuple[str, str, str]:
        """A run of tokens as (text before token `at`, its text, text after it).

        Joined they are the text of the run, unless the token begins or ends inside a character, or is the space that a
        decoder takes off the beginning.
        """
        before, through, whole = self.text(ids[:at]), self.text(ids[: at + 1]), self.text(ids)
        token, after = through[len(before) :], whole[len(through) :]
        if before + token + after == whole and token and REPLACEMENT not in (before[-1:], token[:1], token[-1:]):
            return before, token, after
        return before, self.token_text(int(ids[at])), self._run_text(ids[at + 1 :], is_inner=True)

    def token_bytes(self) -> list[bytes]:
        """Every id of the vocabulary as the bytes it stands for inside a text; an id that is no token's for none."""
        added = self.backend.get_added_tokens_decoder()
        return [self._bytes(i, i in added) for i in range(self.n_vocabulary)]

    def document_bytes(self, ids: list[int], pieces: list[bytes]) -> list[bytes]:
        """The bytes of each token of a document, given `token_bytes`; joined they are the document's text."""
        return _without_lead([pieces[i] for i in ids], lambda: self.text(ids).encode(), b" ")

    def split_text(self, ids: list[int]) -> list[str]:
        """The text of each token of a whole text; joined they are its text, unless a token ends inside a character."""
        return _without_lead([self.token_text(i) for i in ids], lambda: self.text(ids), " ")

    def _run_text(self, ids: NDArray[np.integer] | list[int], is_inner: bool) -> str:
        pieces: list[str] = []
        for is_token, group in groupby((int(i) for i in ids), self._is_token):
            run = list(group)
            if is_token:
                pieces.append(self._inner_text(run) if pieces or is_inner else self._decoded(run))
            else:
                pieces += [f"<{i}>" for i in run]
        return "".join(pieces)

    def _is_token(self, token: int) -> bool:
        return token in self._tokens

    @cached_property
    def _tokens(self) -> frozenset[int]:
        return frozenset(self.backend.get_vocab(with_added_tokens=True).values())

    def _decoded(self, ids: list[int]) -> str:
        return str(self.backend.decode(ids, skip_special_tokens=False))

    def _inner_text(self, ids: list[int]) -> str:
        """The text of tokens that stand inside a text: a decoder takes a space off the beginning of what it is given."""
        if self._frame is None:
            return self._decoded(ids)
        before, text_before, after, text_after = self._frame
        framed = self._decoded([*before, *ids, *after])
        if framed.startswith(text_before) and framed.endswith(text_after):
            return framed[len(text_before) : len(framed) - len(text_after)]
        return self._decoded(ids)

    @cached_property
    def _frame(self) -> Frame | None:
        """A letter that joins without a space on both sides, else a word in front; None where text needs no frame."""
        if "ByteLevel" in self._decoders:
            return None
        # "##a" is WordPiece's letter inside a word
        vocabulary = self.backend.get_vocab(with_added_tokens=False)
        shortest_first = sorted(vocabulary.items(), key=lambda item: (len(item[0]), item[1]))
        ids = [i for token, i in shortest_first if _is_word(token) and i not in self.control_ids]
        for i in ids:
            one, two, three = (self._decoded([i] * n) for n in (1, 2, 3))
            if three.startswith(two) and _is_word(three[len(two) :]):
                return Frame([i], one, [i], three[len(two) :])
        for i in ids:
            if self._decoded([i, i]).startswith(one := self._decoded([i])) and one:
                return Frame([i], one, [], "")
        return None

    @cached_property
    def _decoders(self) -> frozenset[str]:
        """The types of the parts of the decoder, such as ByteLevel, ByteFallback, Metaspace."""
        decoder = json.loads(self.backend.to_str())["decoder"] or {}
        return frozenset(part["type"] for part in [decoder, *decoder.get("decoders", [])] if part)

    def _bytes(self, token: int, is_added: bool) -> bytes:
        name = self.backend.id_to_token(token)
        if name is None:
            return b""
        if "ByteLevel" in self._decoders:
            # as the decoder does it: a token with a character outside the alphabet stands for itself
            known = not is_added and all(character in BYTE_OF for character in name)
            return bytes(BYTE_OF[character] for character in name) if known else name.encode()
        if "ByteFallback" in self._decoders and (byte := BYTE_TOKEN.match(name)):
            return bytes([int(byte[1], 16)])
        return self._inner_text([token]).encode()


def _is_word(text: str) -> bool:
    word = text.removeprefix("##").removeprefix("▁")
    return word.isascii() and word.isalnum() and len(word) <= LONGEST_FRAME


def _without_lead(pieces: list[AnyStr], text: Callable[[], AnyStr], space: AnyStr) -> list[AnyStr]:
    """Pieces of a text without the spaces that a decoder takes off its beginning, and `text` does not have."""
    if not pieces or not (pieces[0] or space).startswith(space):
        return pieces
    joined, whole = space[:0].join(pieces), text()
    surplus = (len(joined) - len(joined.lstrip(space))) - (len(whole) - len(whole.lstrip(space)))
    kept = list(pieces)
    for n, piece in enumerate(pieces):
        taken = min(max(surplus, 0), len(piece) - len(piece.lstrip(space)))
        kept[n], surplus = piece[taken:], surplus - taken
        if surplus <= 0:
            break
    return kept


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's byte-level alphabet: printable bytes stand for themselves, the others for U+0100 and on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {byte: chr(byte) for byte in printable}
    alphabet |= {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in alphabet)}
    return alphabet


BYTE_OF = {character: byte for byte, character in _byte_alphabet().items()}
