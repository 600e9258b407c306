"""Tokenizers of every kind: sizes with gaps, text token by token, bytes, special tokens spelt out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizerkit import byte_level, llama_like, metaspace_bpe, unigram, with_gaps, word_piece
from tokenizers import AddedToken

from pipelines.text.codec import TextCodec
from pipelines.text.corpus import Document
from pipelines.text.tokens import TokenSource

KINDS = {"llama": llama_like, "metaspace": metaspace_bpe, "unigram": unigram, "wordpiece": word_piece, "bytes": byte_level}
CODECS = {name: make() for name, make in KINDS.items()}
PIECES = {name: codec.token_bytes() for name, codec in CODECS.items()}
SENTENCE = "the cat ate the cat"
ANY_KIND = pytest.mark.parametrize("kind", KINDS)


# The size of a vocabulary


def test_the_size_of_a_vocabulary_is_its_largest_id_and_one() -> None:
    codec = with_gaps()
    assert codec.backend.get_vocab_size() == 251
    assert codec.n_vocabulary == len(codec.token_texts()) == len(codec.token_bytes()) == 300
    grown = byte_level()
    grown.backend.add_tokens([AddedToken("xyz")])
    assert TextCodec(grown.backend, 1, 2).n_vocabulary == grown.backend.token_to_id("xyz") + 1


def test_the_ids_of_a_vocabulary_with_gaps_fit_the_type_of_the_token_table() -> None:
    codec = with_gaps()
    table = TokenSource(iter([Document("d", "a")]), codec).take(10, 0)
    assert table is not None
    assert table.ids.dtype == np.uint16
    assert table.ids.tolist() == [299, 2]


@ANY_KIND
def test_an_id_that_is_no_token_shows_as_its_number_and_stands_for_no_bytes(kind: str) -> None:
    codec = CODECS[kind]
    ids = codec.ids(["the cat"])[0]
    assert codec.token_text(4100) == codec.text([4100]) == "<4100>"
    assert codec.text([4100, *ids]).startswith("<4100>")
    assert codec.text([*ids, 4100, 4101]) == codec.text(ids) + "<4100><4101>"
    assert codec.split_text([*ids, 4100])[-1] == "<4100>"
    assert codec.around([*ids, 4100], len(ids))[1] == "<4100>"
    gaps = with_gaps()
    assert (gaps.token_texts()[260], gaps.token_bytes()[260]) == ("<260>", b"")


# Text token by token


@pytest.mark.parametrize("kind", ["llama", "metaspace", "unigram", "wordpiece"])
def test_tokens_shown_one_by_one_keep_their_spaces(kind: str) -> None:
    codec = CODECS[kind]
    ids = codec.ids([SENTENCE])[0]
    shown = [codec.token_text(i) for i in ids]
    assert " cat" in shown
    assert "".join(shown) == " " + SENTENCE
    assert "".join(codec.split_text(ids)) == codec.text(ids) == SENTENCE
    cat = shown.index(" cat")
    assert codec.around(ids, cat) == ("the", " cat", " ate the cat")


@pytest.mark.parametrize("kind", ["llama", "metaspace"])
def test_bytes_of_a_character_that_the_vocabulary_does_not_have_are_its_bytes(kind: str) -> None:
    codec = CODECS[kind]
    text = "cat\té\n日"
    ids = codec.ids([text])[0]
    assert codec.text(ids) == text
    assert b"".join(codec.document_bytes(ids, codec.token_bytes())) == text.encode()
    newline = codec.backend.token_to_id("<0x0A>")
    assert (codec.token_text(newline), codec.token_bytes()[newline]) == ("\n", b"\n")
    assert codec.token_text(codec.backend.token_to_id("<0xC3>")) == "�"


@ANY_KIND
def test_every_token_of_every_kind_stands_for_bytes(kind: str) -> None:
    codec = CODECS[kind]
    assert all(isinstance(piece, bytes) for piece in codec.token_bytes())
    assert len(codec.token_bytes()) == codec.n_vocabulary


def test_a_byte_level_token_outside_the_alphabet_stands_for_itself() -> None:
    codec = byte_level({"a": 0, "b": 1, "日 本": 2})
    assert codec.token_bytes()[2] == codec.token_text(2).encode() == "日 本".encode()


@settings(deadline=None, max_examples=60)
@given(text=st.text("abcdehikot .<>/sé日\n", min_size=1, max_size=30), kind=st.sampled_from(sorted(KINDS)), data=st.data())
def test_pieces_of_a_text_join_to_what_the_decoder_gives(text: str, kind: str, data: st.DataObject) -> None:
    codec = CODECS[kind]
    ids = codec.ids([text])[0]
    if not ids:
        return
    decoded = codec.backend.decode(ids, skip_special_tokens=False)
    assert codec.text(ids) == decoded
    assert b"".join(codec.document_bytes(ids, PIECES[kind])).decode() == decoded
    pieces = codec.split_text(ids)
    if "�" not in "".join(pieces) and decoded:
        assert "".join(pieces) == decoded
        shown = [at for at, piece in enumerate(pieces) if piece]
        assert "".join(codec.around(ids, data.draw(st.sampled_from(shown)))) == decoded


# Special tokens spelt out


@pytest.mark.parametrize("make", [llama_like, metaspace_bpe, byte_level])
def test_a_special_token_spelt_out_in_a_text_is_text(make: Callable[[], TextCodec]) -> None:
    codec, text = make(), "the</s> cat<s>"
    ids = codec.ids([text])[0]
    assert codec.n_control(ids) == 0
    assert codec.text(ids) == text
    assert b"".join(codec.document_bytes(ids, codec.token_bytes())) == text.encode()


def test_an_encoding_by_others_in_between_does_not_bring_control_tokens_back() -> None:
    codec = byte_level()
    codec.ids(["a"])
    codec.backend.encode_special_tokens = False
    assert codec.n_control(codec.ids(["a</s>"])[0]) == 0


def test_special_tokens_that_a_tokenizer_gives_all_the_same_are_counted_and_keep_their_characters() -> None:
    codec, text = unigram(), "the</s>cat</s>"
    source = TokenSource(iter([Document("d", text), Document("e", "the cat")]), codec)
    table = source.take(100, 0)
    assert table is not None
    assert source.n_control == 2
    ids = table.ids[: table.offsets[1] - 1].tolist()
    assert b"".join(codec.document_bytes(ids, codec.token_bytes())) == text.encode()
