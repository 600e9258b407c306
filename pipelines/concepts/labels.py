"""In: a store, and labels of its text. Out: which labels hold at each token, and which half each document is of.

Labels come from Python's own grammar (`python_labels.py`) or from a file of ranges:

    {"document": "story01.txt", "start": 4, "stop": 7, "label": "animal"}

one such object a line (.jsonl), or the same columns (.parquet). `start` and `stop` count characters of the document from 0,
`stop` not included; with `"unit": "tokens"` they count its tokens. A document is called what the corpus calls it. A token
takes the labels that hold at its first character that is not white space (at its first character, if all are).
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from actstore import paths
from actstore.errors import InputError
from actstore.reader import Shard, Store
from actstore.schema import PARTS
from pipelines.concepts.python_labels import LABELS, first_characters, label_tokens
from pipelines.text.codec import TextCodec
from pipelines.text.split import document_halves

PYTHON, STDLIB = "python", "stdlib"
PYTHON_NAME = re.compile(r"\.pyi?(@\d+)?$")
UNITS = ("characters", "tokens")
FIELDS = ("document", "start", "stop", "label")
BATCH_RANGES = 65_536


@dataclass(frozen=True)
class SegmentLabels:
    """The labels of a segment's tokens: `holds` (n_tokens, L) 0/1; `half` (n_tokens,), True where rules are scored on the
    token's document, False where they are chosen on the document."""

    holds: sp.csr_array
    half: NDArray[np.bool_]

    def at(self, index: NDArray[np.int64]) -> tuple[sp.csr_array, NDArray[np.bool_]]:
        """((n, L) 0/1, (n,)) of rows at places of the token table; -1, a start of text, has no label and is of half 0."""
        place = np.maximum(index, 0)
        labels = self.holds[place]
        if (index < 0).any():
            labels = labels.multiply((index >= 0)[:, None].astype(np.int64)).tocsr()
            labels.eliminate_zeros()
        return labels, (index >= 0) & self.half[place]


@dataclass(frozen=True)
class LabelTable:
    """Names of labels, and where they hold in each segment; `left_out` counts labelled documents that the store does not
    have."""

    names: tuple[str, ...]
    segments: tuple[SegmentLabels, ...]
    left_out: int = 0


@dataclass(frozen=True)
class StoredDocument:
    """A document as a store holds it, with its text's key and its `spans` in the token tables: (segment, first, last + 1).

    It has several when it was cut by a token limit and the store then extended. `is_cut`: the store ends within it.
    """

    name: str
    key: int
    spans: tuple[tuple[int, int, int], ...]
    is_cut: bool = False


@dataclass(frozen=True)
class LabelRange:
    """A label of [start, stop) of a document, in one of `UNITS`; `where` it was read, for messages."""

    where: str
    document: str
    start: int
    stop: int
    label: str
    unit: str


def read_labels(store: Store, codec: TextCodec, source: str | Path | None) -> LabelTable:
    """The labels of a store's text: of a file, or of Python's grammar for `python` and, where the text is Python, for None.

    Raises InputError when None is given and most documents are no Python by their name, or for a file that is none.
    """
    documents = stored_documents(store)
    if source is None and store.manifest.corpus.spec != STDLIB:
        n_python = sum(bool(PYTHON_NAME.search(document.name)) for document in documents)
        if 2 * n_python < len(documents):
            raise InputError(
                f"{store.url}: {n_python:,} of {len(documents):,} documents are Python by their name; pass --labels FILE, "
                f"or --labels {PYTHON} to read them as Python all the same."
            )
    if source is None or str(source) == PYTHON:
        return _table(store, documents, LABELS, python_places(store, documents, codec))
    names, places, left_out = file_places(store, documents, codec, Path(source))
    return replace(_table(store, documents, names, places), left_out=left_out)


