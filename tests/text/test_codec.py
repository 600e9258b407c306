"""Any tokenizer: ids with gaps, tokens with spaces, bytes, special tokens only spelt, one identity for one mapping."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from modelkit import END_OF_TEXT
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM

from actstore.errors import InputError
from pipelines.models.load import load_model, load_own_tokenizer
from pipelines.text.codec import TextCodec, load_tokenizer, parse_tokenizer
from pipelines.text.corpus import Document
from pipelines.text.tokens import TokenSource

TEXTS = ["The fox went to the wood, and saw 3 friends.", "“déjà vu” — a mole", "the   end\n"]


def metaspace() -> TextCodec:
    """As Llama's first: BPE with `▁` for a space, and bytes for what it has no token for."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=["▁"], show_progress=False)
    tokenizer.train_from_iterator(["the fox went to the wood and saw friends The mole a end vu"] * 3, trainer)
    definition = json.loads(tokenizer.to_str())
    definition["added_tokens"] = definition["added_tokens"][:3]  # bytes are tokens like others there
    return TextCodec(Tokenizer.from_str(json.dumps(definition)), 1, 2)


def unigram() -> TextCodec:
    """As T5's and Gemma's: pieces with probabilities, and a decoder that makes `▁` a space."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 20, trainer)
    return TextCodec(tokenizer, 1, 1)


def word_piece() -> TextCodec:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=90, special_tokens=["[UNK]", "[SEP]"], show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 20, trainer)
    return TextCodec(tokenizer, 1, 1)


@pytest.fixture(scope="module")
def byte_level(model_folder: Path) -> TextCodec:
    return load_tokenizer(str(model_folder))[0]


@pytest.fixture(params=["byte level", "metaspace and bytes", "unigram", "word piece"])
def codec(request: pytest.FixtureRequest, byte_level: TextCodec) -> TextCodec:
    makers = {"metaspace and bytes": metaspace, "unigram": unigram, "word piece": word_piece}
    return makers[request.param]() if request.param in makers else byte_level


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_shown_one_by_one_are_the_text_with_its_spaces(codec: TextCodec, text: str) -> None:
    (ids,) = codec.ids([text])
    shown = "".join(codec.token_text(token) for token in ids)
    whole = codec.text(ids)
    if "\ufffd" not in shown:  # a character of several tokens is no character in any of them
        assert shown.removeprefix(" ") == whole.removeprefix(" ")
    joined = b"".join(codec.token_bytes()[token] for token in ids).decode("utf-8", errors="replace")
    assert joined.removeprefix(" ") == whole.removeprefix(" ")


def test_every_token_has_a_text_and_bytes(codec: TextCodec) -> None:
    texts, pieces = codec.token_texts(), codec.token_bytes()
    assert len(texts) == len(pieces) == codec.n_vocabulary == codec.largest_id + 1
    assert texts == [codec.token_text(token) for token in range(codec.n_vocabulary)]


def test_tokens_of_a_metaspace_vocabulary_keep_their_spaces() -> None:
    codec = metaspace()
    (ids,) = codec.ids(["the fox é"])
    names = [codec.backend.id_to_token(token) for token in ids]
    assert any(name.startswith("▁") for name in names)
    assert "<0xC3>" in names
    assert [codec.token_text(i) for i, name in zip(ids, names, strict=True) if name[0] != "<"] == [
        name.replace("▁", " ") for name in names if name[0] != "<"
    ]
    assert b"".join(codec.token_bytes()[token] for token in ids) == " the fox é".encode()


# Ids


def with_gap(codec: TextCodec, token: str, number: int) -> TextCodec:
    """The same tokenizer with one more token, of a number far behind the others."""
    definition = json.loads(codec.backend.to_str())
    definition["model"]["vocab"][token] = number
    return TextCodec(Tokenizer.from_str(json.dumps(definition)), codec.bos_token_id, codec.separator_token_id)


def test_ids_with_gaps_have_a_place_each_and_a_table_holds_them(byte_level: TextCodec) -> None:
    """251 tokens and an id of 299 went into one byte: 43."""
    codec = with_gap(byte_level, "Q", 70_000)
    assert (codec.n_vocabulary, codec.n_tokens) == (70_001, byte_level.n_tokens)
    table = TokenSource(iter([Document("a", "Q Q")]), codec).take(100, 0)
    assert table is not None
    assert table.ids.dtype == np.uint32
    assert 70_000 in table.ids.tolist()
    assert codec.token_text(60_000) == "<60000>"
    assert codec.token_texts()[60_000] == "<60000>"
    assert codec.token_bytes()[60_000] == b""


def test_an_added_token_counts_and_a_special_one_that_no_text_gives_does_not(byte_level: TextCodec) -> None:
    backend = Tokenizer.from_str(byte_level.backend.to_str())
    backend.add_special_tokens([AddedToken("<pad>", special=True)])
    assert TextCodec(backend, 0, 0).n_vocabulary == byte_level.n_vocabulary
    backend.add_tokens([AddedToken("<tab>", normalized=False)])
    assert TextCodec(backend, 0, 0).n_vocabulary == byte_level.n_vocabulary + 2


@pytest.mark.parametrize("number", [400, 4100, 10**6])
def test_an_id_that_the_tokenizer_does_not_have_is_shown_as_its_number(byte_level: TextCodec, number: int) -> None:
    assert byte_level.token_text(number + byte_level.n_vocabulary) == f"<{number + byte_level.n_vocabulary}>"


# Special tokens


def test_a_special_token_spelt_out_is_text_like_any_other(model_folder: Path) -> None:
    codec, files = load_tokenizer(str(model_folder))
    again = parse_tokenizer(files["tokenizer.json"], "here", codec.bos_token_id, codec.separator_token_id)
    for text in (END_OF_TEXT, f"before {END_OF_TEXT}after", f"{END_OF_TEXT}{END_OF_TEXT}"):
        for reader in (codec, again):
            (ids,) = reader.ids([text])
            assert codec.separator_token_id not in ids
            assert reader.text(ids) == text
            assert b"".join(reader.token_bytes()[token] for token in ids) == text.encode()


# Identity


def test_what_frames_or_pads_ids_is_no_part_of_a_tokenizers_identity(model_folder: Path, tmp_path: Path) -> None:
    """Equal tokenizer.json with and without tokenizer_config.json were two tokenizers."""
    shutil.copytree(model_folder, tmp_path / "with")
    shutil.copytree(model_folder, tmp_path / "without")
    (tmp_path / "without" / "tokenizer_config.json").unlink()
    config = {"eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT, "tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "without" / "special_tokens_map.json").write_text(json.dumps(config))
    config |= {"pad_token": "<pad>", "model_max_length": 12, "padding_side": "left", "add_bos_token": True}
    (tmp_path / "with" / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "without" / "tokenizer_config.json").write_text(json.dumps({"eos_token": END_OF_TEXT}))
    one, other = (load_tokenizer(str(tmp_path / name))[0] for name in ("with", "without"))
    assert one.ids(TEXTS) == other.ids(TEXTS)
    assert one.sha256 == other.sha256


def test_another_mapping_from_text_to_ids_is_another_identity(byte_level: TextCodec) -> None:
    others = [with_gap(byte_level, "Q", 70_000)]
    for change in (
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
    ):
        definition = json.loads(byte_level.backend.to_str()) | change
        others.append(TextCodec(Tokenizer.from_str(json.dumps(definition)), 0, 0))
    added = Tokenizer.from_str(byte_level.backend.to_str())
    added.add_tokens([AddedToken("went", normalized=False)])
    others.append(TextCodec(added, 0, 0))
    assert len({byte_level.sha256, *(other.sha256 for other in others)}) == 1 + len(others)


def test_merges_written_as_text_or_as_pairs_are_one_identity(byte_level: TextCodec) -> None:
    definition = json.loads(byte_level.backend.to_str())
    definition["model"]["merges"] = [" ".join(pair) for pair in definition["model"]["merges"]]
    assert TextCodec(Tokenizer.from_str(json.dumps(definition)), 0, 0).sha256 == byte_level.sha256


# The model beside it


@pytest.fixture
def own_model(model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def test_a_tokenizer_that_is_not_the_models_is_one_line(own_model: Path, tmp_path: Path) -> None:
    """A folder whose tokenizer has another name gave one of 1 token, and then a corpus without text."""
    model = load_model(str(own_model), "cpu", "fp32")
    n_tokens = load_own_tokenizer(str(own_model), model)[0].n_tokens
    tiny = Tokenizer(models.WordLevel({END_OF_TEXT: 0}, unk_token=END_OF_TEXT))
    tiny.save(str(own_model / "tokenizer.json"))
    with pytest.raises(InputError, match=rf"its tokenizer has 1 tokens, ids up to 0; the model knows {n_tokens}: put"):
        load_own_tokenizer(str(own_model), model)
    for file in own_model.glob("*token*"):
        file.unlink()
    with pytest.raises(InputError, match=r"no tokenizer|no end-of-text token|its tokenizer has"):
        load_own_tokenizer(str(own_model), model)


def test_a_tokenizer_with_ids_beyond_the_model_is_one_line(own_model: Path) -> None:
    model = load_model(str(own_model), "cpu", "fp32")
    definition = json.loads((own_model / "tokenizer.json").read_text())
    definition["model"]["vocab"]["Q"] = n = model.config.vocab_size
    (own_model / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(InputError, match=rf"its tokenizer has {n} tokens, ids up to {n}; the model knows {n}"):
        load_own_tokenizer(str(own_model), model)


def test_a_vocabulary_that_is_padded_is_the_models(own_model: Path, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(own_model)
    config.vocab_size = 448
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "padded")
    for file in own_model.glob("*token*"):
        shutil.copy(file, tmp_path / "padded")
    model = load_model(str(tmp_path / "padded"), "cpu", "fp32")
    codec, _ = load_own_tokenizer(str(tmp_path / "padded"), model)
    assert codec.token_text(447) == "<447>"


def test_an_adapter_beside_the_weights_is_refused(own_model: Path) -> None:
    """It was ignored: the rows of the model without it were taken for those of the model with it."""
    (own_model / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(InputError, match=r"an adapter \(adapter_config\.json\) lies beside it.* merge it into the weights"):
        load_model(str(own_model), "cpu", "fp32")
