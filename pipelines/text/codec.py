"""A tokenizer as the stages use it: ids from text, and text and bytes again from ids."""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from actstore.errors import InputError, StoreError
from actstore.files import content_hash
from actstore.reader import Store
from pipelines.shared.error_line import first_line
from pipelines.shared.visible_text import say
from pipelines.text.document import without_lone_surrogates

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
"""A token that stands for one byte, in vocabularies that fall back to bytes."""


@dataclass(frozen=True)
class TextCodec:
    """A tokenizer as the stages use it: ids from text, text and bytes from ids."""

    backend: Tokenizer
    bos_token_id: int
    separator_token_id: int

    @cached_property
    def sha256(self) -> str:
        """Hash of all that determines the ids of a text: how text is normalised and cut, the vocabulary, and the added
        tokens that are matched in text. What only frames ids, pads them or turns them into text again has no part in it."""
        definition = json.loads(self.backend.to_str())
        model = {
            name: value for name, value in definition["model"].items() if value
        }  # None and "" are written for one thing
        if merges := model.get("merges"):  # written as "a b" by some versions, as ["a", "b"] by others
            model["merges"] = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
        added = [token for token in definition["added_tokens"] if not token["special"]]
        parts = {name: definition[name] for name in ("normalizer", "pre_tokenizer")}
        return content_hash({**parts, "model": model, "added_tokens": added})

    @cached_property
    def largest_id(self) -> int:
        """The largest id that a token table can hold: ids may have gaps, and added tokens come after all others."""
        added = [token for token, kind in self.backend.get_added_tokens_decoder().items() if not kind.special]
        ids = self.backend.get_vocab(with_added_tokens=False).values()
        return max([self.bos_token_id, self.separator_token_id, *added, *ids])

    @property
    def n_tokens(self) -> int:
        """How many tokens there are, which is less than the number of ids where these have gaps."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def n_vocabulary(self) -> int:
        """The number of ids from 0 to the largest: what an array with a place for each token has."""
        return self.largest_id + 1

    def ids(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens; lone surrogates are read as U+FFFD, and counted on stderr."""
        whole = [without_lone_surrogates(text) for text in texts]
        if n_replaced := sum(n for _, n in whole):
            say(f"lone surrogates of the text, read as U+FFFD: {n_replaced:,}", err=True)
        return [e.ids for e in self.backend.encode_batch_fast([text for text, _ in whole], add_special_tokens=False)]

    def text(self, ids: NDArray[np.integer] | list[int]) -> str:
        return str(self.backend.decode([int(i) for i in ids], skip_special_tokens=False))

    def token_texts(self) -> list[str]:
        """(n_vocabulary,) every token as text, `token_text` of each id."""
        return [self.token_text(i) for i in range(self.n_vocabulary)]

    def token_text(self, token: int) -> str:
        """One token as text, with the space that it begins with; a token that is part of a character shows U+FFFD.

        An id that the tokenizer does not have, such as one that fills a model's vocabulary up to a multiple of 64, is shown
        as `<4100>`.
        """
        if self.backend.id_to_token(token) is None:
            return f"<{token}>"
        if self._is_byte_level:
            return self.text([token])
        anchor, shown = self._anchor  # a decoder drops the space of the first token
        text = self.text([anchor, token])
        return text.removeprefix(shown) if text.startswith(shown) else self.text([token])

    def token_bytes(self) -> list[bytes]:
        """(n_vocabulary,) the bytes that every token stands for: none for special tokens, and for ids without a token."""
        added = self.backend.get_added_tokens_decoder()
        to_byte = {character: bytes([byte]) for byte, character in _byte_alphabet().items()}

        def of(token: int) -> bytes:
            name = self.backend.id_to_token(token)
            if name is None or (token in added and added[token].special):
                return b""
            if token in added:
                return bytes(added[token].content, "utf-8")
            if self._is_byte_level:
                return b"".join(to_byte.get(character) or character.encode() for character in name)
            if byte := BYTE_TOKEN.fullmatch(name):
                return bytes([int(byte[1], 16)])
            return self.token_text(token).encode()

        return [of(token) for token in range(self.n_vocabulary)]

    @cached_property
    def _is_byte_level(self) -> bool:
        """Whether tokens are spelt in the alphabet of bytes."""
        return _uses(json.loads(self.backend.to_str())["decoder"], "ByteLevel")

    @cached_property
    def _anchor(self) -> tuple[int, str]:
        """A token whose text is a plain word, to stand before another; and this text."""
        for token in self.ids(["a", "the", "0"]):
            if token and (text := self.text(token[-1:])) and text.isalnum():
                return token[-1], text
        return self.separator_token_id, self.text([self.separator_token_id])


def open_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a hub id or local folder, as transformers gives it.

    Raises InputError when there is none, or it has no end-of-text token to separate documents with.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
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
    eos = int(tokenizer.eos_token_id)
    bos = eos if tokenizer.bos_token_id is None else int(tokenizer.bos_token_id)
    return TextCodec(_takes_text_as_it_is(tokenizer.backend_tokenizer), bos, eos)


def _takes_text_as_it_is(backend: Tokenizer) -> Tokenizer:
    """A tokenizer's file may ask for a largest length, or for padding: texts are taken whole. What spells a special token,
    such as `<|endoftext|>`, is text like any other, and no end of a text."""
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


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


def load_own_tokenizer(name: str, folder: str, n_known: int) -> tuple[TextCodec, dict[str, bytes]]:
    """The tokenizer that lies beside the model `name`, which knows `n_known` tokens; and the files that a store keeps of it.

    Raises InputError when there is none in `folder`, or when it is not this model's: it has ids that the model does not
    know, or less than half as many tokens as the model (whose vocabulary may be padded a little).
    """
    codec, files = load_tokenizer(folder)
    if codec.largest_id >= n_known or 2 * codec.n_tokens < n_known:
        raise InputError(
            f"model {name}: its tokenizer has {codec.n_tokens:,} tokens, ids up to {codec.largest_id:,}; the model knows "
            f"{n_known:,}: put the tokenizer that it was trained with beside it (tokenizer.json)."
        )
    return codec, files


def store_tokenizer(store: Store) -> TextCodec:
    """The tokenizer copy inside a store. Raises DamagedStore when it is missing or was changed."""
    policy = store.manifest.policy
    return parse_tokenizer(store.tokenizer_file(), store.url, policy.bos_token_id, policy.separator_token_id)


def parse_tokenizer(data: bytes, where: str, bos_token_id: int, separator_token_id: int) -> TextCodec:
    """A tokenizer from the bytes of its `tokenizer.json`. Raises StoreError when they are not one."""
    try:
        return TextCodec(_takes_text_as_it_is(Tokenizer.from_buffer(data)), bos_token_id, separator_token_id)
    except Exception as error:
        raise StoreError(f"{where}: not a readable tokenizer ({first_line(error)}); restore it from a copy.") from error


def _uses(part: Any, kind: str) -> bool:
    """Whether a part of a tokenizer's definition, or one inside it, is of a kind."""
    if isinstance(part, dict):
        return part.get("type") == kind or any(_uses(inner, kind) for inner in part.values())
    return isinstance(part, list) and any(_uses(inner, kind) for inner in part)


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's byte-level alphabet: printable bytes stand for themselves, the others for U+0100 and on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {byte: chr(byte) for byte in printable}
    alphabet |= {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in alphabet)}
    return alphabet
