"""Files as they are in the world: each is read, character by character as it is there, or refused by its name in one line.

The rules are those of docs/CORPUS.md.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from modelkit import END_OF_TEXT, ROOT

from actstore.errors import InputError
from actstore.reader import ActivationStore
from cli import cli
from pipelines.collect.config import CollectConfig
from pipelines.collect.stage import collect
from pipelines.text import document
from pipelines.text.codec import TextCodec
from pipelines.text.corpus import Document, open_corpus
from pipelines.text.document import MOST_CHARACTERS, documents_of
from pipelines.text.sources import json_files
from pipelines.text.tokenizer_files import load_tokenizer, store_tokenizer
from pipelines.text.tokens import BATCH_CHARACTERS, TokenSource

WORDS = "The fox went to the wood, and saw “déjà vu” 17 times. "
LONG_LINE = WORDS * (5_000_000 // len(WORDS))
RIGHT_TO_LEFT = "שלום \u202eعليكم\u202c\u200f!\n"
MARKS = "e\u0301 \u00e9 👩\u200d🔬 \U0010ffff \ufffe \ue000 \u2028\u2029\u0085\x0b\x0c\x1c|\n"
ESCAPES = "\x1b]0;title\x07 \x9b2J \b\b\x7f\n"
NUL = "a\0b\0\0\0c\n"
SPELT_OUT = f"a {END_OF_TEXT} b <s> [PAD] <|im_start|>\n"
CHAT = [{"role": "user", "content": "Why?\n"}, {"role": "assistant", "content": None}, {"role": "user", "content": "So!"}]


def zstd(data: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(data, asbytes=True))


def parquet_of(table: pa.Table) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file)
    return file.getvalue()


def parquet(values: Any) -> bytes:
    return parquet_of(pa.table({"text": values}))


def jsonl(*texts: str) -> bytes:
    return b"".join(json.dumps({"n": i, "text": text}).encode() + b"\n" for i, text in enumerate(texts))


READ: dict[str, tuple[bytes, str]] = {
    "nul.txt": (NUL.encode(), NUL),
    "nul.jsonl": (jsonl(NUL), NUL),
    "half-a-pair.jsonl": (b'{"text": "x\\ud83dy \\udc00 \\ud83d\\ude00"}\n', "x\ufffdy \ufffd 😀"),
    "mark.txt": (b"\xef\xbb\xbfone\n\xef\xbb\xbftwo\n", "one\n\ufefftwo\n"),
    "mark.jsonl": (b"\xef\xbb\xbf" + jsonl("\ufeffkept"), "\ufeffkept"),
    "mark.csv": (b"\xef\xbb\xbftext\nwords\n", "words"),
    "mark.json": (b"\xef\xbb\xbf" + b'[{"text": "words"}]', "words"),
    "only-mark.txt": (b"\xef\xbb\xbf", ""),
    "empty.txt": (b"", ""),
    "empty.csv": (b"", ""),
    "empty.json": (b"", ""),
    "empty.txt.gz": (gzip.compress(b""), ""),
    "crlf.txt": (b"one\r\ntwo\r\n\r\n", "one\r\ntwo\r\n\r\n"),
    "cr.txt": (b"one\rtwo\r", "one\rtwo\r"),
    "line-ends.txt": (b"\n\n\n", "\n\n\n"),
    "latin-1.py": ("# coding: latin-1\ns = 'déjà'\r\n".encode("latin-1"), "# coding: latin-1\ns = 'déjà'\r\n"),
    "right-to-left.txt": (RIGHT_TO_LEFT.encode(), RIGHT_TO_LEFT),
    "right-to-left.jsonl": (jsonl(RIGHT_TO_LEFT), RIGHT_TO_LEFT),
    "marks.md": (MARKS.encode(), MARKS),
    "marks.csv": (b'text\n"' + MARKS.encode() + b'"\n', MARKS),
    "escapes.txt": (ESCAPES.encode(), ESCAPES),
    "spelt-out.txt": (SPELT_OUT.encode(), SPELT_OUT),
    "UPPER.TXT": (WORDS.encode(), WORDS),
    "packed.txt.gz": (gzip.compress(WORDS.encode()) + gzip.compress(b"More.\r\n"), WORDS + "More.\r\n"),
    "packed.jsonl.zst": (zstd(jsonl("a", "é")) + zstd(jsonl("c")), "aéc"),
    "packed.md.bz2": (bz2.compress(MARKS.encode()), MARKS),
    "packed.PY.XZ": (lzma.compress(b"x = 1\n"), "x = 1\n"),
    "packed.csv.gz": (gzip.compress(b"text\nwords\n"), "words"),
    "records.json": (json.dumps([{"text": "a"}, {"text": None}, {"text": "b"}], indent=1).encode(), "ab"),
    "record.json": (json.dumps({"text": "a", "n": float("nan")}, indent=1).encode(), "a"),
    "lines.json": (jsonl("a", "b"), "ab"),
    "not-a-number.jsonl": (b'{"n": NaN, "text": "a"}\n', "a"),
    "twice.jsonl": (b'{"text": "first", "text": "last"}\n', "last"),
    "fields.csv": (b'n,text\r\n1,"a ""quoted"", field\r\nof two lines"\r\n2,b\r\n', 'a "quoted", field\r\nof two linesb'),
    "fields.tsv": (b"text\tn\na, b\t1\n", "a, b"),
    "bytes.parquet": (parquet([b"caf\xc3\xa9\r\n", None, b""]), "café\r\n"),
    "nul.parquet": (parquet([NUL, RIGHT_TO_LEFT]), NUL + RIGHT_TO_LEFT),
    "repeated.parquet": (parquet(pa.array(["a", "b", "a"]).dictionary_encode()), "aba"),
    "long-line.txt": (LONG_LINE.encode(), LONG_LINE),
    "long-line.jsonl": (jsonl(LONG_LINE), LONG_LINE),
    "long-line.txt.gz": (gzip.compress(LONG_LINE.encode(), 1), LONG_LINE),
    "long-line.csv": (b"text\n" + b'"' + LONG_LINE.encode() + b'"', LONG_LINE),
    "long-cell.parquet": (parquet([LONG_LINE]), LONG_LINE),
    "no-space.txt": (b"x" * 3_000_000, "x" * 3_000_000),
}
"""File -> its bytes, and the text of its documents."""

REFUSED: dict[str, tuple[bytes, str]] = {
    "utf-16.txt": ("words".encode("utf-16"), "is UTF-16, by its first bytes; convert the file to UTF-8"),
    "utf-16-be.txt": (b"\xfe\xff" + "words".encode("utf-16-be"), "is UTF-16"),
    "utf-16-no-mark.txt": ("some words".encode("utf-16-le"), "is UTF-16"),
    "utf-16-no-mark.jsonl": (jsonl("a").decode().encode("utf-16-be"), "is UTF-16"),
    "utf-32.txt": ("words".encode("utf-32"), "is UTF-32"),
    "latin-1.txt": ("ab déjà".encode("latin-1"), "byte 4 is not utf-8; convert the file to UTF-8"),
    "latin-1.jsonl": (b'{"text": "d\xe9j\xe0"}', "byte 11 is not utf-8"),
    "latin-1.csv": (b"text\nd\xe9j\xe0\n", "byte 6 is not utf-8"),
    "latin-1.parquet": (parquet([b"d\xe9j\xe0"]), "latin-1.parquet:0:0: column 'text': byte 1 is not utf-8"),
    "encoded-half.txt": (b"a\xed\xa0\xbdb", "byte 1 is not utf-8"),
    "cut-character.txt": ("aé".encode()[:2], "byte 1 is not utf-8"),
    "no-text-encoding.py": (b"# coding: rot13\nx = 1\n", "'rot13' is not a text encoding"),
    "cut-short.txt.gz": (gzip.compress(WORDS.encode())[:-12], r"not a whole \.gz file"),
    "cut-short.txt.zst": (zstd(WORDS.encode())[:-4], r"not a whole \.zst file"),
    "cut-short.txt.bz2": (bz2.compress(WORDS.encode())[:-4], r"not a whole \.bz2 file"),
    "cut-short.txt.xz": (lzma.compress(WORDS.encode())[:-4], r"not a whole \.xz file"),
    "not-packed.txt.gz": (b"plain text", r"not a whole \.gz file"),
    "not-packed.txt.zst": (b"plain text", r"not a whole \.zst file"),
    "utf-16.txt.gz": (gzip.compress("words".encode("utf-16")), "is UTF-16"),
    "deep.jsonl": (b'{"text": ' + b"[" * 200_000, "not a line of JSON"),
    "deep.json": (b"[" * 200_000, "not JSON"),
    "digits.jsonl": (b'{"n": ' + b"1" * 100_000 + b', "text": "a"}', "not a line of JSON"),
    "half-a-record.jsonl": (jsonl("a")[:-4], "not a line of JSON"),
    "number.jsonl": (b'{"text": 7}\n', "column 'text' holds a number, not text"),
    "truth.jsonl": (b'{"text": true}\n', "column 'text' holds true or false, not text"),
    "object.jsonl": (b'{"text": {"body": "a"}}\n', "column 'text' holds an object, not text; .*#text.key"),
    "list.jsonl": (b'{"text": ["a", "b"]}\n', "list.jsonl:0: column 'text' holds a list, not text"),
    "scalar.json": (b"7", "no column 'text'; it has none"),
    "number.parquet": (parquet([1, 2]), "column 'text' holds int64, not text"),
    "list.parquet": (parquet([["a"], ["b"]]), "column 'text' holds list<.*>, not text"),
    "object.parquet": (parquet([{"a": "b"}]), "column 'text' holds struct<.*>, not text"),
    "quotes.csv": (b'text,n\n"a"b,1\n', "line 2 is not well quoted"),
    "open-quote.csv": (b'text\n"a\nb\n', "line 3 is not well quoted"),
    "fields.csv": (b"text,n\na\n", "record 0 has 1 fields, the first line has 2"),
    "twice.csv": (b"text,text\na,b\n", "has two columns 'text'; rename one"),
    "twice.parquet": (parquet_of(pa.table([["a"], ["b"]], names=["text", "text"])), "has two columns 'text'; rename one"),
    "columns.csv": (b"a;text\nb;c\n", "no column 'text'; it has a;text"),
    "not.parquet": (b"PAR1", "not a readable parquet file"),
    "empty.parquet": (b"", "not a readable parquet file"),
    "paper.pdf": (b"%PDF", r"1 file of a kind that is not read \(\.pdf 1\); read are \.txt, "),
    "words.txt.zip": (b"PK", r"of a kind that is not read \(\.zip 1\)"),
    "packed.parquet.gz": (b"", r"of a kind that is not read \(\.parquet\.gz 1\)"),
    "words": (b"words", r"of a kind that is not read \(no suffix 1\)"),
}
"""File -> its bytes, and what is said of it."""


def documents(spec: object) -> list[Document]:
    """In the order of the source."""
    opened = open_corpus(str(spec), 0)
    pieces = sorted(opened.pieces, key=lambda piece: (str(piece.path), getattr(piece, "start", 0)))
    return [found for piece in pieces for found in piece.documents()]


def joined(spec: object) -> str:
    return "".join(found.text for found in documents(spec))


@pytest.mark.parametrize("name", READ)
def test_what_is_read_is_the_source_character_by_character(name: str, tmp_path: Path) -> None:
    data, expected = READ[name]
    (tmp_path / name).write_bytes(data)
    found = documents(tmp_path / name)
    assert "".join(own.text for own in found) == expected
    assert max((len(own.text) for own in found), default=0) <= MOST_CHARACTERS
    assert len({own.name for own in found}) == len(found)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_refused_by_name_in_one_line(name: str, tmp_path: Path) -> None:
    data, said = REFUSED[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=rf"{re.escape(name)}.*{said}") as caught:
        documents(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_the_stored_text_is_the_source_character_by_character(model_folder: Path, tmp_path: Path) -> None:
    """All files that are read, in one folder, but those of millions of characters; with some that are skipped."""
    folder = tmp_path / "world"
    folder.mkdir()
    small = {name: case for name, case in READ.items() if len(case[1]) < 10_000}
    for name, (data, _) in small.items():
        (folder / name).write_bytes(data)
    for name in ("paper.pdf", "thesis.pdf", "words"):
        (folder / name).write_bytes(REFUSED.get(name, REFUSED["paper.pdf"])[0])
    result = collect(CollectConfig(out=tmp_path / "store", model=str(model_folder), corpus=str(folder), context=16))
    assert result["corpus_skipped"] == "3 files of a kind that is not read (.pdf 2, no suffix 1)"
    assert result["lone_surrogates"] == 2
    store, codec = ActivationStore(tmp_path / "store"), store_tokenizer(ActivationStore(tmp_path / "store"))
    ids, offsets, names = store.table(0, "tokens/ids"), store.table(0, "documents/offsets"), store.document_names(0)
    stored = {name: codec.text(ids[offsets[i] : offsets[i + 1] - 1]) for i, name in enumerate(names)}
    of_corpus = {found.name: found.text for found in open_corpus(str(folder), 0).documents()}
    assert stored == of_corpus
    for name, (_, expected) in small.items():
        own = [stored[key] for key in sorted(stored) if re.fullmatch(re.escape(name) + r"(@0|(:\d+)+)?", key)]
        assert "".join(own) == expected


# Lone surrogates


def command(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_lone_surrogates_of_a_corpus_are_replaced_counted_and_said(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": "the fox \\ud83d went \\udc00 to the wood"}\n' * 3)
    said = command("collect", "--model", model_folder, "--corpus", tmp_path, "--out", tmp_path / "s", "--context", 16)
    assert said.exit_code == 0, said.output
    assert re.search(r"^surrogates +6 lone, replaced by U\+FFFD$", said.stdout, re.MULTILINE)


def test_lone_surrogates_of_an_argument_are_replaced_and_counted(
    model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An argument in latin-1 reaches the tokenizer as `caf\\udce9`."""
    codec, _ = load_tokenizer(str(model_folder))
    assert codec.ids(["caf\udce9", "a"]) == codec.ids(["caf\ufffd", "a"])
    assert capsys.readouterr().err == "lone surrogates of the text, read as U+FFFD: 1\n"


