"""From text to tokens and back, and from tokens to windows: nothing is lost, nothing is kept twice."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from modelkit import END_OF_TEXT
from tokenizers import AddedToken

from actstore.errors import InputError
from actstore.schema import PARTS, WindowPolicy
from pipelines.text.codec import TextCodec
from pipelines.text.corpus import Document
from pipelines.text.split import text_key
from pipelines.text.tokenizer_files import load_tokenizer
from pipelines.text.tokens import BATCH_DOCUMENTS, TokenSource, TokenTable
from pipelines.text.windows import Windows, cut_windows

TEXTS = st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=40), min_size=1, max_size=30)
BOS, SEPARATOR = 0, 1


@pytest.fixture(scope="module")
def codec(model_folder: Path) -> TextCodec:
    return load_tokenizer(str(model_folder))[0]


def tabled(texts: Sequence[str], codec: TextCodec, n_tokens: int = 10**9, modulus: int | None = None) -> TokenTable:
    """The table of texts named `0`, `1`, ..."""
    documents = (Document(str(i), text) for i, text in enumerate(texts))
    table = TokenSource(documents, codec).take(n_tokens, modulus)
    assert table is not None
    return table


def document_ids(table: TokenTable) -> dict[str, np.ndarray]:
    """Tokens of each document, without its separator."""
    bounds = zip(table.offsets[:-1], table.offsets[1:], strict=True)
    return {name: table.ids[a : b - 1] for name, (a, b) in zip(table.names, bounds, strict=True)}


# Tokens


@settings(deadline=None)
@given(texts=TEXTS)
def test_the_text_of_every_document_comes_back_from_its_tokens(texts: list[str], codec: TextCodec) -> None:
    table = tabled(texts, codec)
    pieces = codec.token_bytes()
    found = document_ids(table)
    assert len(found) == len(texts)
    for i, text in enumerate(texts):
        ids = found[str(i)]
        assert codec.text(ids) == text
        assert b"".join(pieces[token] for token in ids) == text.encode()


def test_an_end_of_text_spelt_inside_a_text_is_no_separator_and_comes_back(codec: TextCodec) -> None:
    """As a separator its rows would be dropped, and every later character be taken for another."""
    text = f"one{END_OF_TEXT}two"
    (ids,) = document_ids(tabled([text], codec)).values()
    assert (ids == codec.separator_token_id).sum() == 0
    assert codec.text(ids) == text


def test_an_added_token_stands_for_its_own_bytes(model_folder: Path) -> None:
    codec, _ = load_tokenizer(str(model_folder))
    codec.backend.add_tokens([AddedToken("  — ", normalized=False)])
    ids = codec.ids(["a  — b"])[0]
    assert b"".join(codec.token_bytes()[token] for token in ids) == "a  — b".encode()


def test_a_tokenizer_that_would_cut_or_pad_takes_texts_whole(model_folder: Path, tmp_path: Path) -> None:
    _, files = load_tokenizer(str(model_folder))
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    codec, _ = load_tokenizer(str(tmp_path))
    codec.backend.enable_truncation(4)
    codec.backend.enable_padding(length=50)
    codec.backend.save(str(tmp_path / "tokenizer.json"))
    loaded, _ = load_tokenizer(str(tmp_path))
    text = "the fox went to the wood " * 3
    assert loaded.text(loaded.ids([text, "a"])[0]) == text


def test_documents_held_out_come_last_and_each_part_keeps_the_order(codec: TextCodec) -> None:
    table = tabled([f"text {i}" for i in range(200)], codec)
    assert (np.diff(table.heldout.astype(int)) >= 0).all()
    for part in (0, 1):
        names = [int(name) for name, held in zip(table.names, table.heldout, strict=True) if held == part]
        assert names
        assert names == sorted(names)
    assert table.n_train_tokens == table.offsets[np.argmax(table.heldout)]
    assert (table.ids[table.offsets[1:] - 1] == codec.separator_token_id).all()
    assert table.offsets[-1] == len(table.ids)
    np.testing.assert_array_equal(table.part_documents("train")[:-1], table.offsets[:-1][table.heldout == 0])
    np.testing.assert_array_equal(table.part_documents("heldout")[:-1], table.offsets[:-1][table.heldout == 1])


def test_a_documents_split_depends_on_its_whole_text_alone(codec: TextCodec) -> None:
    texts = [f"text {i} of many words" for i in range(200)]
    table = tabled(texts, codec)
    for name, held in zip(table.names, table.heldout, strict=True):
        first_eight = int.from_bytes(hashlib.sha256(texts[int(name)].encode()).digest()[:8], "big")
        assert held == (first_eight % table.heldout_modulus == 0)
    held_of = dict(zip(table.names, table.heldout, strict=True))
    turned = tabled(texts[::-1], codec, modulus=table.heldout_modulus)
    assert {texts[::-1][int(name)]: held for name, held in zip(turned.names, turned.heldout, strict=True)} == {
        texts[int(name)]: held for name, held in held_of.items()
    }
    cut = tabled(texts, codec, n_tokens=400, modulus=table.heldout_modulus)
    assert all(held_of[name] == held for name, held in zip(cut.names, cut.heldout, strict=True))


@pytest.mark.parametrize("n_documents", [1, 2, 3, 5, 8, 13, 40, 200, 999, 1000])
def test_the_modulus_is_the_rule_of_the_number_of_documents(n_documents: int, codec: TextCodec) -> None:
    texts = [f"text {i}" for i in range(n_documents)]
    keys = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") for text in texts]

    def some_but_not_all(modulus: int) -> bool:
        return 0 < sum(key % modulus == 0 for key in keys) < n_documents

    small = next((modulus for modulus in (20, 10, 5, 3, 2) if some_but_not_all(modulus)), 0)
    table = tabled(texts, codec)
    assert table.heldout_modulus == (50 if n_documents >= 1000 else small)
    if n_documents == 1:
        assert table.heldout_modulus == table.heldout.sum() == 0
    if n_documents >= 40:
        assert 0 < table.heldout.sum() < n_documents


def test_a_modulus_that_was_chosen_before_is_kept(codec: TextCodec) -> None:
    assert tabled(["a"] * 40, codec, modulus=2).heldout_modulus == 2
    assert tabled(["a"] * 40, codec, modulus=0).heldout.sum() == 0


@settings(deadline=None)
@given(texts=TEXTS, n_tokens=st.integers(1, 400))
def test_the_number_of_tokens_is_exact_and_only_the_last_document_is_cut(
    texts: list[str], n_tokens: int, codec: TextCodec
) -> None:
    whole, cut = document_ids(tabled(texts, codec)), document_ids(tabled(texts, codec, n_tokens))
    assert sum(map(len, cut.values())) == min(n_tokens, sum(map(len, whole.values())))
    assert set(cut) == {str(i) for i in range(len(cut))}
    for name, ids in cut.items():
        np.testing.assert_array_equal(ids, whole[name][: len(ids)])
        assert len(ids) == len(whole[name]) or name == str(len(cut) - 1)
        assert len(ids) > 0


# Table after table

LONGER = st.lists(st.integers(0, 60), min_size=1, max_size=12)
"""Words of each document; some have none."""
TAKES = st.lists(st.integers(1, 90), min_size=1, max_size=8)


def documents_of(lengths: list[int]) -> list[Document]:
    """Documents of this many different words, named by the number."""
    return [Document(str(i), " ".join(f"w{i}x{j}" for j in range(n))) for i, n in enumerate(lengths)]


def take_all(source: TokenSource, sizes: list[int], modulus: int | None = 3) -> list[TokenTable]:
    """Tables of these numbers of tokens, and one of the rest."""
    tables = [source.take(n_tokens, modulus) for n_tokens in [*sizes, 10**9]]
    return [table for table in tables if table is not None]


def joined(tables: list[TokenTable]) -> dict[str, list[int]]:
    """Tokens of each document from all the tables that have some of it."""
    found: dict[str, list[int]] = {}
    for table in tables:
        for name, ids in document_ids(table).items():
            found.setdefault(name, []).extend(ids.tolist())
    return found


@settings(deadline=None)
@given(lengths=LONGER, sizes=TAKES)
def test_tables_taken_one_after_another_have_every_token_once(
    lengths: list[int], sizes: list[int], codec: TextCodec
) -> None:
    """Nothing is repeated or lost, wherever the cuts fall."""
    documents = documents_of(lengths)
    tables = take_all(TokenSource(iter(documents), codec), sizes)
    expected = {document.name: codec.ids([document.text])[0] for document in documents}
    assert joined(tables) == {name: ids for name, ids in expected.items() if ids}
    for table, n_tokens in zip(tables[:-1], sizes, strict=False):
        assert len(table.ids) - len(table.names) == n_tokens
    for table in tables:
        texts = {document.name: document.text for document in documents}
        keys = np.array([text_key(texts[name]) for name in table.names], np.uint64)
        np.testing.assert_array_equal(table.keys, keys)
        np.testing.assert_array_equal(table.heldout, keys % np.uint64(3) == 0)
        assert table.n_train_tokens == table.offsets[len(table.names) - int(table.heldout.sum())]


@settings(deadline=None)
@given(lengths=LONGER, first=st.integers(1, 90), second=st.integers(1, 90))
def test_two_tables_have_what_one_of_both_sizes_has(lengths: list[int], first: int, second: int, codec: TextCodec) -> None:
    documents = documents_of(lengths)
    source = TokenSource(iter(documents), codec)
    parts = [table for table in (source.take(first, 3), source.take(second, 3)) if table is not None]
    whole = TokenSource(iter(documents), codec).take(first + second, 3)
    assert joined(parts) == ({} if whole is None else joined([whole]))
    if whole is not None:
        assert (parts[0].begins, parts[-1].ends) == (whole.begins, whole.ends)


@settings(deadline=None)
@given(lengths=LONGER, sizes=TAKES)
def test_each_table_begins_where_the_one_before_it_ended_and_says_so(
    lengths: list[int], sizes: list[int], codec: TextCodec
) -> None:
    """In documents of the corpus and tokens of one of them; documents without tokens are counted."""
    documents = documents_of(lengths)
    n_tokens = [len(ids) for ids in codec.ids([document.text for document in documents])]
    tables = take_all(TokenSource(iter(documents), codec), sizes)
    begins = (0, 0)
    for table in tables:
        assert table.begins == begins
        assert table.ends[1] == 0 or 0 < table.ends[1] < n_tokens[table.ends[0]]
        taken = sum(n_tokens[table.begins[0] : table.ends[0]]) - table.begins[1] + table.ends[1]
        assert len(table.ids) - len(table.names) == taken
        begins = table.ends
    if tables:
        assert begins[0] > max(i for i, n in enumerate(n_tokens) if n)
        assert begins[1] == 0


@settings(deadline=None)
@given(lengths=LONGER, sizes=TAKES, data=st.data())
def test_a_source_that_starts_where_a_table_ended_gives_the_tables_that_would_have_followed(
    lengths: list[int], sizes: list[int], data: st.DataObject, codec: TextCodec
) -> None:
    documents = documents_of(lengths)
    tables = take_all(TokenSource(iter(documents), codec), sizes)
    if not tables:
        return
    done = data.draw(st.integers(1, len(tables)))
    document, token = tables[done - 1].ends
    again = take_all(TokenSource(iter(documents[document:]), codec, document, token), sizes[done:])
    assert len(again) == len(tables) - done
    for found, expected in zip(again, tables[done:], strict=True):
        assert (found.begins, found.ends, found.names) == (expected.begins, expected.ends, expected.names)
        np.testing.assert_array_equal(found.ids, expected.ids)
        np.testing.assert_array_equal(found.offsets, expected.offsets)


def test_a_document_that_is_cut_goes_on_in_the_next_table(codec: TextCodec) -> None:
    (document,) = documents_of([30])
    (ids,) = codec.ids([document.text])
    source = TokenSource(iter([document]), codec)
    tables = [source.take(10, 0) for _ in range(3)]
    assert [table and table.ids[:-1].tolist() for table in tables] == [ids[:10], ids[10:20], ids[20:30]]
    assert [table and (table.begins, table.ends) for table in tables[:2]] == [((0, 0), (0, 10)), ((0, 10), (0, 20))]
    assert {table and table.ids[-1] for table in tables} == {codec.separator_token_id}


def test_documents_without_tokens_are_counted(codec: TextCodec) -> None:
    source = TokenSource(iter(documents_of([0, 2, 0, 0, 2, 0])), codec)
    first = source.take(len(codec.ids([documents_of([0, 2])[1].text])[0]), 0)
    second = source.take(10**9, 0)
    assert first is not None
    assert second is not None
    assert (first.names, first.ends) == (["1"], (2, 0))
    assert (second.names, second.begins) == (["4"], (2, 0))
    assert second.ends == (source.document, source.token) == (6, 0)


def test_no_more_documents_are_read_than_a_table_needs_and_one_batch(codec: TextCodec) -> None:
    n_read = 0

    def documents() -> Iterator[Document]:
        nonlocal n_read
        for document in documents_of([3] * 1000):
            n_read += 1
            yield document

    source = TokenSource(documents(), codec)
    table = source.take(5, 0)
    assert table is not None
    assert n_read == BATCH_DOCUMENTS
    rest = source.take(10**9, 0)
    assert rest is not None
    assert n_read == 1000
    assert len(joined([table, rest])) == 1000


def test_ids_take_the_smallest_type_that_holds_the_vocabulary(codec: TextCodec) -> None:
    assert tabled(["a"], codec).ids.dtype == np.uint16


def test_no_document_gives_no_table(codec: TextCodec) -> None:
    assert TokenSource(iter([]), codec).take(10, None) is None
    assert TokenSource(iter([Document("empty", "")]), codec).take(10, None) is None


def test_a_line_break_in_a_name_does_not_break_the_list_of_names(codec: TextCodec) -> None:
    table = TokenSource(iter([Document("a\nb", "text")]), codec).take(10, None)
    assert table is not None
    assert table.names == ["a b"]


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no tokenizer .*; put the tokenizer's files beside the model"):
        load_tokenizer(str(tmp_path))


# Windows


@st.composite
def tables_and_policies(draw: st.DrawFn) -> tuple[TokenTable, WindowPolicy]:
    """A table whose tokens all differ but for separators, some of them inside documents; any policy."""
    n_train, n_heldout = draw(st.integers(0, 5)), draw(st.integers(0, 3))
    lengths = draw(st.lists(st.integers(1, 25), min_size=n_train + n_heldout, max_size=n_train + n_heldout))
    offsets = np.concatenate([[0], np.cumsum(np.array(lengths, np.int64) + 1)]).astype(np.int64)
    ids = np.arange(offsets[-1]).astype(np.uint16) + 2
    ids[offsets[1:] - 1] = SEPARATOR
    if len(ids):
        ids[draw(st.lists(st.integers(0, len(ids) - 1), max_size=3))] = SEPARATOR
    heldout = (np.arange(len(lengths)) >= n_train).astype(np.uint8)
    names = [str(i) for i in range(len(lengths))]
    keys = np.arange(len(names), dtype=np.uint64)
    table = TokenTable(ids, offsets, heldout, names, keys, int(offsets[n_train]), heldout_modulus=2)
    policy = WindowPolicy(
        context=draw(st.integers(2, 12)),
        bos=draw(st.booleans()),
        packing=draw(st.sampled_from(["packed", "document"])),
        keep_special=draw(st.booleans()),
        bos_token_id=BOS,
        separator_token_id=SEPARATOR,
    )
    return table, policy


def batch_of_all(windows: Windows) -> tuple[np.ndarray, np.ndarray]:
    return windows.batch(np.arange(len(windows)))


@settings(deadline=None, max_examples=200)
@given(case=tables_and_policies())
def test_every_token_of_a_split_is_in_exactly_one_window(case: tuple[TokenTable, WindowPolicy]) -> None:
    table, policy = case
    covered = []
    for part in PARTS:
        windows = cut_windows(table, part, policy)
        assert ((windows.n_tokens >= 1) & (windows.n_tokens <= policy.stride)).all()
        taken = [np.arange(a, a + n) for a, n in zip(windows.token_start, windows.n_tokens, strict=True)]
        covered.append(np.concatenate([*taken, np.empty(0, np.int64)]))
        np.testing.assert_array_equal(covered[-1], np.arange(*table.part_range(part)))
        documents = [np.searchsorted(table.offsets, tokens[[0, -1]], side="right") for tokens in taken]
        if policy.packing == "document":
            assert all(first == last for first, last in documents), "no window runs over the end of a document"
            assert len(taken) == sum(-(-n // policy.stride) for n in np.diff(table.part_documents(part)))
        else:
            assert len(taken) == -(-len(covered[-1]) // policy.stride)
    assert sum(map(len, covered)) == len(table.ids)


@settings(deadline=None, max_examples=200)
@given(case=tables_and_policies())
def test_the_model_sees_the_start_token_the_windows_tokens_and_padding_at_the_end(
    case: tuple[TokenTable, WindowPolicy],
) -> None:
    table, policy = case
    for part in PARTS:
        windows = cut_windows(table, part, policy)
        inputs, kept = batch_of_all(windows)
        assert inputs.shape == kept.shape == (len(windows), policy.context)
        for window, (seen, chosen) in enumerate(zip(inputs, kept, strict=True)):
            start, n_tokens = windows.token_start[window], windows.n_tokens[window]
            real = [BOS] * policy.bos + table.ids[start : start + n_tokens].tolist()
            assert seen.tolist() == real + [SEPARATOR] * (policy.context - len(real))
            if policy.keep_special:
                expected = list(range(len(real)))
            else:
                expected = [position for position, token in enumerate(real) if position and token != SEPARATOR]
            assert np.flatnonzero(chosen).tolist() == expected
        np.testing.assert_array_equal(windows.kept_counts(), kept.sum(axis=1))


@settings(deadline=None)
@given(case=tables_and_policies(), data=st.data())
def test_a_window_is_the_same_in_any_batch(case: tuple[TokenTable, WindowPolicy], data: st.DataObject) -> None:
    table, policy = case
    windows = cut_windows(table, "train", policy)
    if not len(windows):
        return
    chosen = np.array(data.draw(st.lists(st.integers(0, len(windows) - 1), min_size=1, max_size=8)))
    everything = batch_of_all(windows)
    for part, whole in zip(windows.batch(chosen), everything, strict=True):
        np.testing.assert_array_equal(part, whole[chosen])