def stored_documents(store: Store) -> list[StoredDocument]:
    """Every document of a store, those that go on in the next segment put together again."""
    documents: list[StoredDocument] = []
    last: dict[str, int] = {}  # of each part, which one may go on in the next segment
    for segment in store.segments:
        names = store.document_names(segment.index)
        offsets = store.table(segment.index, paths.DOCUMENT_OFFSETS).tolist()
        heldout, keys = store.table(segment.index, paths.DOCUMENT_HELDOUT), store.document_keys(segment.index)
        before, last = last, {}
        for i, name in enumerate(names):
            part = PARTS[int(heldout[i])]
            span = (segment.index, offsets[i], offsets[i + 1] - 1)
            going_on = before.get(part) if part not in last and segment.first_token else None
            if going_on is not None and documents[going_on].name == name:
                documents[going_on] = replace(documents[going_on], spans=(*documents[going_on].spans, span))
                last[part] = going_on
            else:
                last[part] = len(documents)
                documents.append(StoredDocument(name, int(keys[i]), (span,)))
    if store.segments and store.segments[-1].next_token:
        for i in last.values():
            documents[i] = replace(documents[i], is_cut=True)
    return documents


Places = Iterator[tuple[StoredDocument, NDArray[np.int64], NDArray[np.int64]]]
"""For each document, some of its tokens, and a label that holds at each."""


def python_places(store: Store, documents: list[StoredDocument], codec: TextCodec) -> Places:
    """Where each label of `LABELS` holds."""
    bits_of_label = np.arange(len(LABELS), dtype=np.uint64)
    for document, token_bytes in _with_bytes(store, documents, codec):
        bits = label_tokens(_text(token_bytes), token_bytes)
        token, label = np.nonzero((bits[:, None] >> bits_of_label) & np.uint64(1))
        yield document, token, label


def file_places(
    store: Store, documents: list[StoredDocument], codec: TextCodec, path: Path
) -> tuple[tuple[str, ...], Places, int]:
    """(names of labels, where they hold, how many documents of the file the store does not have).

    Raises InputError, naming the line, for a range that cannot be; for a document of whose name there are two; and when no
    document of the file is in the store.
    """
    ranges: dict[str, list[LabelRange]] = defaultdict(list)
    for labelled in read_ranges(path):
        ranges[labelled.document].append(labelled)
    count = Counter(document.name for document in documents)
    for name in ranges:
        if count[name] > 1:
            raise InputError(
                f"{ranges[name][0].where}: {count[name]} documents of the store are called {name!r}; labels need one."
            )
    held = [document for document in documents if document.name in ranges]
    if not held:
        theirs = f"the file labels such as {next(iter(ranges))!r}" if ranges else "the file labels none"
        raise InputError(
            f"{path}: labels no document of {store.url}; the store's are such as {documents[0].name!r}, {theirs}."
        )
    names = tuple(sorted({own.label for document in held for own in ranges[document.name]}))
    number = {name: i for i, name in enumerate(names)}

    def places() -> Places:
        for document, token_bytes in _with_bytes(store, held, codec):
            text = _text(token_bytes)
            by_unit = {"characters": first_characters(text, token_bytes), "tokens": np.arange(len(token_bytes))}
            n_of_unit = {"characters": len(text), "tokens": len(token_bytes)}
            tokens, labels = [], []
            for own in ranges[document.name]:
                n = n_of_unit[own.unit]
                if own.stop > n and not document.is_cut:
                    raise InputError(
                        f"{own.where}: {document.name!r} has {n:,} {own.unit}, the range is {own.start}:{own.stop}; "
                        f"count {own.unit} of this document from 0."
                    )
                first, stop = np.searchsorted(by_unit[own.unit], [own.start, own.stop])
                tokens.append(np.arange(first, stop))
                labels.append(np.full(stop - first, number[own.label]))
            yield document, np.concatenate(tokens), np.concatenate(labels)

    return names, places(), len(ranges) - len(held)