def test_a_path_that_is_not_utf8_is_refused_in_one_line_where_a_record_would_name_it(
    model_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "caf\udce9.txt").write_text(WORDS)
    wanted = ("collect", "--model", model_folder, "--corpus", tmp_path / "caf\udce9.txt", "--context", 16, "--out")
    refused = command(*wanted, tmp_path / "s\udce9")
    assert refused.exit_code == 1
    said = f"error: out '{tmp_path}/s\\udce9': is a path whose bytes are not UTF-8; rename it."
    assert refused.stderr.splitlines()[1:] == [said]
    assert command(*wanted, tmp_path / "s").exit_code == 0
    assert ActivationStore(tmp_path / "s").manifest.corpus.spec == f"{tmp_path}/caf\ufffd.txt"


# Columns


def test_nested_text_is_taken_by_its_path(tmp_path: Path) -> None:
    record = {"meta": {"text": "nested", "deep": {"er": "deeper"}, "n": 1}, "a.b": "literal"}
    (tmp_path / "d.jsonl").write_text(json.dumps(record) + '\n{"meta": null, "a.b": "x"}\n')
    pyarrow.parquet.write_table(pa.Table.from_pylist([record, {"meta": None, "a.b": "x"}]), tmp_path / "d.parquet")
    for name in ("d.jsonl", "d.parquet"):
        assert joined(f"{tmp_path / name}#meta.text") == "nested"
        assert joined(f"{tmp_path / name}#meta.deep.er") == "deeper"
        assert joined(f"{tmp_path / name}#a.b") == "literalx"
        with pytest.raises(InputError, match=r"no column 'meta\.nope'; it has meta, a\.b"):
            joined(f"{tmp_path / name}#meta.nope")
        with pytest.raises(InputError, match=r"column 'meta' holds (an object|struct<.*>), not text"):
            joined(f"{tmp_path / name}#meta")


