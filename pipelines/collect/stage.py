"""In: a corpus and a language model. Out: a store of activations, extended or resumed where its last commit was.

The model runs once over windows in the order of the plan, here or on Dask workers that each compute whole shards;
the store is the same, bit for bit. A shard is written while the next one is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from actstore import paths
from actstore.errors import InputError
from actstore.files import record_bytes
from actstore.open_place import absolute, open_place
from actstore.reader import Store, channel_tables
from actstore.schema import PARTS, SegmentRecord
from actstore.writer import StoreWriter, require_store_place, write_shard
from pipelines.collect.config import CollectConfig
from pipelines.collect.prepare import Recipe, compute_error, prepare
from pipelines.collect.shard_maker import SegmentText, ShardMaker, channels_of, require_same_probe
from pipelines.shared.cluster import connect, own_device, run_tasks
from pipelines.shared.progress import track
from pipelines.text.tokens import TokenSource, TokenTable

SEGMENT_TOKENS = 64 << 20
"""A larger corpus becomes several segments, so that the first row does not wait for all tokenising."""


def collect(config: CollectConfig) -> dict[str, Any]:
    """Build, extend or finish the store at `config.out`; returns what `info` would say of the work done.

    Nothing is written before the model, the layers, the corpus and the disk space have been checked. Raises
    InputError, IdentityMismatch, OutputExists, NoSpace, LockedStore or EncodingError; committed shards stay.
    """
    place = open_place(config.out)
    require_store_place(place)
    recipe = prepare(config)
    is_new = not place.exists(paths.MANIFEST)
    source = TokenSource(recipe.corpus.documents(), recipe.codec)
    first_table = source.take(min(config.tokens, SEGMENT_TOKENS), None) if is_new else None
    if is_new and first_table is None:
        raise InputError(f"corpus {config.corpus}: has no text; nothing was written.")
    if first_table is not None:
        _require_space_for(config, recipe, first_table)
    # The cluster comes before the store: nothing is written when the scheduler does not answer.
    is_shared = config.scheduler is not None or config.workers > 0
    cluster = connect(config.scheduler, max(1, config.workers)) if is_shared else nullcontext()
    with cluster as client, StoreWriter.open(place, recipe.manifest, recipe.tokenizer_files) as writer:
        run = _Run(config, recipe, writer, client)
        committed_before = run.n_committed()
        for segment in writer.segments():
            run.restore(segment)
            run.fill(segment)
        if segments := writer.segments():  # also those of a store whose manifest was lost, and has just been made again
            first_table, source = None, run.source_after(segments)
        while (left := config.tokens - sum(segment.n_tokens for segment in writer.segments())) > 0:
            table = first_table or run.next_table(source, left)
            first_table = None
            if table is None:
                break
            run.fill(run.add_segment(table))
        segments = writer.segments()
    return {
        "store": str(config.out),
        "store_id": recipe.manifest.store_id,
        "tokens": sum(segment.n_tokens for segment in segments),
        "rows": sum(part.n_rows for segment in segments for part in segment.parts.values()),
        "shards": run.n_committed(),
        "shards_committed_before": committed_before,
        "corpus_exhausted": sum(segment.n_tokens for segment in segments) < config.tokens,
    }


class _Run:
    """One collection under way: fills a writer's store by a recipe."""

    def __init__(self, config: CollectConfig, recipe: Recipe, writer: StoreWriter, client: Any):
        self.config, self.recipe, self.writer, self.client = config, recipe, writer, client
        self.maker = recipe.maker
        self.probes: dict[int, str] = {}

    def n_committed(self) -> int:
        records = self.writer.records()
        return sum(len(records.shards(segment, part)) for segment in records.segments for part in segment.parts)

    def source_after(self, segments: list[SegmentRecord]) -> TokenSource:
        """The corpus behind what the segments took of it."""
        document, token = (segments[-1].next_document, segments[-1].next_token) if segments else (0, 0)
        return TokenSource(self.recipe.corpus.documents(document), self.recipe.codec, document, token)

    def next_table(self, source: TokenSource, n_tokens: int) -> TokenTable | None:
        """The token table after the segments there are, once the disk has been found large enough for its rows."""
        segments = self.writer.segments()
        table = source.take(min(n_tokens, SEGMENT_TOKENS), segments[0].heldout_modulus if segments else None)
        if table is not None:
            _require_space_for(self.config, self.recipe, table)
        return table

    def add_segment(self, table: TokenTable) -> SegmentRecord:
        """Publish a token table, its windows, its plan's cut into shards and what int8 measures by as the next segment."""
        index = len(self.writer.segments())
        text, parts, tables = self.recipe.plan(table, index, self.config.shard_mib)
        self.probes[index] = self.maker.probe(text.windows[PARTS[0]])
        environment = self.maker.environment(self.probes[index])
        if index == 0 and self.config.compute_dtype != "fp32":
            environment["unexplained_by_compute_dtype"] = compute_error(self.recipe, text, self.config.model)
        record = SegmentRecord(
            store_id=self.recipe.manifest.store_id,
            index=index,
            first_document=table.begins[0],
            first_token=table.begins[1],
            next_document=table.ends[0],
            next_token=table.ends[1],
            n_documents=len(table.names),
            n_tokens=len(table.ids) - len(table.names),
            heldout_modulus=table.heldout_modulus,
            parts=parts,
            environment=environment,
            objects={},
        )
        return self.writer.add_segment(record, tables | channel_tables(self.maker.channels(text)))

    def restore(self, segment: SegmentRecord) -> None:
        """Make tables again that `repair` dropped, from the same text."""
        if not self.writer.missing_objects(segment):
            return
        documents = self.recipe.corpus.documents(segment.first_document)
        source = TokenSource(documents, self.recipe.codec, segment.first_document, segment.first_token)
        table = source.take(segment.n_tokens, segment.heldout_modulus)
        if table is None:
            raise InputError(f"corpus {self.config.corpus}: no longer has the text of segment {segment.index}.")
        text, _, tables = self.recipe.plan(table, segment.index, self.config.shard_mib)
        self.writer.restore_segment(segment, tables | channel_tables(self.maker.channels(text)))

    def fill(self, segment: SegmentRecord) -> None:
        """Compute and commit every missing shard of a segment, then seal it."""
        missing = self.writer.missing_shards(segment)
        if missing:
            layouts = {part: record.layout for part, record in segment.parts.items()}
            sizes = [stop - start for start, stop in (layouts[part].shard_range(shard) for part, shard in missing)]
            self.writer.place.require_space(sum(sizes) * self.recipe.manifest.row_bytes, f"{sum(sizes):,} rows")
            if self.client is not None:
                self._fill_by_workers(segment, missing)
            else:
                self._fill_here(segment, missing, sum(sizes))
        if not self.writer.is_sealed(segment):
            self.writer.seal(segment)

    def _fill_here(self, segment: SegmentRecord, missing: list[tuple[str, int]], n_rows: int) -> None:
        store, known = Store(self.writer.place, partial=True), self.probes.get(segment.index)
        opened = _SegmentWork(store, segment, self.maker, self.config.mixed_hardware, known)
        with track("collect", n_rows) as progress, ThreadPoolExecutor(1) as pool:
            pending: Future[None] | None = None
            for part, shard in missing:
                arrays, notes = opened.compute(part, shard, progress.advance)
                if pending is not None:
                    pending.result()
                pending = pool.submit(
                    write_shard, self.writer.place, self.recipe.manifest, segment, part, shard, arrays, notes
                )
            if pending is not None:
                pending.result()

    def _fill_by_workers(self, segment: SegmentRecord, missing: list[tuple[str, int]]) -> None:
        model = self.config.model
        config = replace(
            self.config, out=absolute(self.config.out), model=absolute(model) if Path(model).exists() else model
        )
        tasks = [(config, segment.index, segment.content_id, part, shard) for part, shard in missing]
        run_tasks(self.client, "collect", collect_shard, tasks)


