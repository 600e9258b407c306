"""Every text of a corpus is read once, in an order that the seed alone decides, and nothing unreadable goes by."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actstore.errors import InputError
from pipelines.shared.stdlib_sources import stdlib_files
from pipelines.text.corpus import Document, open_corpus
from pipelines.text.sources import json_files, text_files

TEXT = st.text(st.characters(codec="utf-8"), max_size=30)
LINES = st.lists(st.tuples(TEXT, st.sampled_from(["\n", "\r\n", "\r", ""])), max_size=30)


def documents(spec: object, seed: int = 0) -> list[Document]:
    return list(open_corpus(str(spec), seed).documents())


def texts(spec: object, seed: int = 0) -> dict[str, str]:
    """Text by name; no name may stand for two documents."""
    found = documents(spec, seed)
    by_name = {document.name: document.text for document in found}
    assert len(by_name) == len(found)
    return by_name


def write_parquet(path: Path, column: str, values: list[object], row_group_size: int = 2) -> Path:
    pyarrow.parquet.write_table(pa.table({column: values, "n": range(len(values))}), path, row_group_size=row_group_size)
    return path


# Pieces


@settings(deadline=None, max_examples=100)
@given(lines=LINES, piece_bytes=st.integers(1, 80))
def test_every_line_of_a_text_file_lies_in_exactly_one_piece(lines: list[tuple[str, str]], piece_bytes: int) -> None:
    whole = "".join(line + end for line, end in lines)
    with tempfile.TemporaryDirectory() as folder, patch.object(text_files, "TEXT_PIECE_BYTES", piece_bytes):
        file = Path(folder, "f.txt")
        file.write_bytes(whole.encode())
        found = texts(file)
    in_order = [found[name] for name in sorted(found, key=lambda name: int(name.partition("@")[2] or 0))]
    assert "".join(in_order) == whole.removeprefix("\ufeff")
    assert all(piece.endswith("\n") for piece in in_order[:-1])


@settings(deadline=None, max_examples=100)
@given(
    bodies=st.lists(TEXT, max_size=20), piece_bytes=st.integers(1, 200), final=st.sampled_from(["", "\n", "\r\n", "\n\n"])
)
def test_every_record_of_a_jsonl_file_is_read_once(bodies: list[str], piece_bytes: int, final: str) -> None:
    """Also one with U+2028, or another character at which Python's splitlines would cut."""
    lines = [json.dumps({"n": i, "text": f"{i} {body}"}, ensure_ascii=False) for i, body in enumerate(bodies)]
    with tempfile.TemporaryDirectory() as folder, patch.object(json_files, "JSONL_PIECE_BYTES", piece_bytes):
        file = Path(folder, "f.jsonl")
        file.write_bytes(("\n".join(lines) + final).encode())
        found = texts(file)
    assert sorted(found.values()) == sorted(f"{i} {body}" for i, body in enumerate(bodies))