def test_chat_messages_are_taken_as_role_and_content_with_a_blank_line_between(tmp_path: Path) -> None:
    expected = "user: Why?\n\n\nassistant: \n\nuser: So!"
    (tmp_path / "d.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    pyarrow.parquet.write_table(pa.table({"messages": [CHAT]}), tmp_path / "d.parquet")
    shared = [{"from": turn["role"], "value": turn["content"]} for turn in CHAT]
    (tmp_path / "d.json").write_text(json.dumps([{"messages": shared}]))
    for name in ("d.jsonl", "d.parquet", "d.json"):
        assert joined(f"{tmp_path / name}#messages") == expected
    (tmp_path / "e.jsonl").write_text(json.dumps({"messages": [*CHAT, "words"]}) + "\n")
    with pytest.raises(InputError, match="column 'messages' holds a list, not text"):
        joined(f"{tmp_path / 'e.jsonl'}#messages")


# Long texts


@settings(deadline=None, max_examples=200)
@given(pieces=st.lists(st.text(st.sampled_from("ab é\n\ud83d😀"), max_size=12), max_size=12), most=st.integers(2, 9))
def test_a_long_text_is_several_documents_that_join_to_it(pieces: list[str], most: int) -> None:
    """However it comes: their texts are those of the whole, at most so long, and end at a line or before a space."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(document, "MOST_CHARACTERS", most)
        found = list(documents_of("d", pieces))
        assert found == list(documents_of("d", ["".join(pieces)]))
    whole = "".join(pieces)
    assert "".join(own.text for own in found) == whole.replace("\ud83d", "\ufffd")
    assert sum(own.n_replaced for own in found) == whole.count("\ud83d")
    assert all(0 < len(own.text) <= most for own in found)
    begins = [0]
    for own in found:
        begins.append(begins[-1] + len(own.text))
    assert [own.name for own in found] == [f"d+{n}" if n else "d" for n in begins[:-1]]
    for own, following in pairwise(found):
        late = own.text[(most + 1) // 2 :]
        assert own.text.endswith("\n") or ("\n" not in late and (following.text[0] == " " or " " not in late))


@settings(deadline=None, max_examples=300)
@given(
    text=st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from('\\"/u😀\ud83d\n')), max_size=40),
    escaped=st.booleans(),
    length=st.integers(12, 40),
    nested=st.booleans(),
)
def test_a_long_record_has_the_text_of_a_short_one(
    text: str, escaped: bool, length: int, nested: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """No escape, no pair of escapes and no character is cut where the bytes of its column are taken piece by piece."""
    text = text if escaped else text.replace("\ud83d", "")
    record: dict[str, Any] = {"n": 1, "text": text}
    line = json.dumps({"in": record} if nested else record, ensure_ascii=escaped).encode()
    file = tmp_path_factory.getbasetemp() / "long.jsonl"
    file.write_bytes(line)
    spec = f"{file}#in.text" if nested else file
    short = joined(spec)
    assert short == text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace") or "\ud83d" in text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_files, "LONG_RECORD_BYTES", length)
        assert joined(spec) == short


def test_a_packed_file_has_the_documents_of_the_unpacked_one(tmp_path: Path) -> None:
    lines = "".join(f"Line {i} of some words, {'and more' * (i % 50)}.\n" for i in range(2000)).encode()
    (tmp_path / "book.txt").write_bytes(lines)
    (tmp_path / "book.txt.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "book.txt.zst").write_bytes(zstd(lines))
    plain = {own.name.partition("@")[2]: own.text for own in documents(tmp_path / "book.txt")}
    assert len(plain) > 20
    for name in ("book.txt.gz", "book.txt.zst"):
        assert {own.name.partition("@")[2]: own.text for own in documents(tmp_path / name) if own.text} == plain


def test_reading_goes_on_inside_a_long_or_packed_text(tmp_path: Path) -> None:
    for name in ("long-line.txt.gz", "long-line.jsonl", "packed.jsonl.zst", "fields.csv"):
        (tmp_path / name).write_bytes(READ[name][0])
    opened = open_corpus(str(tmp_path), 0)
    everything = list(opened.documents())
    assert len(everything) > 14
    for n_taken in range(len(everything) + 2):
        assert list(opened.documents(n_taken)) == everything[n_taken:]


def test_nothing_is_read_where_nothing_is_named() -> None:
    """An empty specification is not this folder."""
    for spec in ("", "#", "#text"):
        with pytest.raises(InputError, match="no file there"):
            open_corpus(spec, 0)


def test_documents_are_tokenised_together_up_to_a_number_of_characters(model_folder: Path) -> None:
    batches: list[int] = []

    class Counting(TextCodec):
        def ids(self, texts: list[str]) -> list[list[int]]:
            batches.append(sum(map(len, texts)))
            return [[1] for _ in texts]

    codec, _ = load_tokenizer(str(model_folder))
    counting = Counting(codec.backend, codec.bos_token_id, codec.separator_token_id)
    found = [Document(f"{i}", "x" * 200_000) for i in range(20)] + list(documents_of("long", ["x" * 4_000_000]))
    table = TokenSource(iter(found), counting).take(10**9, 0)
    assert table is not None
    assert len(table.names) == len(found)
    assert max(batches) < BATCH_CHARACTERS + MOST_CHARACTERS
    assert sum(batches) == 8_000_000


PEAK = """
import re, sys
from pathlib import Path
from pipelines.text.corpus import open_corpus
from pipelines.text.tokenizer_files import load_tokenizer
from pipelines.text.tokens import TokenSource

codec, _ = load_tokenizer(sys.argv[1])
for file in sys.argv[2:]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    table = TokenSource(open_corpus(file, 0).documents(), codec).take(3000, 0)
    assert table is not None and len(table.ids) == 3001, table
    print(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""
"""The peak of a process in kB, file after file. `getrusage` would give that of the process which forked it, where larger."""
ON_LINUX = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from /proc")
LINES = ("long.txt", "long.txt.gz", "long.py", "no-space.txt", "long.jsonl", "escaped.jsonl")


def added_memory(model_folder: Path, folder: Path, n_bytes: int) -> dict[str, float]:
    """MiB that 3,000 tokens of each file of one line take at most, beyond those of a small file; printed."""
    files = [folder / name for name in ("small.txt", *LINES)]
    files[0].write_text(WORDS * 1000)
    for file in files[1:]:
        write_line(file, n_bytes)
    run = subprocess.run([sys.executable, "-c", PEAK, str(model_folder), *files], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    first, *peaks = (int(peak) / 1024 for peak in run.stdout.split())
    for file, peak in zip(files[1:], peaks, strict=True):
        n_mb = file.stat().st_size / 1e6
        print(f"{file.name}, {n_mb:,.0f} MB: peak {peak:,.0f} MiB, {peak - first:,.0f} more than a small file")
    return {file.name: peak - first for file, peak in zip(files[1:], peaks, strict=True)}


def write_line(file: Path, n_bytes: int) -> None:
    """One line without an end, in blocks."""
    block = (b"x" if file.name.startswith("no-space") else WORDS.encode()) * 10_000
    if file.name.startswith("escaped"):
        block = json.dumps(block.decode()).encode()[1:-1]
    with gzip.open(file, "wb", 1) if file.suffix == ".gz" else open(file, "wb") as out:
        out.write(b'{"text": "' if file.suffix == ".jsonl" else b"#" if file.suffix == ".py" else b"")
        for _ in range(n_bytes // len(block)):
            out.write(block)
        out.write(b'"}' if file.suffix == ".jsonl" else b"")


@ON_LINUX
@pytest.mark.processes
def test_a_line_of_five_megabytes_takes_bounded_memory(model_folder: Path, tmp_path: Path) -> None:
    """Tokenised whole, it took some 700 MiB."""
    assert max(added_memory(model_folder, tmp_path, 5_000_000).values()) < 300


@ON_LINUX
@pytest.mark.slow
def test_a_line_of_200_megabytes_takes_no_more(model_folder: Path, tmp_path: Path) -> None:
    """But for a record of JSON, whose bytes are held once. Tokenised whole, it took 8.8 GB and more."""
    for name, added in added_memory(model_folder, tmp_path, 200_000_000).items():
        assert added < 300 + (210 if name.endswith(".jsonl") else 0), name
