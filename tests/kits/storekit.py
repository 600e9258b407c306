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
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
from forkkit import preload
from numpy.typing import NDArray

from actstore import lease
from actstore.encodings.channels import Channels
from actstore.encodings.registry import encoding_of
from actstore.folder import Folder
from actstore.layout import Layout
from actstore.plan import PartPlan, raw_words
from actstore.recode import recode_store
from actstore.schema import (
    PARTS,
    CorpusIdentity,
    Manifest,
    ModelIdentity,
    RowArray,
    WindowPolicy,
    site_arrays,
)
from actstore.segment_record import PartRecord, SegmentRecord
from actstore.writer import StoreWriter, write_shard

Ints = NDArray[np.int64]

CONTEXT = 16
BOS, SEPARATOR = 0, 1
POLICY = WindowPolicy(
    context=CONTEXT, bos=True, packing="packed", keep_special=False, bos_token_id=BOS, separator_token_id=SEPARATOR
)
MAX_WINDOWS = 1_000
"""Most windows in one part of one segment: row ids stay distinct, and those of two segments stay in the range of fp16."""


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
        acts = [array for site, kind in self.sites for array in site_arrays(site, self.d_model, kind)]
        return Manifest(
            kind="activations",
            model=ModelIdentity("synthetic", n_layer=2, d_model=self.d_model, weights_sha256="0" * 64),
            tokenizer_sha256="1" * 64,
            corpus=CorpusIdentity("synthetic", f"{self.n_documents} x {self.document_tokens}"),
            policy=POLICY,
            arrays=(RowArray("rows/window", 0, "uint32", "packed"), RowArray("rows/position", 0, "uint16", "packed"), *acts),
            compute_dtype="fp32",
            seed=self.seed,
            provenance={"made_by": "tests/kits/storekit.py"},
        )


TWO_SEGMENTS = StoreSpec(n_segments=2, n_documents=30, document_tokens=20)


@dataclass(frozen=True)
class Segment:
    """A segment's record and tables, and the plan of each part."""

    record: SegmentRecord
    tables: dict[str, NDArray[Any]]
    plans: dict[str, PartPlan]
    kept_positions: dict[str, list[Ints]]
    """The positions that are kept as rows, for each window in order."""


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
        "documents/keys": raw_words(spec.n_documents, spec.seed, 98, index),
        "documents/source": np.frombuffer("\n".join(f"document {i}" for i in range(spec.n_documents)).encode(), np.uint8),
    }
    records, plans, kept = {}, {}, {}
    for number, (part, (start, stop)) in enumerate(
        {"train": (0, offsets[n_train]), "heldout": (offsets[n_train], offsets[-1])}.items()
    ):
        token_start = np.arange(start, stop, POLICY.stride)
        n_tokens = np.minimum(POLICY.stride, stop - token_start)
        assert len(token_start) <= MAX_WINDOWS, "rows would share ids"
        kept[part] = [1 + np.flatnonzero(ids[a : a + n] != SEPARATOR) for a, n in zip(token_start, n_tokens, strict=True)]
        counts = np.array([len(positions) for positions in kept[part]], np.int64)
        layout = Layout(int(counts.sum()), spec.shard_rows, spec.chunk_rows)
        plans[part] = PartPlan.build(spec.seed, index, number, layout, counts)
        records[part] = PartRecord(len(counts), layout.n_rows, layout.shard_rows, layout.chunk_rows)
        tables[f"{part}/windows/token_start"] = token_start
        tables[f"{part}/windows/n_tokens"] = n_tokens.astype(np.uint16)
        tables[f"{part}/windows/first_row"] = plans[part].first_rows
    for site, kind in spec.sites:
        if encoding_of(kind).needs_channels:
            tables[f"channels/{site}"] = CHANNELS(spec.d_model).table
    record = SegmentRecord(
        store_id=spec.manifest.store_id,
        index=index,
        first_document=index * spec.n_documents,
        first_token=0,
        next_document=(index + 1) * spec.n_documents,
        next_token=0,
        n_documents=spec.n_documents,
        n_tokens=len(ids),
        heldout_modulus=10,
        parts=records,
        environment={"device": "none"},
        objects={},
    )
    return Segment(record, tables, plans, kept)


def CHANNELS(d_model: int) -> Channels:
    """What int8 rows are measured by here: ids are spread wide, the other channels within 4 of 0."""
    return Channels(np.zeros(d_model, np.float32), np.array([100_000] + [2] * (d_model - 1), np.float32))


def row_ids(segment: int, part: str, window: Ints, position: Ints) -> Ints:
    """A number that no other row of the store has, small enough to be exact in float32."""
    return ((segment * len(PARTS) + PARTS.index(part)) * MAX_WINDOWS + window) * CONTEXT + position


def row_values(ids: Ints, d_model: int) -> NDArray[np.float32]:
    """(n, d_model) rows: channel 0 is the id, the others a pseudo-random function of it."""
    channels = np.arange(1, d_model)
    noise = (ids[:, None] * 2654435761 + channels * 40503) % 8191 / 1024 - 4
    return np.concatenate([ids[:, None], noise], axis=1).astype(np.float32)