def test_a_piece_of_text_is_about_eight_kibibytes(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("A line of some words.\n" * 3000)
    sizes = [len(text) for text in texts(tmp_path / "book.txt").values()]
    assert len(sizes) == 9
    assert max(sizes) <= 8192 + 22


def test_a_source_file_is_one_piece_whatever_its_length(tmp_path: Path) -> None:
    (tmp_path / "long.py").write_text("x = 1\n" * 5000)
    assert texts(tmp_path) == {"long.py": "x = 1\n" * 5000}


# Order


def test_the_order_depends_on_the_seed_alone_and_covers_all(tmp_path: Path) -> None:
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    first = documents(tmp_path, seed=3)
    assert documents(tmp_path, seed=3) == first
    assert documents(f"{tmp_path}/*.txt", seed=3) == first
    other = documents(tmp_path, seed=4)
    assert other != first
    by_name = sorted(first, key=lambda document: document.name)
    assert sorted(other, key=lambda document: document.name) == by_name
    assert first != by_name
    assert {document.text for document in first} == {f"text {i}" for i in range(40)}


def test_reading_goes_on_after_the_documents_that_were_taken(tmp_path: Path) -> None:
    for i in range(7):
        (tmp_path / f"{i}.txt").write_text("" if i == 3 else f"text {i}")
    opened = open_corpus(str(tmp_path), 0)
    everything = list(opened.documents())
    assert len(everything) == 6, "an empty text is no document"
    for n_taken in range(9):
        assert list(opened.documents(n_taken)) == everything[n_taken:]


def test_the_fingerprint_is_of_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.txt").write_text("one")
    first = open_corpus(str(tmp_path / "a"), 0).fingerprint
    (tmp_path / "a").rename(tmp_path / "moved")
    assert open_corpus(str(tmp_path / "moved"), 1).fingerprint == first
    (tmp_path / "moved/x.txt").write_text("two")
    assert open_corpus(str(tmp_path / "moved"), 0).fingerprint != first


# Columns


def test_a_jsonl_column_is_chosen_by_name(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": "T", "body": "B"}\n\n{"text": null, "body": "7"}\n')
    assert texts(tmp_path / "d.jsonl") == {"d.jsonl:0": "T"}
    assert texts(f"{tmp_path}/d.jsonl#body") == {"d.jsonl:0": "B", "d.jsonl:2": "7"}
    with pytest.raises(InputError, match=r"d\.jsonl: no column 'nope'; it has text, body: choose one with #column"):
        documents(f"{tmp_path}/d.jsonl#nope")


def test_a_parquet_column_is_chosen_by_name(tmp_path: Path) -> None:
    write_parquet(tmp_path / "d.parquet", "body", ["a", None, "", "b", "c"])
    found = texts(f"{tmp_path}/d.parquet#body")
    assert found == {"d.parquet:0:0": "a", "d.parquet:1:1": "b", "d.parquet:2:0": "c"}
    with pytest.raises(InputError, match=r"d\.parquet: no column 'text'; it has body, n: choose one with #column"):
        documents(tmp_path / "d.parquet")


def test_a_text_file_has_no_column(tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_text("text")
    with pytest.raises(InputError, match=r"d\.txt: a \.txt file has no column 'body'; leave `#body` out"):
        documents(f"{tmp_path}/d.txt#body")


@pytest.mark.parametrize("line", ["{", "[1]", '"text"', "3"])
def test_a_line_that_is_no_record_is_refused(line: str, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(f'{{"text": "a"}}\n{line}\n')
    with pytest.raises(InputError, match=r"d\.jsonl: (not a line of JSON|no column 'text'; it has none)"):
        documents(tmp_path / "d.jsonl")


def test_a_parquet_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(InputError, match=r"d\.parquet: not a readable parquet file"):
        documents(tmp_path / "d.parquet")


# Encodings


def test_a_source_file_is_read_as_its_coding_line_says(tmp_path: Path) -> None:
    source = "# -*- coding: latin-1 -*-\nname = 'déjà vu'\n"
    (tmp_path / "a.py").write_bytes(source.encode("latin-1"))
    (tmp_path / "b.py").write_bytes(b"\xef\xbb\xbf" + "name = 'déjà vu'\n".encode())
    assert texts(tmp_path) == {"a.py": source, "b.py": "name = 'déjà vu'\n"}


@pytest.mark.parametrize("source", [b"# coding: klingon\n", b"x = '\xff'\n", b"#\n\n\nx = '\xff'\n"])
def test_a_source_file_that_cannot_be_decoded_is_named(source: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(source)
    with pytest.raises(InputError, match=r"a\.py: .*; convert the file to UTF-8\."):
        documents(tmp_path / "a.py")


@pytest.mark.parametrize("suffix", ["txt", "md", "jsonl"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "byte-order mark"])
def test_bad_utf8_is_named_by_file_and_byte(suffix: str, mark: bytes, tmp_path: Path) -> None:
    line = b'{"text": "a"}\n'
    good = mark + line * 200_000 if suffix == "jsonl" else mark + line * 2000
    file = tmp_path / f"bad.{suffix}"
    file.write_bytes(good + b"\xff\xfe\n")
    with pytest.raises(InputError, match=rf"bad\.{suffix}: byte {len(good)} is not utf-8; convert the file to UTF-8"):
        documents(file)


# What a specification names


def test_folders_globs_and_files_name_what_is_below_them(tmp_path: Path) -> None:
    for name in ("a/one.txt", "a/deep/two.md", "b/three.txt", "b/four.pdf"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert set(texts(tmp_path)) == {"a/one.txt", "a/deep/two.md", "b/three.txt"}
    assert set(texts(f"{tmp_path}/**/*.txt")) == {"a/one.txt", "b/three.txt"}
    assert set(texts(f"{tmp_path}/a/*.txt")) == {"one.txt"}
    assert set(texts(tmp_path / "b/three.txt")) == {"three.txt"}


@pytest.mark.parametrize("name", ["notes#1.txt", "notes[1].txt", "#.txt", "what?.txt"])
def test_a_file_is_found_by_its_own_name_whatever_is_in_it(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    (tmp_path / "notes1.txt").write_text("not mine")
    assert texts(tmp_path / name) == {name: "mine"}


def test_a_hash_in_a_name_or_a_glob_leaves_room_for_a_column(tmp_path: Path) -> None:
    for name in ("a#1.jsonl", "a#2.jsonl"):
        (tmp_path / name).write_text('{"text": "T", "body": "B"}\n')
    assert set(texts(f"{tmp_path}/a#1.jsonl#body").values()) == {"B"}
    assert texts(f"{tmp_path}/a#*.jsonl") == {"a#1.jsonl:0": "T", "a#2.jsonl:0": "T"}


def test_a_name_of_bytes_that_are_no_text_is_shown_and_read(tmp_path: Path) -> None:
    file = Path(str(tmp_path / "caf") + "\udce9.txt")  # latin-1 é, as Python shows it
    file.write_text("text")
    ((name, text),) = texts(tmp_path).items()
    assert (name, text) == ("caf\ufffd.txt", "text")


def test_nothing_to_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "paper.pdf").write_text("%PDF")
    for spec in (tmp_path, tmp_path / "paper.pdf", f"{tmp_path}/*.pdf"):
        said = f"corpus {spec}: 1 file of a kind that is not read (.pdf 1); read are .txt, "
        with pytest.raises(InputError, match=re.escape(said)):
            open_corpus(str(spec), 0)
    for spec in (tmp_path / "nowhere.txt", f"{tmp_path}/*.md"):
        with pytest.raises(InputError, match=re.escape(f"corpus {spec}: no file there; check the path")):
            open_corpus(str(spec), 0)


# The datasets library


@pytest.fixture
def _offline(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = str(tmp_path_factory.mktemp("cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("huggingface_hub.constants.HF_HUB_OFFLINE", "datasets.config.HF_HUB_OFFLINE"):
        monkeypatch.setattr(name, True)
    for name in ("datasets.config.HF_DATASETS_CACHE", "datasets.config.HF_MODULES_CACHE"):
        monkeypatch.setattr(name, cache)


@pytest.mark.usefixtures("_offline")
def test_a_dataset_is_streamed_in_its_own_order(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", "body", ["a", "b", None, "c", "d"])
    opened = open_corpus(f"hf:{tmp_path}:train#body", 0)
    assert [document.text for document in opened.documents()] == ["a", "b", "c", "d"]
    assert [document.text for document in opened.documents(2)] == ["c", "d"]
    assert len({document.name for document in opened.documents()}) == 4
    assert open_corpus(f"hf:{tmp_path}#body", 7).fingerprint == opened.fingerprint
    with pytest.raises(InputError, match=r"no column 'text'; it has body, n: choose one with #column"):
        documents(f"hf:{tmp_path}")
    with pytest.raises(InputError, match=r"cannot be streamed .*check the name"):
        documents(f"hf:{tmp_path}:nosplit#body")


@pytest.mark.usefixtures("_offline")
def test_a_dataset_that_cannot_be_reached_is_refused_in_one_line() -> None:
    with pytest.raises(InputError, match="corpus hf:no-such-owner/no-such-data: cannot be streamed") as caught:
        open_corpus("hf:no-such-owner/no-such-data", 0)
    assert "\n" not in str(caught.value)


# The standard library


def test_the_standard_library_is_a_corpus_without_tests() -> None:
    opened = open_corpus("stdlib", 0)
    assert opened == open_corpus("stdlib", 0)
    names = {piece.name for piece in opened.pieces}
    assert names == {file.name for file in stdlib_files()}
    assert {"json", "pathlib", "argparse"} <= names
    assert not any(part.startswith("test") for name in names for part in name.split(".")[:1])
    head = [next(opened.documents(skip)) for skip in range(3)]
    assert [document.name for document in head] == [piece.name for piece in opened.pieces[:3]]
    assert all(document.text for document in head)


def test_a_file_whose_name_has_two_lines_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a\nb.txt").write_text("one")
    (tmp_path / "c.txt").write_text("two")
    assert texts(tmp_path) == {"a⏎b.txt": "one", "c.txt": "two"}


def test_code_beside_a_data_set_is_not_run(tmp_path: Path) -> None:
    folder, mark = tmp_path / "data", tmp_path / "ran"
    folder.mkdir()
    (folder / "data.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    with pytest.raises(InputError, match="cannot be streamed") as refused:
        documents(f"hf:{folder}")
    assert "\n" not in str(refused.value)
    assert not mark.exists()
