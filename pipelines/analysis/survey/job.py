"""The job of every task of one analysis, and the code store that the task opens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore import paths
from actstore.reader import Shard
from actstore.schema import PARTS
from pipelines.codes.code_store import CodeStore, open_codes
from pipelines.statistics import CodeBlock, Extent

MOST_PARTS = 256
"""Most corpus parts that are counted apart; documents of further parts count to the last."""


@dataclass(frozen=True)
class Job:
    """Where codes are read and results are written, and how many examples are kept. Small, and the same for every task."""

    codes_url: str
    snapshot: str
    work_url: str
    result_url: str
    extent: Extent
    n_strata: int
    within: str
    min_together: int

    def open(self) -> CodeStore:
        return open_codes(self.codes_url, self.snapshot)


def shard_name(shard: Shard) -> str:
    """The name of a shard's partial result."""
    return f"shards/{shard.segment:04d}-{shard.part}-{shard.index:06d}"


def document_names(codes: CodeStore) -> list[str]:
    """Names of all documents, over all segments."""
    return [name for segment in codes.segments for name in codes.document_names(segment.index)]


def corpus_parts(names: list[str]) -> tuple[list[str], NDArray[np.int64]]:
    """(names of the parts, each document's part): the first folder below the one that all documents share.

    A document that lies directly in it is of part ".". Parts are sorted; past 256, further ones are one part, "(others)".

    >>> parts, of = corpus_parts(["lib/json/a.py", "lib/abc.py", "lib/json/b.py"])
    >>> parts, of.tolist()
    (['.', 'json'], [1, 0, 1])
    """
    folders = [PurePosixPath(name).parts[:-1] for name in names]
    shared = 0
    while folders and all(len(f) > shared and f[shared] == folders[0][shared] for f in folders):
        shared += 1
    own = [folder[shared] if len(folder) > shared else "." for folder in folders]
    parts = sorted(set(own))
    if len(parts) > MOST_PARTS:
        parts = [*parts[: MOST_PARTS - 1], "(others)"]
    place = {name: i for i, name in enumerate(parts)}
    return parts, np.array([place.get(name, len(parts) - 1) for name in own], np.int64)


@lru_cache(maxsize=2)
def _document_parts(codes_url: str, snapshot: str) -> NDArray[np.int64]:
    return corpus_parts(document_names(open_codes(codes_url, snapshot)))[1]


def window_base(codes: CodeStore, shard: Shard) -> int:
    """The number of windows in all earlier splits and segments. Added to a window's number, it makes the number unique in
    the store."""
    base = 0
    for segment in codes.segments:
        for part in PARTS:
            if (segment.index, part) == (shard.segment, shard.part):
                return base
            base += segment.parts[part].n_windows
    raise ValueError(f"{shard} is not in the store")


def row_columns(job: Job, shard: Shard) -> dict[str, NDArray[Any]]:
    """Where each row of a shard stands: the columns of a CodeBlock, numbered over the whole store."""
    codes = job.open()
    before = sum(segment.n_documents for segment in codes.segments[: shard.segment])
    documents = codes.documents(shard) + before
    return {
        "tokens": codes.token_ids(shard),
        "windows": codes.read(shard, paths.WINDOW).astype(np.int64) + window_base(codes, shard),
        "positions": codes.read(shard, paths.POSITION).astype(np.int64),
        "documents": documents,
        "parts": _document_parts(job.codes_url, job.snapshot)[documents],
    }


def blocks(job: Job, shard: Shard, block_rows: int) -> Any:
    """A shard's rows as blocks, one after another."""
    codes = job.open()
    columns = row_columns(job, shard)
    for start in range(0, shard.n_rows, block_rows):
        rows = slice(start, min(start + block_rows, shard.n_rows))
        indices, values = (codes.read(shard, name, rows.start, rows.stop) for name in paths.CODES)
        yield CodeBlock(codes.n_features, indices, values, **{name: column[rows] for name, column in columns.items()})
