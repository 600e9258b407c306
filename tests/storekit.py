"""A small synthetic store, written by the real `StoreWriter`: what tests that need a store but no model start from.

Every row is a function of where it stands: channel 0 holds `row_ids`, a number no other row of the store has, so that
a test can say exactly which rows it was given.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore.codecs import ENCODINGS, encode_rows
from actstore.layout import Layout
from actstore.plan import PartPlan, raw_words
from actstore.schema import (
    PARTS,
    CorpusIdentity,
    Manifest,
    ModelIdentity,
    PartRecord,
    RowArray,
    SegmentRecord,
    WindowPolicy,
)
from actstore.writer import StoreWriter, write_shard

Ints = NDArray[np.int64]

CONTEXT = 16
BOS, SEPARATOR = 0, 1
POLICY = WindowPolicy(
    context=CONTEXT, bos=True, packing="packed", keep_special=False, bos_token_id=BOS, separator_token_id=SEPARATOR
)
MAX_WINDOWS = 50_000
"""Of one part of one segment: keeps row ids apart."""


@dataclass(frozen=True)
class StoreSpec:
    """What a synthetic store is made of; two specs that are equal give the same bytes."""

    n_segments: int = 1
    n_documents: int = 60
    document_tokens: int = 40
    shard_rows: int = 256
    chunk_rows: int = 32
    d_model: int = 4
    sites: tuple[tuple[str, str], ...] = (("resid_post.0", "fp32"), ("resid_post.1", "bf16"))
    seed: int = 0

    @property
    def manifest(self) -> Manifest:
        acts = [RowArray(f"acts/{site}", self.d_model, ENCODINGS[kind].dtype, kind) for site, kind in self.sites]
        return Manifest(
            kind="activations",
            model=ModelIdentity("synthetic", n_layer=2, d_model=self.d_model, weights_sha256="0" * 64),
            tokenizer_sha256="1" * 64,
            corpus=CorpusIdentity("synthetic", f"{self.n_documents} x {self.document_tokens}"),
            policy=POLICY,
            arrays=(RowArray("rows/window", 0, "uint32", "packed"), RowArray("rows/position", 0, "uint16", "packed"), *acts),
            compute_dtype="fp32",
            seed=self.seed,
            provenance={"made_by": "tests/storekit.py"},
        )


@dataclass(frozen=True)
class Segment:
    """A segment's record and tables, and the plan of each part."""

    record: SegmentRecord
    tables: dict[str, NDArray[Any]]
    plans: dict[str, PartPlan]
    kept_positions: dict[str, list[Ints]]
    """Of each window, in window order: the positions that are kept as rows."""


def build_segment(spec: StoreSpec, index: int) -> Segment:
    """Documents of random length ending in a separator, every tenth held out; the held-out ones are last in the table."""
    words = raw_words(spec.n_documents, spec.seed, 99, index)
    lengths = (words % np.uint64(2 * spec.document_tokens)).astype(np.int64) + 1
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    n_train = spec.n_documents - spec.n_documents // 10
    ids = (np.arange(offsets[-1]) % 997 + 2).astype(np.uint16)
    ids[offsets[1:] - 1] = SEPARATOR
    tables: dict[str, NDArray[Any]] = {
        "tokens/ids": ids,
        "documents/offsets": offsets,
        "documents/heldout": (np.arange(spec.n_documents) >= n_train).astype(np.uint8),
        "documents/source": np.frombuffer("\n".join(f"document {i}" for i in range(spec.n_documents)).encode(), np.uint8),
    }
    records, plans, kept = {}, {}, {}
    for number, (part, (start, stop)) in enumerate(
        {"train": (0, offsets[n_train]), "heldout": (offsets[n_train], offsets[-1])}.items()
    ):
        token_start = np.arange(start, stop, POLICY.stride)
        n_tokens = np.minimum(POLICY.stride, stop - token_start)
        kept[part] = [1 + np.flatnonzero(ids[a : a + n] != SEPARATOR) for a, n in zip(token_start, n_tokens, strict=True)]
        counts = np.array([len(positions) for positions in kept[part]], np.int64)
        layout = Layout(int(counts.sum()), spec.shard_rows, spec.chunk_rows)
        plans[part] = PartPlan.build(spec.seed, index, number, layout, counts)
        records[part] = PartRecord(len(counts), layout.n_rows, layout.shard_rows, layout.chunk_rows)
        tables[f"{part}/windows/token_start"] = token_start
        tables[f"{part}/windows/n_tokens"] = n_tokens.astype(np.uint16)
        tables[f"{part}/windows/first_row"] = plans[part].first_rows
    record = SegmentRecord(index, index * spec.n_documents, spec.n_documents, len(ids), 10, records, {"device": "none"}, {})
    return Segment(record, tables, plans, kept)


