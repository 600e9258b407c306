"""The text around kept firings, and the feature's value at each token of it: a second look at the shards they lie in."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore import paths
from actstore.reader import Shard
from actstore.schema import PARTS
from pipelines.analysis.survey.job import Job, window_base
from pipelines.codes.code_store import CodeStore
from pipelines.shared.cluster import run_tasks
from pipelines.statistics.kept_firings import COLUMNS
from pipelines.statistics.statistic import Arrays

EXAMPLES = "examples"
"""The group of an analysis that holds kept firings."""


def in_slots(kinds: dict[str, Arrays], slots: dict[str, tuple[int, int]]) -> tuple[Arrays, NDArray[np.int64]]:
    """The kept firings of all kinds, one kind after another, and each firing's place among its feature's examples."""
    slot = []
    for kind, kept in kinds.items():
        in_order = np.arange(len(kept["feature"])) - np.searchsorted(kept["feature"], kept["feature"])
        slot.append(slots[kind][0] + (kept["stratum"] if kind == "strata" else in_order))
    return {name: np.concatenate([kept[name] for kept in kinds.values()]) for name in COLUMNS}, np.concatenate(slot)


def example_arrays(
    job: Job,
    kept: Arrays,
    slot: NDArray[np.int64],
    n_slots: int,
    tokens: NDArray[np.int32],
    values: NDArray[np.float32],
) -> Arrays:
    """(F, n_slots, ...) arrays of kept firings, by full name: value, document, and around each firing tokens and values."""
    shape = (job.extent.n_features, n_slots, tokens.shape[1])
    examples = {
        "value": np.zeros(shape[:2], np.float32),
        "document": np.full(shape[:2], -1, np.int64),
        "tokens": np.full(shape, -1, np.int32),
        "values": np.zeros(shape, np.float32),
    }
    columns = (kept["value"], example_documents(job.open(), kept), tokens, values)
    for array, column in zip(examples.values(), columns, strict=True):
        array[kept["feature"], slot] = column
    return {f"{EXAMPLES}/{name}": array for name, array in examples.items()}


def example_values(job: Job, shard: Shard, kept: Arrays, before: int, after: int) -> NDArray[np.float32]:
    """(n, before + 1 + after) values of each example's feature around it, 0 where this shard has no row. On a worker."""
    codes = job.open()
    indices, values = (codes.read(shard, name) for name in paths.CODES)
    context = codes.manifest.policy.context
    row_window = codes.read(shard, paths.WINDOW).astype(np.int64) + window_base(codes, shard)
    # Rows lie in (window, position) order: each wanted place is kept by its key.
    row_key = row_window * context + codes.read(shard, paths.POSITION)
    wanted = kept["position"][:, None] + np.arange(-before, after + 1)
    key = kept["window"][:, None] * context + wanted
    row = np.minimum(np.searchsorted(row_key, key), len(row_key) - 1)
    is_there = (row_key[row] == key) & (wanted >= 0) & (wanted < context)
    shown = np.zeros(key.shape, np.float32)
    for slot in range(codes.k):
        shown += np.where(is_there & (indices[row, slot] == kept["feature"][:, None]), values[row, slot], 0)
    return shown


def contexts(job: Job, kept: Arrays, before: int, after: int, client: Any) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Token ids (-1 outside the window) and feature values around each example."""
    codes = job.open()
    width = before + 1 + after
    tokens = np.full((len(kept["feature"]), width), -1, np.int32)
    values = np.zeros((len(kept["feature"]), width), np.float32)
    tasks, places = [], []
    for segment in codes.segments:
        ids = codes.table(segment.index, paths.TOKEN_IDS).astype(np.int32)
        for part in PARTS:
            own = [shard for shard in codes.shards(part) if shard.segment == segment.index]
            if not own:
                continue
            base = window_base(codes, own[0])
            mine = np.flatnonzero((kept["window"] >= base) & (kept["window"] < base + segment.parts[part].n_windows))
            window = kept["window"][mine] - base
            tokens[mine] = _window_tokens(codes, segment.index, part, ids, window, kept["position"][mine], before, after)
            first_row = codes.table(segment.index, paths.window_table(part, paths.FIRST_ROW))
            bounds = np.append(np.sort(first_row), segment.parts[part].n_rows)
            last_row = bounds[np.searchsorted(bounds, first_row[window], side="right")] - 1
            for shard in own:
                chosen = mine[(first_row[window] < shard.stop) & (last_row >= shard.start)]
                if len(chosen):
                    columns = {name: kept[name][chosen] for name in ("feature", "window", "position")}
                    tasks.append((job, shard, columns, before, after))
                    places.append(chosen)
    for chosen, part_values in zip(places, run_tasks(client, "examples", example_values, tasks), strict=True):
        values[chosen] = np.maximum(values[chosen], part_values)
    return tokens, values


def _window_tokens(
    codes: CodeStore,
    segment: int,
    part: str,
    ids: NDArray[np.int32],
    window: NDArray[np.int64],
    position: NDArray[np.int64],
    before: int,
    after: int,
) -> NDArray[np.int32]:
    """(n, before + 1 + after) token ids around a position of each window; -1 outside it, and for its start token."""
    lead = int(codes.manifest.policy.bos)
    start = codes.table(segment, paths.window_table(part, paths.TOKEN_START))[window]
    n_tokens = codes.table(segment, paths.window_table(part, paths.N_TOKENS)).astype(np.int64)[window]
    place = position[:, None] - lead + np.arange(-before, after + 1)
    inside = (place >= 0) & (place < n_tokens[:, None])
    return np.where(inside, ids[np.where(inside, start[:, None] + place, 0)], -1).astype(np.int32)


def example_documents(codes: CodeStore, kept: Arrays) -> NDArray[np.int64]:
    """Which document, numbered over all segments, each example lies in."""
    window, position = kept["window"], kept["position"]
    documents = np.full(len(window), -1, np.int64)
    base = documents_before = 0
    for segment in codes.segments:
        for part in PARTS:
            n_windows = segment.parts[part].n_windows
            mine = (window >= base) & (window < base + n_windows)
            start = codes.table(segment.index, paths.window_table(part, paths.TOKEN_START))[window[mine] - base]
            token = codes.manifest.policy.token_at(start, position[mine])
            documents[mine] = documents_before + codes.documents_of(segment.index, token)
            base += n_windows
        documents_before += segment.n_documents
    return documents
