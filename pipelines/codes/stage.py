"""In: a store and a run. Out: a code store, the k largest codes of every row, in the format of the store.

One task encodes one shard and puts its rows back into (window, position) order. Like every store, a code store is
committed shard by shard, continued by running the command again, and stands alone: it copies the token table and
the tokenizer. At its end all firings are sorted into the feature index.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from actstore import paths
from actstore.errors import EncodingError, IdentityMismatch, InputError
from actstore.open_place import absolute, open_place
from actstore.reader import ActivationStore, Shard, Store
from actstore.schema import PARTS, ROW_PLACE_ARRAYS, Manifest, code_arrays
from actstore.writer import StoreWriter, require_store_place, write_shard
from pipelines.codes.build_index import build_index, index_bytes_of
from pipelines.codes.code_store import CodeStore
from pipelines.sae.base import Sae
from pipelines.sae.checkpoint import RunRecord, load_run, require_match
from pipelines.shared.cluster import connect, run_tasks

ENCODE_ROWS = 4096
VALUE_DTYPES = {"fp32": "float32", "fp16": "float16"}
EXACT_KERNEL, FAST_KERNEL = "sparse-fp32", "sparse"


@dataclass(frozen=True)
class EncodeConfig:
    """What `encode` is asked for; the names are the command's options.

    `kernel`: `sparse-fp32` gives the SAE's own codes; `sparse` searches in bfloat16 and computes the values in full
    precision; it picks different features in about 0.02 % of the rows."""

    store: str | Path
    run: Path
    out: str | Path
    value_dtype: str = "fp32"
    kernel: str = EXACT_KERNEL
    workers: int = 2
    scheduler: str | None = None

    def __post_init__(self) -> None:
        if self.value_dtype not in VALUE_DTYPES:
            raise InputError(f"value dtype {self.value_dtype!r}: choose from {', '.join(VALUE_DTYPES)}.")
        if self.kernel not in (EXACT_KERNEL, FAST_KERNEL):
            raise InputError(f"kernel {self.kernel!r}: choose from {EXACT_KERNEL}, {FAST_KERNEL}.")


def encode(config: EncodeConfig, client: Any = None) -> dict[str, Any]:
    """Encode every row of both splits once, and index the firings; continues a code store that was interrupted.

    `client` is a Dask client to use instead of the one the configuration asks for. Raises what `require_match`
    raises, and OutputExists, NoSpace, IdentityMismatch, EncodingError.
    """
    require_store_place(config.out)
    store = _source(config)
    _, record = load_run(config.run)
    require_match(config.run, record, store)
    manifest = _manifest(store, record, config)
    n_rows = sum(store.n_rows(part) for part in PARTS)
    n_codes = n_rows * record.code_width
    open_place(config.out).require_space(n_codes * 8 + index_bytes_of(n_codes), f"the codes of {n_rows:,} rows")
    # The cluster comes before the store: nothing is written when the scheduler does not answer.
    where = connect(config.scheduler, config.workers) if client is None else nullcontext(client)
    with where as connected, StoreWriter.open(config.out, manifest, store.tokenizer_files()) as writer:
        segments = [
            writer.put_segment(replace(segment, store_id=manifest.store_id), partial(store.text_tables, segment.index))
            for segment in store.segments
        ]
        source = (absolute(config.store), config.run.absolute(), store.snapshot, record.run_id)
        tasks = [
            (*source, absolute(config.out), segment.index, part, shard)
            for segment in segments
            for part, shard in writer.missing_shards(segment)
        ]
        if tasks:
            run_tasks(connected, "encode", encode_shard, tasks)
        for segment in segments:
            if not writer.is_sealed(segment):
                writer.seal(segment)
        codes = CodeStore(config.out)
        build_index(codes, connected)
    notes = [codes.notes(shard) for part in PARTS for shard in codes.shards(part)]
    return {
        "codes": str(config.out),
        "store_id": codes.store_id,
        "rows": n_rows,
        "features": record.n_features,
        "code_width": record.code_width,
        "rows_cut": sum(note["rows_cut"] for note in notes),
        "codes_cut": sum(note["codes_cut"] for note in notes),
        "disk_bytes": codes.disk_bytes,
    }


def encode_shard(
    store_url: str, run_path: Path, snapshot: str, run_id: str, out: str, segment: int, part: str, index: int
) -> None:
    """Encode one shard of a store into the same shard of a code store, and commit it. Runs on a worker."""
    store, sae, record = _opened(store_url, run_path, snapshot, run_id)
    target = Store(out, partial=True)
    shard = next(s for s in store.shards(part) if (s.segment, s.index) == (segment, index))
    window, position = store.read(shard, paths.WINDOW), store.read(shard, paths.POSITION)
    order = np.lexsort((position, window))
    index_array, value_array = target.manifest.array(paths.CODE_INDEX), target.manifest.array(paths.CODE_VALUE)
    kernel = target.manifest.source.get("kernel", EXACT_KERNEL)
    indices = np.empty((shard.n_rows, record.code_width), index_array.dtype)
    values = np.empty((shard.n_rows, record.code_width), value_array.dtype)
    rows_cut = codes_cut = 0
    for start, rows in _blocks(store, shard, paths.acts(record.site)):
        with torch.inference_mode():
            codes = sae.codes(torch.from_numpy(rows), kernel)
            found_values, found_indices = codes.padded(record.code_width)
        too_many = (codes.active.counts - record.code_width).clamp_min(0)
        rows_cut, codes_cut = rows_cut + int((too_many > 0).sum()), codes_cut + int(too_many.sum())
        indices[start : start + len(rows)] = found_indices.numpy()
        try:
            values[start : start + len(rows)] = kept_values(found_values.numpy(), value_array.dtype)
        except EncodingError as error:
            place = f"segment {segment}, {part} shard {index}, row {start + error.row}"
            raise EncodingError(f"{out}: {place}: {error}", start + error.row) from error
    arrays = {paths.WINDOW: window[order], paths.POSITION: position[order]}
    arrays |= {paths.CODE_INDEX: indices[order], paths.CODE_VALUE: values[order]}
    write_shard(
        target.place,
        target.manifest,
        target.segments[segment],
        part,
        index,
        arrays,
        {"stats": {}, "rows_cut": rows_cut, "codes_cut": codes_cut},
    )


def kept_values(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Values (n, k) of codes as they are kept. In fp16 a positive value never rounds to 0: a firing that is too weak becomes
    the smallest fp16 above 0.

    Raises EncodingError for a value beyond the largest of fp16.

    >>> kept_values(np.array([[0, 1e-9, 2.5]], np.float32), "float16")
    array([[0.0e+00, 6.0e-08, 2.5e+00]], dtype=float16)
    """
    if dtype == "float32":
        return values
    limits = np.finfo(dtype)
    if not (largest := float(values.max(initial=0))) <= float(limits.max):
        raise EncodingError(
            f"a code of {largest:g} does not fit fp16, which ends at {float(limits.max):g}; encode with --value-dtype fp32.",
            int(values.max(axis=1).argmax()),
        )
    kept = values.astype(dtype)
    kept[(kept == 0) & (values > 0)] = limits.smallest_subnormal
    return kept


