"""The tokenizer of a model's folder or of a store's copy, as a codec; and what its identity is the hash of."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from actstore.errors import InputError, StoreError
from actstore.reader import Store
from pipelines.shared.error_line import first_line
from pipelines.text.codec import TextCodec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


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
