"""In: a published segment and its missing shards. Out: those shards, computed and committed, here or on Dask workers.

Either way the store is the same, bit for bit. Here, a shard is written while the next one is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from actstore import paths
from actstore.errors import IdentityMismatch, InputError
from actstore.files import record_bytes
from actstore.open_place import absolute
from actstore.place import Place
from actstore.reader import Store
from actstore.schema import PARTS
from actstore.segment_record import SegmentRecord
from actstore.writer import write_shard
from pipelines.collect.collection import Collection
from pipelines.collect.config import CollectConfig
from pipelines.collect.segment_plan import SegmentPlan
from pipelines.shared.cluster import own_device, run_tasks
from pipelines.shared.progress import track

Missing = list[tuple[str, int]]
"""(part, shard) of each shard that is not committed."""


class OpenSegment:
    """A published segment, and this machine's right to compute rows of it.

    `probe` is what this machine computes for the segment's first windows, where known. Raises IdentityMismatch when the
    segment was begun on hardware that computes other bits, unless the configuration accepts mixed hardware.
    """

    def __init__(self, store: Store, segment: SegmentRecord, collection: Collection, probe: str | None = None):
        self.store, self.segment, self.collection = store, segment, collection
        self.plan = SegmentPlan.open(store, segment)
        self.channels = {site: store.channels(segment.index, paths.acts(site)) for site in store.manifest.measured_sites}
        self.probe = probe or collection.probe(self.plan.windows[PARTS[0]])
        if not collection.config.mixed_hardware:
            self._require_same_probe()
        elif self.probe != segment.environment["probe_crc32c"]:
            name = paths.environment_record(segment.index, self.probe)
            store.place.create(name, record_bytes(collection.environment(self.probe)))

    def compute(self, part: str, shard: int, advance: Callable[[int], object]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The arrays of a shard, and the notes for its record: statistics, and the probe of what computed it."""
        arrays, statistics = self.collection.shard(self.plan, part, shard, self.channels, self._document, advance)
        return arrays, {"stats": statistics, "probe_crc32c": self.probe}

    def _document(self, token: int) -> str:
        (document,) = self.store.documents_of(self.segment.index, np.array([token]))
        return self.store.document_names(self.segment.index)[document]

    def _require_same_probe(self) -> None:
        environment = self.segment.environment
        if environment["probe_crc32c"] != self.probe:
            raise IdentityMismatch(
                f"{self.store.url}: segment {self.segment.index} was begun with --batch-windows "
                f"{environment['batch_windows']} on hardware whose probe is {environment['probe_crc32c']} "
                f"({environment['cpu']}, torch {environment['torch']}), with {self.collection.config.batch_windows} here it "
                f"is {self.probe}; continue as it was begun, or pass --mixed-hardware to accept rows "
                "that differ in their last bits."
            )


def fill_here(
    collection: Collection, place: Place, segment: SegmentRecord, missing: Missing, n_rows: int, probe: str | None
) -> None:
    """Compute and commit shards in this process; `n_rows` is how many rows they have."""
    opened = OpenSegment(Store(place, partial=True), segment, collection, probe)
    with track("collect", n_rows) as progress, ThreadPoolExecutor(1) as pool:
        pending: Future[None] | None = None
        for part, shard in missing:
            arrays, notes = opened.compute(part, shard, progress.advance)
            if pending is not None:
                pending.result()
            pending = pool.submit(write_shard, place, collection.manifest, segment, part, shard, arrays, notes)
        if pending is not None:
            pending.result()


def fill_by_workers(client: Any, config: CollectConfig, segment: SegmentRecord, missing: Missing) -> None:
    """Have the workers of a Dask client compute and commit shards, one a task."""
    model = absolute(config.model) if Path(config.model).exists() else config.model
    config = replace(config, out=absolute(config.out), model=model)
    tasks = [(config, segment.index, segment.content_id, part, shard) for part, shard in missing]
    run_tasks(client, "collect", collect_shard, tasks)


_MODEL_IN_USE = Lock()
"""A hook sees every forward pass of its model: a worker's threads run the model one at a time."""


def collect_shard(config: CollectConfig, segment: int, content_id: str, part: str, shard: int) -> None:
    """Compute, write and commit one shard. Runs on a worker."""
    with _MODEL_IN_USE:
        opened = _opened(config, segment, content_id)
        arrays, notes = opened.compute(part, shard, lambda n: None)
    write_shard(opened.store.place, opened.store.manifest, opened.segment, part, shard, arrays, notes)


@lru_cache(maxsize=1)
def _opened(config: CollectConfig, segment: int, content_id: str) -> OpenSegment:
    """A segment of a store that this process computes shards of."""
    store = Store(config.out, partial=True)
    if len(store.segments) <= segment or store.segments[segment].content_id != content_id:
        raise InputError(f"{config.out}: is another store on this worker; show every worker the same disk.")
    return OpenSegment(store, store.segments[segment], _collection(config, store.store_id))


@lru_cache(maxsize=1)
def _collection(config: CollectConfig, store_id: str) -> Collection:
    """The collection of a store, whose model is loaded once a process."""
    manifest = Store(config.out, partial=True).manifest
    return Collection.of_store(config, manifest, own_device(config.device))
