"""In: a corpus and a language model. Out: a store of activations, extended or resumed where its last commit was.

The model runs once over windows in the order of the plan, here or on Dask workers that each compute whole shards;
the store is the same, bit for bit.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

from actstore import paths
from actstore.errors import InputError
from actstore.open_place import open_place
from actstore.schema import PARTS
from actstore.segment_record import SegmentRecord
from actstore.tables import Tables, channel_tables
from actstore.writer import StoreWriter, require_store_place
from pipelines.collect.collection import Collection
from pipelines.collect.config import CollectConfig
from pipelines.collect.fill import fill_by_workers, fill_here
from pipelines.collect.prepare import prepare
from pipelines.collect.segment_plan import SegmentPlan
from pipelines.shared.cluster import connect
from pipelines.text.copies import Copies
from pipelines.text.tokens import TokenSource, TokenTable

SEGMENT_TOKENS = 64 << 20
"""A larger corpus becomes several segments, so that the first row does not wait for all tokenising."""


def collect(config: CollectConfig) -> dict[str, Any]:
    """Build, extend or finish the store at `config.out`; returns the store's figures, and how many shards were there before.

    Nothing is written before the model, the layers, the corpus and the disk space have been checked. Raises
    InputError, IdentityMismatch, OutputExists, NoSpace, LockedStore or EncodingError; committed shards stay.
    """
    place = open_place(config.out)
    require_store_place(place)
    collection = prepare(config)
    is_new = not place.exists(paths.MANIFEST)
    source = collection.text.source()
    first_table = source.take(min(config.tokens, SEGMENT_TOKENS), None) if is_new else None
    if is_new and first_table is None:
        raise InputError(f"corpus {config.corpus}: has no text; nothing was written.")
    if first_table is not None:
        _require_space_for(collection, first_table)
    # The cluster comes before the store: nothing is written when the scheduler does not answer.
    is_shared = config.scheduler is not None or config.workers > 0
    cluster = connect(config.scheduler, max(1, config.workers)) if is_shared else nullcontext()
    opened = StoreWriter.open(place, collection.manifest, collection.text.tokenizer_files)
    with cluster as client, opened as writer:
        run = _Run(collection, writer, client)
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
        "store_id": collection.manifest.store_id,
        "tokens": sum(segment.n_tokens for segment in segments),
        "rows": sum(part.n_rows for segment in segments for part in segment.parts.values()),
        "shards": run.n_committed(),
        "shards_committed_before": committed_before,
        "control_tokens": source.n_control,
        "corpus_exhausted": sum(segment.n_tokens for segment in segments) < config.tokens,
        "corpus_skipped": collection.text.corpus.skipped,
        "lone_surrogates": source.n_replaced,
        "added": asdict(run.copies),
    }


class _Run:
    """One collection under way: walks the segments of a writer's store and commits what is missing."""

    def __init__(self, collection: Collection, writer: StoreWriter, client: Any):
        self.collection, self.writer, self.client = collection, writer, client
        self.probes: dict[int, str] = {}
        self.copies = Copies()

    def n_committed(self) -> int:
        records = self.writer.records()
        return sum(len(records.shards(segment, part)) for segment in records.segments for part in segment.parts)

    def source_after(self, segments: list[SegmentRecord]) -> TokenSource:
        """The corpus's tokens after those of the segments."""
        document, token = (segments[-1].next_document, segments[-1].next_token) if segments else (0, 0)
        return self.collection.text.source(document, token)

    def next_table(self, source: TokenSource, n_tokens: int) -> TokenTable | None:
        """The token table after the existing segments, once the disk has been found large enough for its rows."""
        segments = self.writer.segments()
        table = source.take(min(n_tokens, SEGMENT_TOKENS), segments[0].heldout_modulus if segments else None)
        if table is not None:
            _require_space_for(self.collection, table)
        return table

    def add_segment(self, table: TokenTable) -> SegmentRecord:
        """Publish the next segment: a token table, its windows, its cut into shards, and the channels' means and
        deviations."""
        index = len(self.writer.segments())
        self.copies += Copies.of(table)
        plan = self.collection.plan(table, index)
        first_windows = plan.windows[PARTS[0]]
        self.probes[index] = self.collection.probe(first_windows)
        environment = self.collection.environment(self.probes[index])
        if index == 0 and self.collection.config.compute_dtype != "fp32":
            environment["unexplained_by_compute_dtype"] = self.collection.compute_error(first_windows)
        record = SegmentRecord(
            store_id=self.collection.manifest.store_id,
            index=index,
            first_document=table.begins[0],
            first_token=table.begins[1],
            next_document=table.ends[0],
            next_token=table.ends[1],
            n_documents=len(table.names),
            n_tokens=len(table.ids) - len(table.names),
            heldout_modulus=table.heldout_modulus,
            parts=plan.parts,
            environment=environment,
            objects={},
        )
        return self.writer.add_segment(record, self._tables(plan, table))

    def restore(self, segment: SegmentRecord) -> None:
        """Make tables again that `repair` dropped, from the same text."""
        if not self.writer.missing_objects(segment):
            return
        source = self.collection.text.source(segment.first_document, segment.first_token)
        table = source.take(segment.n_tokens, segment.heldout_modulus)
        if table is None:
            raise InputError(f"corpus {self.collection.config.corpus}: no longer has the text of segment {segment.index}.")
        self.writer.restore_segment(segment, self._tables(self.collection.plan(table, segment.index), table))

    def _tables(self, plan: SegmentPlan, table: TokenTable) -> Tables:
        """Every table of a segment: its text, its windows, and the channels' means and deviations."""
        return plan.tables(table) | channel_tables(self.collection.channels(plan))

    def fill(self, segment: SegmentRecord) -> None:
        """Compute and commit every missing shard of a segment, then seal it."""
        missing = self.writer.missing_shards(segment)
        if missing:
            layouts = {part: record.layout for part, record in segment.parts.items()}
            sizes = [stop - start for start, stop in (layouts[part].shard_range(shard) for part, shard in missing)]
            self.writer.place.require_space(sum(sizes) * self.collection.manifest.row_bytes, f"{sum(sizes):,} rows")
            if self.client is not None:
                fill_by_workers(self.client, self.collection.config, segment, missing)
            else:
                probe = self.probes.get(segment.index)
                fill_here(self.collection, self.writer.place, segment, missing, sum(sizes), probe)
        if not self.writer.is_sealed(segment):
            self.writer.seal(segment)


def _require_space_for(collection: Collection, table: TokenTable) -> None:
    needed = len(table.ids) * (collection.manifest.row_bytes + 16)
    open_place(collection.config.out).require_space(needed, f"{len(table.ids):,} tokens")
