"""Some whole documents of a code store, held in memory: the rows on which structure is sought, by half.

A document belongs to one half by a hash of its name: what is found on the one is tested on the other.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore import paths
from actstore.errors import InputError
from actstore.open_place import absolute
from actstore.reader import Shard
from actstore.schema import PARTS
from pipelines.codes.code_store import CodeStore, open_codes, read_codes
from pipelines.shared.cluster import run_tasks
from pipelines.structure.null import CodeTable
from pipelines.text.split import document_halves

MIN_DOCUMENTS = 4
DOCUMENT_SHARE = 32
"""Take at most this fraction of a half's rows from one document, the first ones, so that a few long documents cannot
dominate."""


@dataclass(frozen=True)
class Sample:
    """Rows of some documents, in the order of the text: their codes, and where each stands.

    `documents` (n,) rising, from 0; `segments` (n,) and `tokens` (n,) place each row in a segment's token table, -1
    at a start of text. The blocks of `table` are documents, long ones cut into equal stretches.
    """

    table: CodeTable
    documents: NDArray[np.int64]
    segments: NDArray[np.int64]
    tokens: NDArray[np.int64]
    n_corpus_documents: int

    @property
    def n_documents(self) -> int:
        return int(self.documents[-1]) + 1 if len(self.documents) else 0


def sample_halves(codes: CodeStore, rows: int, block_rows: int, seed: int, client: Any) -> tuple[Sample, Sample]:
    """About `rows` rows, half of them of each half's documents. Raises InputError where there are too few documents."""
    cap = max(1, rows // 2 // DOCUMENT_SHARE)
    chosen = [np.full(segment.n_documents, -1, np.int64) for segment in codes.segments]
    n_chosen, n_documents = [0, 0], [0, 0]
    for half in range(2):
        listed = sorted(_documents(codes, half, seed))
        n_documents[half] = len(listed)
        taken = 0
        for _, segment, document, n_tokens in listed:
            if taken >= rows // 2:
                break
            chosen[segment][document] = 2 * n_chosen[half] + half
            n_chosen[half] += 1
            taken += min(n_tokens, cap)
    if min(n_chosen) < MIN_DOCUMENTS:
        raise InputError(
            f"{codes.url}: has {n_documents[0]} and {n_documents[1]} documents in its halves, of which {rows:,} rows take "
            f"{n_chosen[0]} and {n_chosen[1]}; at least {MIN_DOCUMENTS} are needed in each: encode more, or raise --rows."
        )
    tasks = [
        (absolute(codes.url), codes.snapshot, shard, chosen[shard.segment], cap)
        for part in PARTS
        for shard in codes.shards(part)
    ]
    pieces = run_tasks(client, "sample", sample_shard, tasks)
    segment_of = np.concatenate([np.full(len(p[0]), task[2].segment) for task, p in zip(tasks, pieces, strict=True)])
    slots, tokens, features = (np.concatenate(column) for column in zip(*pieces, strict=True))
    halves = [_half(codes, h, slots, segment_of, tokens, features, block_rows, n_documents[h]) for h in range(2)]
    return halves[0], halves[1]


def _documents(codes: CodeStore, half: int, seed: int) -> list[tuple[bytes, int, int, int]]:
    """(sort key, segment, document, tokens) of every document of a half; the key is a hash of seed and name."""
    documents = []
    for segment in codes.segments:
        lengths = np.diff(codes.table(segment.index, paths.DOCUMENT_OFFSETS)).tolist()
        halves = document_halves(codes.document_keys(segment.index))
        for document, (name, n) in enumerate(zip(codes.document_names(segment.index), lengths, strict=True)):
            if halves[document] == half:
                documents.append((hashlib.sha256(f"{seed} {name}".encode()).digest(), segment.index, document, n))
    return documents


def sample_shard(
    codes_url: str, snapshot: str, shard: Shard, chosen: NDArray[np.int64], cap: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]:
    """(slot of its document, place in the token table, features) of a shard's rows in chosen documents. On a worker."""
    codes = open_codes(codes_url, snapshot)
    slot = chosen[codes.documents(shard)]
    tokens = codes.token_index(shard)
    start = codes.table(shard.segment, paths.DOCUMENT_OFFSETS)[codes.documents(shard)]
    kept = np.flatnonzero((slot >= 0) & (tokens - start < cap))
    indices, values = read_codes(codes, shard)
    features = np.where(values[kept] > 0, indices[kept], codes.n_features).astype(np.int32)
    return slot[kept], tokens[kept], features


def _half(
    codes: CodeStore,
    half: int,
    slots: NDArray[np.int64],
    segments: NDArray[np.int64],
    tokens: NDArray[np.int64],
    features: NDArray[np.int32],
    block_rows: int,
    n_corpus_documents: int,
) -> Sample:
    mine = np.flatnonzero(slots % 2 == half)
    order = mine[np.lexsort((tokens[mine], slots[mine]))]
    _, documents = np.unique(slots[order], return_inverse=True)
    own = np.sort(features[order], axis=1)  # empty entries go last
    width = int((own < codes.n_features).sum(axis=1).max(initial=1))
    table = CodeTable(np.ascontiguousarray(own[:, :width]), cut_blocks(documents, block_rows), codes.n_features)
    return Sample(table, documents.astype(np.int64), segments[order], tokens[order], n_corpus_documents)


def cut_blocks(documents: NDArray[np.int64], block_rows: int) -> NDArray[np.int64]:
    """(n,) the block of each row, from 0: its document, cut into equal stretches of at most `block_rows` rows.

    >>> cut_blocks(np.array([0, 0, 0, 0, 0, 1]), 3)
    array([0, 0, 0, 1, 1, 2])
    """
    lengths = np.bincount(documents)
    starts = np.cumsum(lengths) - lengths
    pieces = -(-lengths // block_rows)
    within = np.arange(len(documents)) - starts[documents]
    piece = within * pieces[documents] // np.maximum(lengths[documents], 1)
    return (np.cumsum(pieces) - pieces)[documents] + piece
