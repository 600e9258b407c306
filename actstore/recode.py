"""In: a store. Out: the same rows, in the same order, in another encoding, and what that costs in accuracy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore import paths
from actstore.encodings.channels import CHANNEL_WINDOWS, Channels
from actstore.encodings.registry import encoding_of
from actstore.errors import EncodingError
from actstore.moments import RowMoments
from actstore.open_place import open_place
from actstore.reader import ActivationStore, Shard
from actstore.schema import PARTS, Manifest, site_arrays, site_values
from actstore.segment_record import SegmentRecord
from actstore.tables import channel_tables
from actstore.writer import StoreWriter, require_store_place, write_shard


def recode_store(
    source: str | Path,
    out: str | Path,
    encoding: str,
    advance: Callable[[int], object] = lambda n: None,
    expect: Callable[[int], object] = lambda n: None,
) -> dict[str, Any]:
    """Write every row of a store into another store. An interrupted copy is continued.

    Statistics stay those of the rows as the model gave them. From fp32 the result is what collecting in the other
    encoding would have given, and is a store of the same identity; else its identity names the store it was made from.
    Returns sizes and, by site, the unexplained variance Σ‖x − x'‖² / Σ‖x − mean x‖² over the rows written now. Raises
    EncodingError, naming site, document and position, for a value that the encoding does not hold.
    """
    place = open_place(out)
    require_store_place(place)
    store = ActivationStore(source)
    manifest = _manifest(store, encoding)
    n_bytes = manifest.row_bytes * sum(store.n_rows(part) for part in PARTS)
    n_bytes_there = sum(place.names(paths.DATA).values())
    place.require_space(n_bytes - n_bytes_there, f"{encoding} of {store.url}")
    errors = {site: np.zeros(2) for site in store.sites}
    means = {site: store.statistics(site).mean for site in store.sites}
    with StoreWriter.open(place, manifest, store.tokenizer_files()) as writer:
        measured = [_channels(store, segment) if encoding_of(encoding).needs_channels else {} for segment in store.segments]
        # Every segment first: a copy that was interrupted between two of them would else look whole.
        pairs = zip(store.segments, measured, strict=True)
        targets = [_segment(writer, store, segment, channels) for segment, channels in pairs]
        for segment, channels, target in zip(store.segments, measured, targets, strict=True):
            missing = set(writer.missing_shards(target))
            expect(sum(shard.n_rows for shard in _shards(store, segment) if (shard.part, shard.index) in missing))
            for shard in _shards(store, segment):
                if (shard.part, shard.index) in missing:
                    arrays = _recoded(store, shard, manifest, channels, means, errors)
                    notes = store.notes(shard)
                    write_shard(writer.place, manifest, target, shard.part, shard.index, arrays, notes)
                    advance(shard.n_rows)
            if not writer.is_sealed(target):
                writer.seal(target)
    written = ActivationStore(place)
    return {
        "store": str(out),
        "store_id": written.store_id,
        "rows": sum(written.n_rows(part) for part in PARTS),
        "disk_bytes": written.disk_bytes,
        "of_the_source": written.disk_bytes / store.disk_bytes,
        "unexplained": {site: float(missed / total) for site, (missed, total) in errors.items() if total},
    }


def _manifest(store: ActivationStore, encoding: str) -> Manifest:
    plain = [array for array in store.manifest.arrays if array.name in paths.ROW_PLACES]
    sites = [array for site in store.sites for array in site_arrays(site, store.d_model(site), encoding)]
    is_exact = not store.manifest.source and all(store.manifest.encoding(site).is_exact for site in store.sites)
    source = {} if is_exact else {"store_id": store.store_id}
    provenance = {**store.manifest.provenance, "recoded_from": store.url}
    del provenance["tokenizer_files"]
    return replace(store.manifest, arrays=(*plain, *sites), source=source, provenance=provenance)


def _segment(
    writer: StoreWriter, store: ActivationStore, segment: SegmentRecord, channels: dict[str, Channels]
) -> SegmentRecord:
    """The segment of the copy: there already, or added with the source's tables."""
    record = replace(segment, store_id=writer.manifest.store_id)
    return writer.put_segment(record, lambda: store.text_tables(segment.index) | channel_tables(channels))


def _channels(store: ActivationStore, segment: SegmentRecord) -> dict[str, Channels]:
    """The channels' means and deviations over the plan's first 256 training windows, as `collect` takes them."""
    part = PARTS[0] if segment.parts[PARTS[0]].n_windows else PARTS[1]
    own_first = store.table(segment.index, paths.window_table(part, paths.FIRST_ROW))
    first_rows = np.sort(own_first)
    n_rows = int(first_rows[CHANNEL_WINDOWS]) if len(first_rows) > CHANNEL_WINDOWS else segment.parts[part].n_rows
    moments = {site: RowMoments(store.d_model(site)) for site in store.sites}
    for shard in _shards(store, segment):
        if shard.part == part and shard.start < n_rows:
            is_first = own_first[store.read(shard, paths.WINDOW)] < n_rows
            for site in store.sites:
                moments[site].update(store.read(shard, paths.acts(site))[is_first])
    return {site: own.channels() for site, own in moments.items()}


def _recoded(
    store: ActivationStore,
    shard: Shard,
    manifest: Manifest,
    channels: dict[str, Channels],
    means: dict[str, NDArray[np.float64]],
    errors: dict[str, NDArray[np.float64]],
) -> dict[str, NDArray[Any]]:
    """A shard's arrays in the other encoding; adds to each site's (missed, total) variance."""
    arrays = {name: store.read(shard, name) for name in paths.ROW_PLACES}
    for site in store.sites:
        rows, encoding = store.read(shard, paths.acts(site)), manifest.encoding(site)
        try:
            arrays |= site_values(site, rows, encoding, channels.get(site))
        except EncodingError as error:
            document = store.document_names(shard.segment)[int(store.documents(shard)[error.row])]
            token, position = store.token_index(shard)[error.row], arrays[paths.POSITION][error.row]
            raise error.at(site, document, int(token), int(position)) from error
        back = encoding.decode(arrays[paths.acts(site)], arrays.get(paths.scales(site)), channels.get(site))
        errors[site] += np.square(rows - back, dtype=np.float64).sum(), np.square(rows - means[site]).sum()
    return arrays


def _shards(store: ActivationStore, segment: SegmentRecord) -> list[Shard]:
    return [shard for part in PARTS for shard in store.shards(part) if shard.segment == segment.index]
