"""Labels of any text from a file: each range holds at its tokens, and what is no range is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from tablekit import codes_manifest, dense_codes, text_table, write_table_store
from tokenizerkit import byte_level, llama_like, saved, unigram

from actstore.errors import InputError
from cli import cli
from pipelines.codes.code_store import CodeStore
from pipelines.collect.config import CollectConfig
from pipelines.collect.stage import collect
from pipelines.concepts.labels import SegmentLabels, read_labels, stored_documents
from pipelines.text.codec import TextCodec
from pipelines.text.tokenizer_files import store_tokenizer

TEXTS = {
    f"story{i}.txt": f"The {animal} number {i * 31} went to the déjà vu wood, and the {animal} slept — “well”.\n"
    * (1 + i % 3)
    for i, animal in enumerate(("fox", "hare", "owl", "newt", "mole") * 3)
}
ANIMALS = ("fox", "hare", "owl", "newt", "mole")


def ranges_of_animals() -> list[dict[str, Any]]:
    """Every animal's name, found in the text character by character."""
    return [
        {"document": name, "start": start, "stop": start + len(animal), "label": f"animal: {animal}"}
        for name, text in TEXTS.items()
        for animal in ANIMALS
        for start in range(len(text))
        if text.startswith(animal, start)
    ]


def jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> tuple[CodeStore, TextCodec]:
    table, codec, files = text_table(TEXTS, model_folder)
    path = tmp_path_factory.mktemp("codes") / "codes"
    write_table_store(
        path, codes_manifest(2, 2, codec), table, lambda i: dense_codes(np.ones((len(i), 2), np.float32)), files
    )
    return CodeStore(path), codec


def texts_where(store: CodeStore, codec: TextCodec, segment: SegmentLabels, label: int) -> str:
    """The text of the tokens that have a label, one after another."""
    ids = store.table(0, "tokens/ids")
    return codec.text(ids[np.flatnonzero(segment.holds[:, [label]].toarray()[:, 0])])


def test_labels_of_a_file_hold_at_the_tokens_of_their_ranges(opened: tuple[CodeStore, TextCodec], tmp_path: Path) -> None:
    labels = read_labels(*opened, jsonl(tmp_path / "animals.jsonl", ranges_of_animals()))
    assert labels.names == tuple(sorted(f"animal: {animal}" for animal in ANIMALS))
    assert labels.left_out == 0
    for i, name in enumerate(labels.names):
        animal = name.removeprefix("animal: ")
        found = texts_where(*opened, labels.segments[0], i)
        n_expected = sum(text.count(animal) for text in TEXTS.values())
        assert n_expected > 3
        assert found.replace(" ", "") == animal * n_expected


@pytest.mark.parametrize("make", [llama_like, unigram, byte_level])
def test_characters_are_those_of_the_text_whatever_the_tokenizer_and_whatever_it_spells_out(
    make: Callable[[], TextCodec], tmp_path: Path
) -> None:
    """A space that the tokenizer puts before a text, and a special token spelt out in it, move no label."""
    text = "the cat</s> ate the cat"
    table, codec, files = text_table({"a.txt": text, "b.txt": text}, saved(make(), tmp_path / "model"))
    write_table_store(
        tmp_path / "codes",
        codes_manifest(1, 1, codec),
        table,
        lambda i: dense_codes(np.ones((len(i), 1), np.float32)),
        files,
    )
    store = CodeStore(tmp_path / "codes")
    last = {"document": "a.txt", "start": len(text) - 3, "stop": len(text), "label": "the last word"}
    labels = read_labels(store, codec, jsonl(tmp_path / "last.jsonl", [last]))
    offsets, holds = store.table(0, "documents/offsets"), labels.segments[0].holds[:, [0]].toarray()[:, 0]
    at = store.document_names(0).index("a.txt")
    own = np.flatnonzero(holds)
    assert codec.text(store.table(0, "tokens/ids")[own]).strip() == "cat"
    assert own[-1] == offsets[at + 1] - 2


def test_parquet_says_the_same_as_jsonl(opened: tuple[CodeStore, TextCodec], tmp_path: Path) -> None:
    records = ranges_of_animals()
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "animals.parquet")
    one = read_labels(*opened, tmp_path / "animals.parquet")
    other = read_labels(*opened, jsonl(tmp_path / "animals.jsonl", records))
    assert one.names == other.names
    assert (one.segments[0].holds != other.segments[0].holds).nnz == 0
    assert one.segments[0].holds.nnz > 20


def test_ranges_of_tokens_and_overlapping_ranges_count_once(opened: tuple[CodeStore, TextCodec], tmp_path: Path) -> None:
    (first,) = stored_documents(opened[0])[0].spans
    own = {"document": stored_documents(opened[0])[0].name, "label": "start", "unit": "tokens"}
    path = jsonl(tmp_path / "own.jsonl", [{**own, "start": 0, "stop": 3}, {**own, "start": 2, "stop": 5}])
    holds = read_labels(*opened, path).segments[0].holds.toarray()[:, 0]
    np.testing.assert_array_equal(np.flatnonzero(holds), first[1] + np.arange(5))
    assert holds.max() == 1