def shard_arrays(spec: StoreSpec, segment: Segment, part: str, shard: int) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """What a collector hands to `write_shard`: the arrays, and the notes of the record."""
    plan = segment.plans[part]
    windows, chosen = plan.shard_windows(shard)
    positions = [segment.kept_positions[part][window] for window in windows]
    order = plan.row_order(shard)
    window = np.repeat(windows, [len(kept) for kept in positions])[chosen][order]
    position = np.concatenate(positions)[chosen][order]
    rows = row_values(row_ids(segment.record.index, part, window, position), spec.d_model)
    arrays: dict[str, NDArray[Any]] = {"rows/window": window.astype(np.uint32), "rows/position": position.astype(np.uint16)}
    for site, kind in spec.sites:
        kept, scale = encoding_of(kind).encode(rows, CHANNELS(spec.d_model))
        arrays[f"acts/{site}"] = kept
        if scale is not None:
            arrays[f"scales/{site}"] = scale
    return arrays, {"stats": statistics({site: rows for site, _ in spec.sites})}


def statistics(rows_of_sites: dict[str, NDArray[np.float32]]) -> dict[str, dict[str, Any]]:
    """What a commit record says of each site's rows."""
    return {
        site: {
            "mean": rows.mean(axis=0, dtype=np.float64).tolist(),
            "second_moment": np.square(rows, dtype=np.float64).mean(axis=0).tolist(),
            "mean_norm": float(np.linalg.norm(rows.astype(np.float64), axis=1).mean()),
        }
        for site, rows in rows_of_sites.items()
    }


def write_store(
    path: Path,
    spec: StoreSpec,
    *,
    n_shards: int | None = None,
    on_locked: Callable[[], None] = lambda: None,
    pause_s: float = 0.0,
) -> Path:
    """Write the store, or what is missing of it; stop after `n_shards` shards when given. Returns `path`."""
    with StoreWriter.open(path, spec.manifest, {"tokenizer.json": b"{}"}) as writer:
        on_locked()
        for index in range(spec.n_segments):
            segment = build_segment(spec, index)
            record = writer.put_segment(segment.record, partial(dict, segment.tables))
            for part, shard in writer.missing_shards(record):
                if n_shards == 0:
                    return path
                n_shards = None if n_shards is None else n_shards - 1
                write_shard(writer.place, writer.manifest, record, part, shard, *shard_arrays(spec, segment, part, shard))
                if pause_s:
                    time.sleep(pause_s)
            if not writer.is_sealed(record):
                writer.seal(record)
    return path


def files_of(path: Path) -> dict[str, bytes]:
    """Every file below a folder, by its name in it."""
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def flip_bit(file: Path, bit: int) -> None:
    """Flip one bit of a file, counted from its first and, past its end, from there on again."""
    data = bytearray(file.read_bytes())
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    file.write_bytes(data)


# For processes of their own

preload("zarr.codecs", "actstore.reader", "pytest")


def write_and_hold(path: Path, spec: StoreSpec, locked: Connection) -> None:
    """Take the store's lock, tell, and keep it until killed."""
    write_store(path, spec, on_locked=lambda: (locked.send(True), time.sleep(600)))  # type: ignore[func-returns-value]


def write_and_die(path: Path, spec: StoreSpec, n_operations: int) -> None:
    """`write_store`, killed by SIGKILL when it is about to do its n-th thing to the file system."""
    os.fsync = lambda descriptor: None
    _die_at(n_operations, lambda arguments: True)
    write_store(path, spec)


def _die_at(n_operations: int, counts: Callable[[tuple[object, ...]], bool]) -> None:
    """Be killed when about to do the n-th thing to the file system that counts."""
    left = itertools.count(n_operations - 1, -1)

    def count(event: str, arguments: tuple[object, ...]) -> None:
        if (
            event in {"open", "os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir"}
            and counts(arguments)
            and not next(left)
        ):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def write_slowly(path: Path, spec: StoreSpec, pause_s: float) -> None:
    """`write_store`, with a pause after each shard."""
    os.fsync = lambda descriptor: None
    write_store(path, spec, pause_s=pause_s)


def publish_and_die(path: Path, name: str, data: bytes, n_operations: int) -> None:
    """Publish an object, killed by SIGKILL when about to do the n-th thing to a file of the place."""
    os.fsync = lambda descriptor: None
    _die_at(n_operations, lambda arguments: str(arguments[0]).startswith(str(path)))
    Folder(path).publish(name, data)


def create_in_turn(path: Path, number: int, n_objects: int, barrier: Barrier, answers: Connection) -> None:
    """Try to create each object together with other processes; send whether it was created here."""
    os.fsync = lambda descriptor: None
    created = []
    for index in range(n_objects):
        barrier.wait()
        created.append(Folder(path).create(f"objects/{index}", bytes([number]) * 1000))
    answers.send((number, created))


def hold_lease_and_hang(path: Path, heartbeat_s: float, held: Connection) -> None:
    """Take a place's lease, tell, and keep it until killed."""
    lease.HEARTBEAT_S = heartbeat_s
    with lease.held_lease(Folder(path)):
        held.send(True)
        time.sleep(600)


def recode_and_die(source: Path, out: Path, encoding: str, n_operations: int) -> None:
    """Recode a store, killed by SIGKILL when about to do the n-th thing to a file of the copy."""
    os.fsync = lambda descriptor: None
    _die_at(n_operations, lambda arguments: str(arguments[0]).startswith(str(out)))
    recode_store(source, out, encoding)
