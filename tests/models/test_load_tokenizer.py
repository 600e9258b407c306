"""A model folder as people have them: tokenizers under another name, of another model, with and without a configuration."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer

from actstore.errors import InputError
from pipelines.causal.engine.language_model import open_language_model
from pipelines.models.load import load_model, require_own_tokenizer, resolve_model
from pipelines.text.tokenizer_files import load_tokenizer

BUILTIN_SHA256 = "d2d22952"
"""The first digits of the hash that stores of the built-in model have always had."""


@pytest.fixture
def model(model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def changed_file(folder: Path, change: Callable[[Tokenizer], object]) -> Path:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    change(tokenizer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_a_model_with_an_adapter_beside_it_is_refused(model: Path) -> None:
    (model / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "gpt2"}))
    with pytest.raises(InputError, match=r"has an adapter \(adapter_config.json\).*; merge it first"):
        load_model(str(model), "cpu", "fp32")


def test_an_adapter_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="merge it first"):
        load_model(str(tmp_path), "cpu", "fp32")


def test_a_tokenizer_file_of_another_name_is_no_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").rename(model / "my_tokenizer.json")
    (model / "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match=r"has 1 special tokens and no other; put the model's tokenizer.json") as error:
        open_language_model(str(model), "cpu")
    assert "\n" not in str(error.value)


def test_a_tokenizer_with_ids_beyond_the_embedding_is_refused(model: Path) -> None:
    n = Tokenizer.from_file(str(model / "tokenizer.json")).get_vocab_size()
    changed_file(model, lambda tokenizer: tokenizer.add_tokens([f"<extra {i}>" for i in range(3)]))
    expected = f"has ids up to {n + 2}, the model's embedding {n} rows, 0 to {n - 1}; put the model's own"
    with pytest.raises(InputError, match=expected):
        open_language_model(str(model), "cpu")


def test_the_tokenizer_of_a_much_smaller_model_is_refused(model: Path) -> None:
    loaded = load_model(str(model), "cpu", "fp32")
    n_rows = len(loaded.get_input_embeddings().weight)  # type: ignore[operator, union-attr, arg-type]
    for n in (n_rows // 2, n_rows - 1, n_rows):
        require_own_tokenizer("m", loaded, n)
    for n in (2, n_rows // 2 - 1, n_rows + 1):
        with pytest.raises(InputError, match=rf"model m: its tokenizer has .* the model's embedding {n_rows} rows"):
            require_own_tokenizer("m", loaded, n)


def test_a_tokenizer_file_alone_has_the_identity_it_has_with_a_configuration(model: Path) -> None:
    configured, _ = load_tokenizer(str(model))
    (model / "tokenizer_config.json").unlink()
    alone, _ = load_tokenizer(str(model))
    assert alone.sha256 == configured.sha256
    assert (alone.bos_token_id, alone.separator_token_id) == (configured.bos_token_id, configured.separator_token_id)


def test_what_a_configuration_adds_without_touching_ids_is_no_other_identity(model: Path) -> None:
    before, _ = load_tokenizer(str(model))
    file = model / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "pad_token": "<pad>", "model_max_length": 7}))
    after, _ = load_tokenizer(str(model))
    assert after.n_vocabulary == before.n_vocabulary + 1
    assert after.sha256 == before.sha256


def test_what_determines_ids_is_another_identity(model: Path) -> None:
    before, _ = load_tokenizer(str(model))
    changed_file(model, lambda tokenizer: tokenizer.add_tokens([AddedToken("fox went")]))
    after, _ = load_tokenizer(str(model))
    assert after.ids(["fox went"]) != before.ids(["fox went"])
    assert after.sha256 != before.sha256
    file = model / "tokenizer_config.json"
    spaced_words = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}
    file.write_text(json.dumps({**json.loads(file.read_text()), **spaced_words}))
    spaced, _ = load_tokenizer(str(model))
    assert spaced.ids(["fox"]) != after.ids(["fox"])
    assert spaced.sha256 != after.sha256


def test_the_built_in_tokenizer_keeps_the_hash_that_its_stores_have() -> None:
    source = resolve_model("builtin")
    codec, _ = load_tokenizer(source)
    backend = AutoTokenizer.from_pretrained(source).backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    assert codec.sha256 == hashlib.sha256(backend.to_str().encode()).hexdigest()
    assert codec.sha256.startswith(BUILTIN_SHA256)
