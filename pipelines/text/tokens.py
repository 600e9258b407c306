"""In: documents and a tokenizer. Out: the token table of a segment, and text again from its tokens.

Tokenising is cheap and deterministic, so it is a pass of its own, before the model runs. The table holds every
document's tokens followed by one separator; documents held out for evaluation come after all others.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from actstore.errors import InputError, StoreError
from actstore.reader import Store
from pipelines.shared.error_line import first_line
from pipelines.text.codec import TextCodec as TextCodec
from pipelines.text.corpus import Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BATCH_DOCUMENTS = 64
HELDOUT_MODULUS_LARGE, HELDOUT_MODULI_SMALL = 50, (20, 10, 5, 3, 2)
LARGE_CORPUS_DOCUMENTS = 1000


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
    if not tokenizer.is_fast:
        raise InputError(f"model {name}: its tokenizer has no fast form; put a tokenizer.json beside the model.")
    backend = tokenizer.backend_tokenizer
    # transformers makes a tokenizer of special tokens alone where a folder has no file of a name that it knows
    if not backend.get_vocab(with_added_tokens=False).keys() - {
        token.content for token in backend.get_added_tokens_decoder().values()
    }:
        raise InputError(
            f"model {name}: its tokenizer has {backend.get_vocab_size()} special tokens and no other; put the model's "
            "tokenizer.json, under this name, beside it."
        )
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"model {name}: its tokenizer names no end-of-text token; put a tokenizer_config.json with `eos_token` "
            "beside it."
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


def own_definition(backend: Tokenizer, file: str | None) -> str:
    """The text that a tokenizer's hash is taken of.

    That of its `tokenizer.json`, as `tokenizers` writes it, when loading changed nothing that determines ids; whether
    a tokenizer_config.json lies beside it, and what transformers adds, makes no difference then. Else of what was loaded.
    """
    loaded = backend.to_str()
    if file is None:
        return loaded
    written = Tokenizer.from_file(file)
    written.no_truncation()
    written.no_padding()
    text = written.to_str()
    return text if _determining_ids(text) == _determining_ids(loaded) else loaded


def _determining_ids(definition: str) -> dict[str, Any]:
    """What the ids of a text depend on: special tokens are never looked for in it, and nothing is added around it."""
    parts = json.loads(definition)
    # "" and null say the same of a prefix or suffix; an unknown token is given by name
    model = {name: value for name, value in parts["model"].items() if value not in ("", None)}
    added = [token for token in parts["added_tokens"] if not token["special"]]
    return {"model": model, "added": added, **{name: parts[name] for name in ("normalizer", "pre_tokenizer")}}


def _definition_file(name: str) -> str | None:
    """The `tokenizer.json` of a hub id or local folder on this disk, where it has one."""
    from transformers.utils.hub import cached_file

    try:
        return cached_file(
            name,
            "tokenizer.json",
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError:
        return None


def load_tokenizer(name: str) -> tuple[TextCodec, dict[str, bytes]]:
    """The tokenizer of a hub id or local folder, and the files that a store keeps a copy of. Errors as `open_tokenizer`."""
    tokenizer = open_tokenizer(name)
    codec = codec_of(tokenizer)
    codec = replace(codec, definition=own_definition(codec.backend, _definition_file(name)))
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

    `document` and `token` say where the next table begins: behind the first `token` tokens of that document. `n_control`
    counts the special tokens that the tokenizer gave for text.
    """

    def __init__(self, documents: Iterator[Document], codec: TextCodec, document: int = 0, token: int = 0):
        self.document, self.token = document, token
        self._documents, self._codec = documents, codec
        self._dtype = np.min_scalar_type(max(codec.n_vocabulary - 1, codec.separator_token_id))
        self._pending: deque[tuple[str, NDArray[Any]]] = deque()
        self.n_control = 0

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
            batch = list(islice(self._documents, BATCH_DOCUMENTS))
            for document, ids in zip(batch, self._codec.ids([document.text for document in batch]), strict=True):
                self.n_control += self._codec.n_control(ids)
                self._pending.append((document.name.replace("\n", " "), np.asarray(ids, self._dtype)))
        return bool(self._pending)


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