def row_ids(segment: int, part: str, window: Ints, position: Ints) -> Ints:
    """A number that no other row of the store has, small enough to be exact in float32."""
    return ((segment * len(PARTS) + PARTS.index(part)) * MAX_WINDOWS + window) * CONTEXT + position


def row_values(ids: Ints, d_model: int) -> NDArray[np.float32]:
    """(n, d_model) rows: channel 0 is the id, the others a pseudo-random function of it."""
    channels = np.arange(1, d_model)
    noise = (ids[:, None] * 2654435761 + channels * 40503) % 8191 / 1024 - 4
    return np.concatenate([ids[:, None], noise], axis=1).astype(np.float32)


def shard_arrays(spec: StoreSpec, segment: Segment, part: str, shard: int) -> dict[str, NDArray[Any]]:
    """What a collector hands to `write_shard`."""
    plan = segment.plans[part]
    windows, chosen = plan.shard_windows(shard)
    positions = [segment.kept_positions[part][window] for window in windows]
    order = plan.row_order(shard)
    window = np.repeat(windows, [len(kept) for kept in positions])[chosen][order]
    position = np.concatenate(positions)[chosen][order]
    rows = row_values(row_ids(segment.record.index, part, window, position), spec.d_model)
    arrays: dict[str, NDArray[Any]] = {"rows/window": window.astype(np.uint32), "rows/position": position.astype(np.uint16)}
    for site, kind in spec.sites:
        arrays[f"acts/{site}"] = encode_rows(rows, kind)
        arrays[f"stats/{site}"] = np.stack([rows.mean(0, np.float64), np.square(rows.astype(np.float64)).mean(0)])
    return arrays


def write_store(
    path: Path, spec: StoreSpec, *, n_shards: int | None = None, on_locked: Callable[[], None] = lambda: None
) -> Path:
    """Write the store, or what is missing of it; stop after `n_shards` shards when given. Returns `path`."""
    with StoreWriter.open(path, spec.manifest, {"tokenizer.json": b"{}"}) as writer:
        on_locked()
        for index in range(spec.n_segments):
            segment = build_segment(spec, index)
            records = writer.segments()
            record = records[index] if index < len(records) else writer.add_segment(segment.record, segment.tables)
            for part, shard in writer.missing_shards(index):
                if n_shards == 0:
                    return path
                n_shards = None if n_shards is None else n_shards - 1
                write_shard(path, writer.manifest, record, part, shard, shard_arrays(spec, segment, part, shard))
            writer.seal(index)
    return path


# For processes of their own


def write_and_hold(path: Path, spec: StoreSpec, locked: Connection) -> None:
    """Take the store's lock, tell, and keep it until killed."""
    write_store(path, spec, on_locked=lambda: (locked.send(True), time.sleep(600)))  # type: ignore[func-returns-value]


def write_and_die(path: Path, spec: StoreSpec, n_operations: int) -> None:
    """`write_store`, killed by SIGKILL when it is about to do its n-th thing to the file system."""
    os.fsync = lambda descriptor: None
    left = itertools.count(n_operations - 1, -1)

    def count(event: str, arguments: object) -> None:
        if event in {"open", "os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir"} and not next(left):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    write_store(path, spec)
