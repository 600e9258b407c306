"""In: a code store. Out: an analysis, what every feature does over the whole corpus.

One Dask task surveys one shard; the surveys are merged in a fixed tree; a second round of tasks fetches the text
around each feature's strongest firings. Neither the language model nor the activations are needed.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from actstore import paths
from actstore.errors import InputError
from actstore.files import fsync_path, publish_bytes, publish_json, require_free_space
from actstore.place import absolute
from actstore.reader import Shard
from actstore.schema import PARTS
from pipelines.analysis import ANALYSIS_VERSION, RECORD, require_new_analysis
from pipelines.cluster import connect, reduce_tasks, run_tasks
from pipelines.code_store import CodeStore, open_codes, read_codes
from pipelines.statistics import CodeBlock, Survey, frequency_bands
from pipelines.tokens import store_tokenizer

BLOCK_ROWS = 65_536


@dataclass(frozen=True)
class AnalyzeConfig:
    """What `analyze` is asked for; the names are the command's options."""

    codes: str | Path
    out: Path
    examples: int = 8
    before: int = 24
    after: int = 8
    workers: int = 2
    scheduler: str | None = None

    def __post_init__(self) -> None:
        if self.examples < 1 or self.before < 0 or self.after < 0:
            raise InputError(
                f"examples {self.examples}, before {self.before}, after {self.after}: need at least 1, 0 and 0."
            )


def analyze(config: AnalyzeConfig, client: Any = None) -> dict[str, Any]:
    """Survey every row of a code store and publish the analysis; returns its record.

    `client` is a Dask client to use instead of the one the configuration asks for. Raises NotAStore,
    IncompleteStore, DamagedStore, OutputExists, NoSpace; nothing is published then.
    """
    require_new_analysis(config.out)
    codes = CodeStore(config.codes)
    require_free_space(
        config.out, codes.n_features * config.examples * (config.before + config.after + 1) * 8, "the examples"
    )
    if client is not None:
        return _analyze(config, codes, client)
    with connect(config.scheduler, config.workers) as own_client:
        return _analyze(config, codes, own_client)


def _analyze(config: AnalyzeConfig, codes: CodeStore, client: Any) -> dict[str, Any]:
    shards = [shard for part in PARTS for shard in codes.shards(part)]
    policy = codes.manifest.policy
    codec = store_tokenizer(codes)
    n_vocabulary = codec.backend.get_vocab_size()
    tasks = [(absolute(codes.url), codes.snapshot, shard, n_vocabulary, config.examples) for shard in shards]
    survey: Survey = reduce_tasks(client, "analyze", survey_shard, Survey.merge, tasks)
    found = survey.examples.finalize()
    context_tokens, context_values = _contexts(config, codes, shards, found, client)

    counts, totals, token_rows = survey.tokens.finalize()
    pairs = survey.pairs.finalize()
    slot = np.arange(len(found["feature"])) - np.searchsorted(found["feature"], found["feature"])
    shape = (codes.n_features, config.examples, config.before + 1 + config.after)
    examples = {
        "value": np.zeros(shape[:2], np.float32),
        "document": np.full(shape[:2], -1, np.int64),
        "tokens": np.full(shape, -1, np.int32),
        "values": np.zeros(shape, np.float32),
    }
    documents = _documents(codes, found["window"], found["position"])
    for name, column in zip(examples, (found["value"], documents, context_tokens, context_values), strict=True):
        examples[name][found["feature"], slot] = column
    record = {
        "format": "actstore-analysis",
        "version": ANALYSIS_VERSION,
        "codes_id": codes.store_id,
        "snapshot": codes.snapshot,
        **codes.manifest.source,
        "codes": str(config.codes),
        "run": codes.manifest.provenance["run"],
        "store": codes.manifest.provenance["store"],
        "model": codes.manifest.provenance["model"],
        "corpus": codes.manifest.corpus.spec,
        "n_rows": survey.counts.n_rows,
        "n_features": codes.n_features,
        "k": codes.k,
        "bands": frequency_bands(survey.counts.fires, survey.counts.n_rows),
        "focus": config.before,
        "bos_token_id": policy.bos_token_id,
        "separator_token_id": policy.separator_token_id,
    }
    arrays = {f"features/{name}": values for name, values in survey.counts.finalize().items()}
    arrays |= {f"examples/{name}": values for name, values in examples.items()}
    arrays |= _csr_arrays("cooccurrence", pairs)
    arrays |= _csr_arrays("tokens", counts) | {"tokens/total": totals.data, "tokens/corpus_rows": token_rows}
    _publish(config.out, record, arrays, codes)
    return record