def read_ranges(path: str | Path) -> Iterator[LabelRange]:
    """Every range of a file of labels. Raises InputError, naming the line, for what is no range."""
    path = Path(path)
    if not path.exists() or path.suffix not in (".jsonl", ".parquet"):
        raise InputError(
            f"{path}: {'no file of labels (.jsonl or .parquet)' if path.exists() else 'no such file'}; pass one."
        )
    records = _jsonl_records(path) if path.suffix == ".jsonl" else _parquet_records(path)
    for where, record in records:
        if not isinstance(record, dict) or (missing := [name for name in FIELDS if record.get(name) is None]):
            lacking = "an object" if not isinstance(record, dict) else ", ".join(missing)
            raise InputError(f"{where}: lacks {lacking}; each label needs {', '.join(FIELDS)}.")
        document, start, stop, label = (record[name] for name in FIELDS)
        unit = record.get("unit") or UNITS[0]
        if not all(type(value) is int for value in (start, stop)) or not 0 <= start < stop:
            raise InputError(f"{where}: start {start!r}, stop {stop!r}: need whole numbers with 0 <= start < stop.")
        if not isinstance(document, str) or not isinstance(label, str) or not label.strip() or "\n" in label:
            raise InputError(f"{where}: document {document!r}, label {label!r}: need text, the label on one line.")
        if unit not in UNITS:
            raise InputError(f"{where}: unit {unit!r}: choose {' or '.join(UNITS)}.")
        yield LabelRange(where, document.replace("\n", " "), start, stop, label, unit)


def _jsonl_records(path: Path) -> Iterator[tuple[str, Any]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield f"{path}, line {number}", json.loads(line)
                except ValueError as error:
                    raise InputError(f"{path}, line {number}: no JSON ({error}); each line is one object.") from error


def _parquet_records(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise InputError(f"{path}: no Parquet file ({str(error).splitlines()[0]}); write it again.") from error
    columns = [name for name in (*FIELDS, "unit") if name in file.schema_arrow.names]
    row = 0
    with file:
        for batch in file.iter_batches(BATCH_RANGES, columns=columns):
            for record in batch.to_pylist():
                row += 1
                yield f"{path}, row {row}", record


def _with_bytes(
    store: Store, documents: list[StoredDocument], codec: TextCodec
) -> Iterator[tuple[StoredDocument, list[bytes]]]:
    """Each document, and the bytes that each of its tokens stands for."""
    pieces = codec.token_bytes()
    ids = [store.table(segment.index, paths.TOKEN_IDS) for segment in store.segments]
    for document in documents:
        own = [int(i) for segment, start, stop in document.spans for i in ids[segment][start:stop]]
        yield document, codec.document_bytes(own, pieces)


def _text(token_bytes: list[bytes]) -> str:
    return b"".join(token_bytes).decode("utf-8", errors="ignore")


def _table(store: Store, documents: list[StoredDocument], names: tuple[str, ...], places: Places) -> LabelTable:
    """Labels of documents as labels of the token tables, separators and other documents without any."""
    sizes = [len(store.table(segment.index, paths.TOKEN_IDS)) for segment in store.segments]
    halves = [np.zeros(n, np.bool_) for n in sizes]
    half_of = document_halves(np.array([document.key for document in documents], np.uint64))
    for document, half in zip(documents, half_of.tolist(), strict=True):
        for segment, start, stop in document.spans:
            halves[segment][start : stop + 1] = half
    rows: list[list[NDArray[np.int64]]] = [[] for _ in sizes]
    columns: list[list[NDArray[np.int64]]] = [[] for _ in sizes]
    for document, token, label in places:
        before = 0
        for segment, start, stop in document.spans:
            mine = (token >= before) & (token < before + stop - start)
            rows[segment].append(token[mine] - before + start)
            columns[segment].append(label[mine])
            before += stop - start
    return LabelTable(names, tuple(_segment(*parts, len(names)) for parts in zip(sizes, rows, columns, halves, strict=True)))


def _segment(
    n_tokens: int, rows: list[NDArray[np.int64]], columns: list[NDArray[np.int64]], half: NDArray[np.bool_], n_labels: int
) -> SegmentLabels:
    row, column = (np.concatenate([np.zeros(0, np.int64), *parts]) for parts in (rows, columns))
    holds = sp.csr_array((np.ones(len(row), np.int64), (row, column)), shape=(n_tokens, n_labels))
    holds.data[:] = 1  # where two ranges of one label overlap
    return SegmentLabels(holds, half)


def shard_labels(store: Store, shard: Shard, labels: SegmentLabels) -> tuple[sp.csr_array, NDArray[np.bool_]]:
    """((n_rows, L) 0/1, (n_rows,) half) of a shard's rows."""
    return labels.at(store.token_index(shard))