def test_more_labels_than_the_bits_of_a_word(opened: tuple[CodeStore, TextCodec], tmp_path: Path) -> None:
    name, text = next(iter(TEXTS.items()))
    records = [{"document": name, "start": i % 40, "stop": i % 40 + 1, "label": f"label {i:03}"} for i in range(150)]
    labels = read_labels(*opened, jsonl(tmp_path / "many.jsonl", records))
    assert len(labels.names) == 150
    assert labels.segments[0].holds.shape[1] == 150
    assert len(text) > 40


GOOD = {"document": "story0.txt", "start": 0, "stop": 3, "label": "a"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({**GOOD, "stop": 0}, "line 2: start 0, stop 0: need whole numbers with 0 <= start < stop."),
        ({**GOOD, "start": -1}, "line 2: start -1, stop 3: need whole"),
        ({**GOOD, "start": 0.5}, "line 2: start 0.5, stop 3: need whole"),
        (
            {"document": "story0.txt", "label": "a"},
            "line 2: lacks start, stop; each label needs document, start, stop, label.",
        ),
        ([1, 2], "line 2: lacks an object; each label needs"),
        ({**GOOD, "unit": "words"}, "line 2: unit 'words': choose characters or tokens."),
        ({**GOOD, "label": "two\nlines"}, "line 2: document 'story0.txt', label 'two\\nlines': need text"),
        (
            {**GOOD, "stop": 9999},
            f"line 2: 'story0.txt' has {len(TEXTS['story0.txt'])} characters, the range is 0:9999; count",
        ),
    ],
)
def test_what_is_no_range_is_named_in_one_line(
    opened: tuple[CodeStore, TextCodec], tmp_path: Path, record: Any, message: str
) -> None:
    path = jsonl(tmp_path / "labels.jsonl", [GOOD, record])
    with pytest.raises(InputError) as raised:
        read_labels(*opened, path)
    assert str(raised.value).startswith(f"{path}, {message}")
    assert "\n" not in str(raised.value)


def test_a_file_that_is_none_or_fits_nothing_is_refused(opened: tuple[CodeStore, TextCodec], tmp_path: Path) -> None:
    broken, other, elsewhere = tmp_path / "a.jsonl", tmp_path / "a.csv", tmp_path / "b.jsonl"
    broken.write_text("{")
    other.write_text("")
    (tmp_path / "a.parquet").write_text("no")
    jsonl(elsewhere, [{**GOOD, "document": "elsewhere.txt"}])
    for path, message in (
        (broken, "line 1: no JSON"),
        (other, "no file of labels"),
        (tmp_path / "none.jsonl", "no such file"),
        (tmp_path / "a.parquet", "no Parquet file"),
        (elsewhere, "labels no document of"),
    ):
        with pytest.raises(InputError, match=message):
            read_labels(*opened, path)


def test_documents_that_are_not_there_are_counted(opened: tuple[CodeStore, TextCodec], tmp_path: Path) -> None:
    path = jsonl(tmp_path / "labels.jsonl", [GOOD, {**GOOD, "document": "elsewhere.txt"}])
    assert read_labels(*opened, path).left_out == 1


def test_text_that_is_no_python_needs_labels_or_to_be_called_python(opened: tuple[CodeStore, TextCodec]) -> None:
    with pytest.raises(InputError, match=f"0 of {len(TEXTS)} documents are Python by their name; pass --labels FILE"):
        read_labels(*opened, None)
    assert len(read_labels(*opened, "python").names) == 51


def test_a_document_cut_by_a_token_limit_is_labelled_as_a_whole(
    small_config: CollectConfig, texts: Path, tmp_path: Path
) -> None:
    """A store of two segments: the document on the edge lies in both, and a range over the edge holds on both sides."""
    for tokens in (1500, 2500):
        collect(replace(small_config, out=tmp_path / "store", tokens=tokens))
    from actstore.reader import ActivationStore

    store = ActivationStore(tmp_path / "store")
    codec = store_tokenizer(store)
    documents = stored_documents(store)
    (both,) = [document for document in documents if len(document.spans) == 2]
    text = (texts / both.name).read_text(encoding="utf-8")
    path = jsonl(tmp_path / "labels.jsonl", [{"document": both.name, "start": 0, "stop": len(text), "label": "all of it"}])
    labels = read_labels(store, codec, path)
    for segment, start, stop in both.spans:
        found = np.flatnonzero(labels.segments[segment].holds.toarray()[:, 0])
        np.testing.assert_array_equal(found, np.arange(start, stop))
    pieces = [store.table(segment, "tokens/ids")[start:stop] for segment, start, stop in both.spans]
    assert text.startswith(codec.text(np.concatenate(pieces))) or both.is_cut
    assert [document.is_cut for document in documents].count(True) <= 2


def test_a_start_of_text_has_no_label_and_is_of_the_choosing_half() -> None:
    import scipy.sparse as sp

    segment = SegmentLabels(sp.csr_array(np.array([[1], [0], [1]])), np.array([True, True, False]))
    holds, half = segment.at(np.array([-1, 0, 1, 2]))
    assert holds.toarray()[:, 0].tolist() == [0, 1, 0, 1]
    assert half.tolist() == [False, True, True, False]


def test_the_command_says_in_one_line_that_text_needs_labels(codes: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["concepts", str(codes), "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    (line,) = [line for line in result.output.splitlines() if not line.startswith("concepts: ")]
    assert line.startswith("error: ")
    assert "0 of 24 documents are Python by their name; pass --labels FILE" in line
    assert not (tmp_path / "out").exists()