class _SegmentWork:
    """A segment's text and this machine's right to compute rows of it."""

    def __init__(
        self, store: Store, segment: SegmentRecord, maker: ShardMaker, mixed_hardware: bool, probe: str | None = None
    ):
        self.store, self.segment, self.maker = store, segment, maker
        self.text = SegmentText.open(store, segment)
        self.channels = channels_of(store, segment)
        self.probe = probe or maker.probe(self.text.windows[PARTS[0]])
        if not mixed_hardware:
            require_same_probe(store.url, segment, maker, self.probe)
        elif self.probe != segment.environment["probe_crc32c"]:
            name = paths.environment_record(segment.index, self.probe)
            store.place.create(name, record_bytes(maker.environment(self.probe)))

    def compute(self, part: str, shard: int, advance: Callable[[int], object]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The arrays of a shard, and the notes for its record: statistics, and the probe of what computed it."""
        arrays, statistics = self.maker.shard(self.text, part, shard, self.channels, self._document, advance)
        return arrays, {"stats": statistics, "probe_crc32c": self.probe}

    def _document(self, token: int) -> str:
        (document,) = self.store.documents_of(self.segment.index, np.array([token]))
        return self.store.document_names(self.segment.index)[document]


_MODEL_IN_USE = Lock()
"""A hook sees every forward pass of its model: of a worker's threads, one at a time may run it."""


def collect_shard(config: CollectConfig, segment: int, content_id: str, part: str, shard: int) -> None:
    """Compute, write and commit one shard. Runs on a worker."""
    with _MODEL_IN_USE:
        work = _opened(config, segment, content_id)
        arrays, notes = work.compute(part, shard, lambda n: None)
    write_shard(work.store.place, work.store.manifest, work.segment, part, shard, arrays, notes)


@lru_cache(maxsize=1)
def _opened(config: CollectConfig, segment: int, content_id: str) -> _SegmentWork:
    """A segment of a store that this process computes shards of."""
    store = Store(config.out, partial=True)
    if len(store.segments) <= segment or store.segments[segment].content_id != content_id:
        raise InputError(f"{config.out}: is another store on this worker; show every worker the same disk.")
    return _SegmentWork(store, store.segments[segment], _maker(config, store.store_id), config.mixed_hardware)


@lru_cache(maxsize=1)
def _maker(config: CollectConfig, store_id: str) -> ShardMaker:
    """The model, loaded once a process."""
    manifest = Store(config.out, partial=True).manifest
    return ShardMaker.load(manifest, config.model, own_device(config.device), config.batch_windows)


def _require_space_for(config: CollectConfig, recipe: Recipe, table: TokenTable) -> None:
    needed = len(table.ids) * (recipe.manifest.row_bytes + 16)
    open_place(config.out).require_space(needed, f"{len(table.ids):,} tokens")
