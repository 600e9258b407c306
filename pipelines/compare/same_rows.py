"""The same rows of text as several SAEs see them: codes that are read, or made from rows, joined by their place.

A row is known by its segment, part, window and position. Stores of the same token tables and windows agree on these,
however their rows are shuffled, cut into shards or encoded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

from actstore import paths
from actstore.errors import IdentityMismatch, InputError
from actstore.reader import ActivationStore, Shard, Store
from actstore.schema import PARTS
from pipelines.codes.code_store import open_run_codes, read_codes
from pipelines.sae.base import Sae
from pipelines.sae.checkpoint import RunRecord, require_match
from pipelines.sae.reconstruction_metrics import batch_rows

POSITION_BITS = 16

Keys = NDArray[np.int64]


@dataclass(frozen=True)
class Source:
    """A store, and the (n, F) codes of some rows of one of its shards."""

    store: Store
    codes_of: Callable[[Shard, NDArray[np.int64]], sp.csr_array]


def encoded_source(url: str, sae: Sae, record: RunRecord, path: Path) -> Source:
    """Rows of a store, encoded by a run. Raises what `require_match` raises."""
    store = ActivationStore(url)
    require_match(path, record, store)
    size = batch_rows(record.n_features)

    def codes_of(shard: Shard, rows: NDArray[np.int64]) -> sp.csr_array:
        x = store.read(shard, paths.acts(record.site))[rows]
        pieces = []
        with torch.inference_mode():
            for start in range(0, len(x), size):
                codes = sae.codes(torch.from_numpy(x[start : start + size]))
                entries = codes.values.numpy(), (codes.active.rows.numpy(), codes.active.features.numpy())
                pieces.append(sp.csr_array(entries, shape=(len(x[start : start + size]), record.n_features)))
        return _without_zeros(sp.vstack(pieces, format="csr") if pieces else sp.csr_array((0, record.n_features)))

    return Source(store, codes_of)


def code_source(url: str, record: RunRecord, path: Path) -> Source:
    """The codes of an existing code store. Raises IdentityMismatch when they are another run's."""
    store = open_run_codes(url, record.run_id, path, "pass codes in the order of the runs.")

    def codes_of(shard: Shard, rows: NDArray[np.int64]) -> sp.csr_array:
        indices, values = read_codes(store, shard)
        row = np.repeat(np.arange(len(rows)), store.k)
        entries = values[rows].ravel(), (row, indices[rows].ravel())
        return _without_zeros(sp.csr_array(entries, shape=(len(rows), store.n_features)))

    return Source(store, codes_of)


def shared_codes(sources: list[Source], n_rows: int) -> list[sp.csr_array]:
    """(n, F) codes of the same rows, in the same order, from every source: `n_rows` or, if they are fewer, all.

    They are the rows of the first shards of the first source. Raises IdentityMismatch when two are of other text, InputError
    when they have no row in common.
    """
    for source in sources[1:]:
        _require_same_text(sources[0].store, source.store)
    wanted: Keys = np.zeros(0, np.int64)
    for shard in _shards(sources[0].store):
        if len(wanted) >= n_rows:
            break
        wanted = np.concatenate([wanted, row_keys(sources[0].store, shard)[: n_rows - len(wanted)]])
    found = [_codes_at(source, np.sort(wanted)) for source in sources]
    common = found[0][0]
    for keys, _ in found[1:]:
        common = np.intersect1d(common, keys, assume_unique=True)
    if not len(common):
        raise InputError(
            f"{sources[0].store.url} and {sources[-1].store.url}: have no row in common; pass stores of the same windows."
        )
    return [codes[np.searchsorted(keys, common)] for keys, codes in found]


def row_keys(store: Store, shard: Shard) -> Keys:
    """(n_rows,) a number for the place of each row of a shard; stores of the same text have the same numbers."""
    window = store.read(shard, paths.WINDOW).astype(np.int64)
    position = store.read(shard, paths.POSITION).astype(np.int64)
    segment = shard.segment * len(PARTS) + PARTS.index(shard.part)
    return (segment << 48) | (window << POSITION_BITS) | position


def _codes_at(source: Source, wanted: Keys) -> tuple[Keys, sp.csr_array]:
    """(those of the sorted keys that the source has, sorted; their codes)."""
    keys, codes = [], []
    for shard in _shards(source.store):
        own = row_keys(source.store, shard)
        place = np.minimum(np.searchsorted(wanted, own), len(wanted) - 1)
        mine = np.flatnonzero(wanted[place] == own)
        if len(mine):
            keys.append(own[mine])
            codes.append(source.codes_of(shard, mine))
        if sum(map(len, keys)) == len(wanted):
            break
    if not keys:
        return np.zeros(0, np.int64), sp.csr_array((0, 1))
    order = np.argsort(np.concatenate(keys))
    return np.concatenate(keys)[order], sp.vstack(codes, format="csr")[order]


def _shards(store: Store) -> list[Shard]:
    return [shard for part in PARTS for shard in store.shards(part)]


def _require_same_text(one: Store, other: Store) -> None:
    """Raises IdentityMismatch unless the segments that both have hold the same tokens in the same windows."""
    for mine, theirs in zip(one.segments, other.segments, strict=False):
        for name in (paths.TOKEN_IDS, *(paths.window_table(part, paths.TOKEN_START) for part in PARTS)):
            if not np.array_equal(one.table(mine.index, name), other.table(theirs.index, name)):
                raise IdentityMismatch(
                    f"{one.url} and {other.url}: hold other text, or other windows of it ({name} of segment {mine.index} "
                    "differs); compare runs on stores of one corpus, context and packing."
                )


def _without_zeros(codes: sp.csr_array) -> sp.csr_array:
    codes.sum_duplicates()
    codes.eliminate_zeros()
    return codes
