"""A store of either kind, written by the real `StoreWriter` from token ids and a function of each row: no model runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from storekit import StoreSpec, statistics

from actstore.schema import PARTS, Manifest, RowArray, WindowPolicy
from actstore.segment_record import PartRecord, SegmentRecord
from actstore.writer import StoreWriter, write_shard
from pipelines.text.codec import TextCodec
from pipelines.text.split import text_key
from pipelines.text.tokenizer_files import load_tokenizer
from pipelines.text.tokens import TokenSource, TokenTable
from pipelines.text.windows import cut_windows

SITE = "resid_post.0"
Arrays = dict[str, NDArray[Any]]


def token_table(documents: list[list[int]], n_heldout: int, separator: int = 1) -> TokenTable:
    """Documents of token ids, the last `n_heldout` of them held out."""
    lengths = np.array([len(ids) + 1 for ids in documents])
    heldout = (np.arange(len(documents)) >= len(documents) - n_heldout).astype(np.uint8)
    return TokenTable(
        ids=np.concatenate([[*ids, separator] for ids in documents]).astype(np.uint16),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        heldout=heldout,
        names=[f"document {i}" for i in range(len(documents))],
        keys=np.array([text_key(f"document {i}") for i in range(len(documents))], np.uint64),
        n_train_tokens=int(lengths[heldout == 0].sum()),
        heldout_modulus=0,
    )


def text_table(documents: dict[str, str], model: Path, modulus: int = 5) -> tuple[TokenTable, TextCodec, dict[str, bytes]]:
    """Texts by name as a token table, with the tokenizer of a model's folder and its files."""
    from pipelines.text.corpus import Document

    codec, files = load_tokenizer(str(model))
    table = TokenSource((Document(name, text) for name, text in documents.items()), codec).take(1 << 30, modulus)
    assert table is not None
    return table, codec, files


def activations_manifest(d_model: int, codec: TextCodec | None = None) -> Manifest:
    manifest = StoreSpec(d_model=d_model, sites=((SITE, "fp32"),)).manifest
    return replace(manifest, provenance={"model": "no model"}, policy=_policy(manifest.policy, codec))


def codes_manifest(n_features: int, k: int, codec: TextCodec) -> Manifest:
    manifest = activations_manifest(1, codec)
    return replace(
        manifest,
        kind="codes",
        arrays=(
            *manifest.arrays[:2],
            RowArray("codes/index", k, "uint16", "packed"),
            RowArray("codes/value", k, "float32", "packed"),
        ),
        source={"store_id": "0" * 16, "snapshot": "0" * 16, "run_id": "0" * 16, "site": SITE, "n_features": n_features},
        provenance={"model": "no model", "run": "no run", "store": "no store"},
    )


def _policy(policy: WindowPolicy, codec: TextCodec | None) -> WindowPolicy:
    if codec is None:
        return policy
    return replace(policy, context=32, bos_token_id=codec.bos_token_id, separator_token_id=codec.separator_token_id)


def activations(rows: NDArray[np.float32]) -> Arrays:
    """The arrays of some rows of an activation store."""
    return {f"acts/{SITE}": rows}


def dense_codes(values: NDArray[np.float32]) -> Arrays:
    """The arrays of a code store in which every row names all features; most values may be 0."""
    index = np.broadcast_to(np.arange(values.shape[1], dtype=np.uint16), values.shape)
    return {"codes/index": index.copy(), "codes/value": values.astype(np.float32)}


def write_table_store(
    path: Path,
    manifest: Manifest,
    table: TokenTable,
    arrays_of: Callable[[NDArray[np.int64]], Arrays],
    tokenizer_files: dict[str, bytes] | None = None,
    *,
    shard_rows: int = 256,
    chunk_rows: int = 32,
    n_segments: int = 1,
) -> Path:
    """Write the store; `arrays_of` gives the arrays of the rows that stand at some places of the token table.

    Rows lie in (window, position) order, as they do in a code store. Each further segment is of the same text again, its
    places counted on.
    """
    tables: Arrays = {
        "tokens/ids": table.ids,
        "documents/offsets": table.offsets,
        "documents/heldout": table.heldout,
        "documents/source": np.frombuffer("\n".join(table.names).encode(), np.uint8),
        "documents/keys": table.keys,
    }
    parts, rows, places = {}, {}, {}
    for part in PARTS:
        windows = cut_windows(table, part, manifest.policy)
        _, kept = windows.batch(np.arange(len(windows)))
        window, position = np.nonzero(kept)
        rows[part] = window.astype(np.uint32), position.astype(np.uint16)
        places[part] = windows.token_start[window] + position - int(manifest.policy.bos)
        parts[part] = PartRecord(len(windows), len(window), shard_rows, chunk_rows)
        tables[f"{part}/windows/token_start"] = windows.token_start
        tables[f"{part}/windows/n_tokens"] = windows.n_tokens.astype(np.uint32)
        tables[f"{part}/windows/first_row"] = np.cumsum(kept.sum(axis=1)) - kept.sum(axis=1)
    record = SegmentRecord(
        store_id=manifest.store_id,
        index=0,
        first_document=0,
        first_token=0,
        next_document=len(table.names),
        next_token=0,
        n_documents=len(table.names),
        n_tokens=len(table.ids) - len(table.names),
        heldout_modulus=table.heldout_modulus,
        parts=parts,
        environment={},
        objects={},
    )
    with StoreWriter.open(path, manifest, tokenizer_files or {"tokenizer.json": b"{}"}) as writer:
        for index in range(n_segments):
            first = index * len(table.names)
            own = replace(record, index=index, first_document=first, next_document=first + len(table.names))
            segment = writer.add_segment(own, tables)
            for part, shard in writer.missing_shards(segment):
                mine = slice(*parts[part].layout.shard_range(shard))
                window, position = (column[mine] for column in rows[part])
                made = arrays_of(places[part][mine] + index * len(table.ids))
                arrays = {"rows/window": window, "rows/position": position, **made}
                notes = {"stats": statistics({name[5:]: kept for name, kept in made.items() if name.startswith("acts/")})}
                write_shard(writer.place, writer.manifest, segment, part, shard, arrays, notes)
            writer.seal(segment)
    return path
