"""The split is decided by the text: no copy of a training document is held out, and near copies are counted."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tablekit import text_table, token_table

from pipelines.text import copies, document
from pipelines.text.copies import SEQUENCE_TOKENS, Copies
from pipelines.text.split import TextKey, document_halves, is_heldout, text_key
from pipelines.text.tokenizer_files import load_tokenizer
from pipelines.text.tokens import TokenSource

WORDS = st.text(st.sampled_from("aZ09é ,.\n\t-中"), max_size=40)


@given(pieces=st.lists(WORDS, max_size=6))
def test_the_key_of_pieces_is_that_of_the_whole_text(pieces: list[str]) -> None:
    key = TextKey()
    for piece in pieces:
        key.update(piece)
    assert key.value == text_key("".join(pieces))


@given(text=WORDS)
def test_the_key_is_that_of_the_words_in_ascii_lower_case(text: str) -> None:
    """FORMAT.md, section 4.2, in five lines."""
    lower = "".join(c.lower() if c.isascii() else c for c in text)
    words = "".join(c if not c.isascii() or c.isalnum() else " " for c in lower).split(" ")
    normal = " ".join(word for word in words if word) or text
    assert text_key(text) == int.from_bytes(hashlib.sha256(normal.encode()).digest()[:8], "big")


@pytest.mark.parametrize(
    "other", ["THE fox,  went\nto the wood", "the fox went to the wood\r\n", " The Fox Went To The-Wood!"]
)
def test_texts_that_differ_in_case_space_and_punctuation_are_one(other: str) -> None:
    assert text_key(other) == text_key("the fox went to the wood")
    assert text_key(other) != text_key("the fox went to the woods")


def test_the_halves_do_not_depend_on_what_is_held_out() -> None:
    keys = np.array([text_key(str(i)) for i in range(4000)], np.uint64)
    for chosen in (keys, keys[is_heldout(keys, 2)], keys[is_heldout(keys, 50)]):
        assert abs(document_halves(chosen).mean() - 0.5) < 3 / len(chosen) ** 0.5


def test_no_copy_of_a_training_document_is_held_out(model_folder: Path) -> None:
    """Decided by name, seven of seven held-out documents of a corpus had their text in training."""
    texts = {f"{folder}/{i}": f"the {i} foxes went to the wood" for folder in ("a", "b", "C") for i in range(40)}
    table, _, _ = text_table(texts, model_folder)
    held = {name: bool(held) for name, held in zip(table.names, table.heldout, strict=True)}
    assert 0 < sum(held.values()) < len(held)
    for i in range(40):
        assert held[f"a/{i}"] == held[f"b/{i}"] == held[f"C/{i}"]
    said = Copies.of(table)
    assert (said.documents, said.repeated, said.near) == (120, 80, 0)
    assert said.heldout == sum(held.values())


def test_all_documents_of_one_long_text_are_on_one_side(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document, "MOST_CHARACTERS", 60)
    codec, _ = load_tokenizer(str(model_folder))
    texts = {f"{i}.txt": " ".join(f"word{i}x{j}" for j in range(40)) for i in range(12)}
    parts = [part for name, text in texts.items() for part in document.documents_of(name, [text])]
    assert len(parts) > 3 * len(texts)
    table = TokenSource(iter(parts), codec).take(1 << 20, 2)
    assert table is not None
    sides: dict[str, set[bool]] = {name: set() for name in texts}
    for name, held in zip(table.names, table.heldout, strict=True):
        sides[name.split("+")[0]].add(bool(held))
    assert all(len(side) == 1 for side in sides.values())
    assert {True, False} == set.union(*sides.values())


@pytest.mark.parametrize("sample", [1 << 22, 64], ids=["all sequences", "a sample of them"])
def test_near_copies_are_the_heldout_documents_half_of_whose_sequences_were_trained_on(
    sample: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "MOST_SEQUENCES", sample)
    rng = random.Random(0)

    def words(n: int) -> list[int]:
        return [rng.randrange(2, 60000) for _ in range(n)]

    trained = [words(8000) for _ in range(5)]
    heldout = [
        words(8000),  # nothing of it
        trained[2][:2000] + words(6000),  # a quarter of it
        words(2000) + trained[3][2000:],  # three quarters of it
        trained[1][500:4500],  # all of a smaller one
        words(SEQUENCE_TOKENS - 1),  # too short to tell
    ]
    assert Copies.of(token_table([*trained, *heldout], len(heldout))).near == 2
    assert Copies.of(token_table(trained, 0)).near == 0
    assert Copies.of(token_table(heldout, len(heldout))).near == 0


def test_sequences_do_not_run_over_the_ends_of_documents() -> None:
    """Two short documents one after another are no copy of the same two words in training."""
    short = [list(range(2, 2 + SEQUENCE_TOKENS - 1)), list(range(50, 50 + SEQUENCE_TOKENS - 1))]
    assert Copies.of(token_table([*short, *short], 2)).near == 0
    one = list(range(2, 2 + SEQUENCE_TOKENS))
    assert Copies.of(token_table([one, one], 1)).near == 1