def _blocks(store: ActivationStore, shard: Shard, name: str) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """(first row, rows) of a shard, block after block; the next is read while one is being encoded."""
    starts = range(0, shard.n_rows, ENCODE_ROWS)
    with ThreadPoolExecutor(1) as pool:
        reading = [pool.submit(store.read, shard, name, start, start + ENCODE_ROWS) for start in starts[:1]]
        for start in starts:
            rows = reading.pop().result()
            if start + ENCODE_ROWS < shard.n_rows:
                reading.append(pool.submit(store.read, shard, name, start + ENCODE_ROWS, start + 2 * ENCODE_ROWS))
            yield start, rows


@lru_cache(maxsize=4)
def _opened(store_url: str, run_path: Path, snapshot: str, run_id: str) -> tuple[ActivationStore, Sae, RunRecord]:
    """A store and a run, opened once a process. Raises IdentityMismatch when this process sees others at these paths."""
    store = ActivationStore(store_url, snapshot=snapshot)
    sae, record = load_run(run_path)
    if record.run_id != run_id:
        raise IdentityMismatch(
            f"{run_path}: is run {record.run_id} here, {run_id} was asked for; show workers the same disk."
        )
    return store, sae, record


def _manifest(store: ActivationStore, record: RunRecord, config: EncodeConfig) -> Manifest:
    index_dtype = np.min_scalar_type(record.n_features - 1).name
    return replace(
        store.manifest,
        kind="codes",
        arrays=(
            *ROW_PLACE_ARRAYS,
            *code_arrays(record.code_width, index_dtype, VALUE_DTYPES[config.value_dtype]),
        ),
        source={
            "store_id": store.store_id,
            "snapshot": store.snapshot,
            "run_id": record.run_id,
            "site": record.site,
            "n_features": record.n_features,
            **({} if config.kernel == EXACT_KERNEL else {"kernel": config.kernel}),
        },
        provenance={**store.manifest.provenance, "run": str(config.run), "store": store.url},
    )


def _source(config: EncodeConfig) -> ActivationStore:
    """The store at the snapshot that the code store was begun with; for a new code store, the store as it is now."""
    out = open_place(config.out)
    snapshot = Store(out, partial=True).manifest.source.get("snapshot") if out.exists(paths.MANIFEST) else None
    current = ActivationStore(config.store)
    if snapshot is None or snapshot == current.snapshot:
        return current
    try:
        return ActivationStore(config.store, snapshot=snapshot)
    except IdentityMismatch:
        return current  # the codes there are of another store, and the writer says so