def survey_shard(codes_url: str, snapshot: str, shard: Shard, n_vocabulary: int, n_examples: int) -> Survey:
    """All statistics of one shard. Runs on a worker."""
    codes = open_codes(codes_url, snapshot)
    survey = Survey(codes.n_features, n_vocabulary, n_examples)
    indices, values = read_codes(codes, shard)
    tokens = codes.token_ids(shard)
    windows = codes.read(shard, "rows/window").astype(np.int64) + _window_base(codes, shard)
    positions = codes.read(shard, "rows/position").astype(np.int64)
    for start in range(0, shard.n_rows, BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        survey.update(
            CodeBlock(
                codes.n_features,
                n_vocabulary,
                indices[rows],
                values[rows],
                tokens[rows],
                windows[rows],
                positions[rows],
            )
        )
    return survey


def example_values(
    codes_url: str,
    snapshot: str,
    shard: Shard,
    feature: NDArray[np.int64],
    window: NDArray[np.int64],
    position: NDArray[np.int64],
    before: int,
    after: int,
) -> NDArray[np.float32]:
    """(n, before + 1 + after) values of each example's feature around it, 0 where this shard has no row. On a worker."""
    codes = open_codes(codes_url, snapshot)
    indices, values = read_codes(codes, shard)
    row_window = codes.read(shard, "rows/window").astype(np.int64) + _window_base(codes, shard)
    row_position = codes.read(shard, "rows/position").astype(np.int64)
    # Rows lie in (window, position) order: each wanted place is found by its key.
    row_key = row_window * codes.manifest.policy.context + row_position
    wanted = position[:, None] + np.arange(-before, after + 1)
    key = window[:, None] * codes.manifest.policy.context + wanted
    row = np.minimum(np.searchsorted(row_key, key), len(row_key) - 1)
    is_there = (row_key[row] == key) & (wanted >= 0) & (wanted < codes.manifest.policy.context)
    found = np.zeros(key.shape, np.float32)
    for slot in range(codes.k):
        found += np.where(is_there & (indices[row, slot] == feature[:, None]), values[row, slot], 0)
    return found


def _window_base(codes: CodeStore, shard: Shard) -> int:
    """Windows of all earlier splits and segments: added to a window's number, it becomes unique in the store."""
    base = 0
    for segment in codes.segments:
        for part in PARTS:
            if (segment.index, part) == (shard.segment, shard.part):
                return base
            base += segment.parts[part].n_windows
    raise ValueError(f"{shard} is not in the store")


def _contexts(
    config: AnalyzeConfig, codes: CodeStore, shards: list[Shard], found: dict[str, NDArray[Any]], client: Any
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Token ids (-1 outside the window) and feature values around each example."""
    width = config.before + 1 + config.after
    tokens = np.full((len(found["feature"]), width), -1, np.int32)
    values = np.zeros((len(found["feature"]), width), np.float32)
    tasks, places = [], []
    for segment in codes.segments:
        ids = codes.table(segment.index, "tokens/ids").astype(np.int32)
        for part in PARTS:
            own = [shard for shard in shards if (shard.segment, shard.part) == (segment.index, part)]
            if not own:
                continue
            base = _window_base(codes, own[0])
            mine = np.flatnonzero((found["window"] >= base) & (found["window"] < base + segment.parts[part].n_windows))
            window = found["window"][mine] - base
            tokens[mine] = _window_tokens(codes, segment.index, part, ids, window, found["position"][mine], config)
            first_row = codes.table(segment.index, f"{part}/windows/first_row")
            bounds = np.append(np.sort(first_row), segment.parts[part].n_rows)
            last_row = bounds[np.searchsorted(bounds, first_row[window], side="right")] - 1
            for shard in own:
                touches = (first_row[window] < shard.stop) & (last_row >= shard.start)
                chosen = mine[touches]
                if len(chosen):
                    columns = (found["feature"][chosen], found["window"][chosen], found["position"][chosen])
                    tasks.append((absolute(codes.url), codes.snapshot, shard, *columns, config.before, config.after))
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
    config: AnalyzeConfig,
) -> NDArray[np.int32]:
    """(n, before + 1 + after) token ids around a position of each window; -1 outside it, and for its start token."""
    lead = int(codes.manifest.policy.bos)
    start = codes.table(segment, f"{part}/windows/token_start")[window]
    n_tokens = codes.table(segment, f"{part}/windows/n_tokens").astype(np.int64)[window]
    place = position[:, None] - lead + np.arange(-config.before, config.after + 1)
    inside = (place >= 0) & (place < n_tokens[:, None])
    return np.where(inside, ids[np.where(inside, start[:, None] + place, 0)], -1).astype(np.int32)


def _documents(codes: CodeStore, window: NDArray[np.int64], position: NDArray[np.int64]) -> NDArray[np.int64]:
    """Which document, numbered over all segments, each example lies in."""
    found = np.full(len(window), -1, np.int64)
    base = documents_before = 0
    for segment in codes.segments:
        offsets = codes.table(segment.index, "documents/offsets")
        for part in PARTS:
            n_windows = segment.parts[part].n_windows
            mine = (window >= base) & (window < base + n_windows)
            start = codes.table(segment.index, f"{part}/windows/token_start")[window[mine] - base]
            token = start + np.maximum(position[mine] - int(codes.manifest.policy.bos), 0)
            found[mine] = documents_before + np.searchsorted(offsets, token, side="right") - 1
            base += n_windows
        documents_before += segment.n_documents
    return found


def _csr_arrays(group: str, matrix: Any) -> dict[str, NDArray[Any]]:
    return {
        f"{group}/starts": matrix.indptr.astype(np.int64),
        f"{group}/columns": matrix.indices.astype(np.int32),
        f"{group}/count": matrix.data,
    }


def _publish(out: Path, record: dict[str, Any], arrays: dict[str, NDArray[Any]], codes: CodeStore) -> None:
    """Write everything beside the final place, flush it, and rename: an analysis is there whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        names = [name for segment in codes.segments for name in codes.document_names(segment.index)]
        arrays["documents/name"] = np.frombuffer("\n".join(names).encode(), np.uint8)
        root = zarr.open_group(temporary / paths.DATA, mode="w")
        for name, values in arrays.items():
            if values.size:
                root.create_array(name, data=values, chunks=tuple(min(n, 1 << 18) for n in values.shape))
            else:
                root.create_array(
                    name, shape=values.shape, dtype=values.dtype, chunks=tuple(max(n, 1) for n in values.shape)
                )
        for name, data in codes.tokenizer_files().items():
            publish_bytes(temporary / paths.TOKENIZER / name, data)
        publish_json(temporary / RECORD, record)
        for path in temporary.rglob("*"):
            fsync_path(path)
        os.rename(temporary, out)
        fsync_path(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
