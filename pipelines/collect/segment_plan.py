"""In: a token table, or a segment that is published. Out: its windows, and which rows each of its shards holds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from actstore.layout import MIN_SHARDS, Layout, choose_layout
from actstore.plan import PartPlan
from actstore.reader import Store
from actstore.schema import PARTS, Manifest
from actstore.segment_record import PartRecord, SegmentRecord
from actstore.tables import Tables, text_tables, window_tables
from pipelines.text.tokens import TokenTable
from pipelines.text.windows import Windows, cut_windows


@dataclass(frozen=True)
class SegmentPlan:
    """A segment's windows and plan, part by part: they determine the rows of each shard."""

    windows: dict[str, Windows]
    plans: dict[str, PartPlan]

    @classmethod
    def cut(cls, manifest: Manifest, table: TokenTable, segment: int, shard_mib: int) -> SegmentPlan:
        """The plan of a new segment: a token table's windows, and how their rows are cut into shards."""
        windows, plans = {}, {}
        for index, part in enumerate(PARTS):
            windows[part] = cut_windows(table, part, manifest.policy)
            kept = windows[part].kept_counts()
            layout = part_layout(manifest, int(kept.sum()), part, shard_mib)
            plans[part] = PartPlan.build(manifest.seed, segment, index, layout, kept)
        return cls(windows, plans)

    @classmethod
    def open(cls, store: Store, segment: SegmentRecord) -> SegmentPlan:
        """The plan of a published segment, from its tables."""
        windows, plans = {}, {}
        for index, part in enumerate(PARTS):
            windows[part] = Windows.open(store, segment.index, part)
            kept = windows[part].kept_counts()
            plans[part] = PartPlan.build(store.manifest.seed, segment.index, index, segment.parts[part].layout, kept)
        return cls(windows, plans)

    @property
    def parts(self) -> dict[str, PartRecord]:
        """The parts of the segment's record."""
        layouts = {part: plan.layout for part, plan in self.plans.items()}
        return {
            part: PartRecord(len(self.windows[part]), layout.n_rows, layout.shard_rows, layout.chunk_rows)
            for part, layout in layouts.items()
        }

    def tables(self, table: TokenTable) -> Tables:
        """The tables from which `open` gives this plan again, and the text of its token table."""
        tables = text_tables(table.ids, table.offsets, table.heldout, table.names, table.keys)
        for part, windows in self.windows.items():
            tables |= window_tables(part, windows.token_start, windows.n_tokens, self.plans[part].first_rows)
        return tables


def part_layout(manifest: Manifest, n_rows: int, part: str, shard_mib: int) -> Layout:
    """How `n_rows` rows of a part are cut into shards of about `shard_mib`."""
    return choose_layout(
        n_rows,
        manifest.row_bytes,
        max(map(manifest.d_model, manifest.sites)) * np.dtype(np.float32).itemsize,
        shard_bytes=shard_mib << 20,
        min_shards=MIN_SHARDS if part == PARTS[0] else 1,
    )
