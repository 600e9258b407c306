"""A store's promises: true rows, continuation after a crash, readers that see exactly the committed rows."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from forkkit import PROCESSES
from storekit import (
    BOS,
    TWO_SEGMENTS,
    StoreSpec,
    build_segment,
    files_of,
    flip_bit,
    row_ids,
    row_values,
    shard_arrays,
    write_and_die,
    write_and_hold,
    write_slowly,
    write_store,
)

from actstore.encodings.registry import encoding_of
from actstore.errors import (
    DamagedStore,
    IdentityMismatch,
    IncompleteStore,
    InputError,
    LockedStore,
    NotAStore,
    OutputExists,
)
from actstore.folder import Folder
from actstore.integrity import find_faults
from actstore.reader import ActivationStore, Shard, Store
from actstore.records import Records, Seal
from actstore.schema import Manifest, RowArray, differing_fields
from actstore.segment_record import SegmentRecord
from actstore.writer import StoreWriter, write_shard

SPEC = TWO_SEGMENTS
SITE = "acts/resid_post.0"
SITE_SHARD = "data.zarr/segments/0000/train/acts/resid_post.0/c/0/0"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store that no test changes."""
    return write_store(tmp_path_factory.mktemp("store") / "store", SPEC)


@pytest.fixture
def own(path: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(path, tmp_path / "store"))


def open_writer(path: Path, manifest: Manifest = SPEC.manifest) -> None:
    """Take the right to write a store, and give it back."""
    with StoreWriter.open(path, manifest, {"tokenizer.json": b"{}"}):
        pass


def ids_in(store: Store, shard: Shard) -> np.ndarray:
    """The row ids that a shard holds, from its windows and positions."""
    window, position = (store.read(shard, f"rows/{name}").astype(np.int64) for name in ("window", "position"))
    return row_ids(shard.segment, shard.part, window, position)


def planned_ids(spec: StoreSpec, part: str) -> list[int]:
    """The row ids of everything the spec's windows keep, in order."""
    return [
        int(row_ids(index, part, np.array(window), np.array(position)))
        for index in range(spec.n_segments)
        for window, kept in enumerate(build_segment(spec, index).kept_positions[part])
        for position in kept
    ]


# What was written is what is read


def test_each_row_read_back_is_the_one_computed_for_its_window_and_position(path: Path) -> None:
    store = ActivationStore(path)
    for part in ("train", "heldout"):
        seen: list[int] = []
        for shard in store.shards(part):
            ids = ids_in(store, shard)
            rows = row_values(ids, SPEC.d_model)
            np.testing.assert_array_equal(store.read(shard, SITE), rows)
            np.testing.assert_array_equal(
                store.read(shard, "acts/resid_post.1"), encoding_of("bf16").decode(encoding_of("bf16").encode(rows)[0])
            )
            seen.extend(ids.tolist())
        expected = planned_ids(SPEC, part)
        assert sorted(seen) == expected
        assert store.n_rows(part) == len(expected)


def test_chunks_are_the_shard_in_pieces(path: Path) -> None:
    store = ActivationStore(path)
    for shard in store.shards():
        chunks = [store.read_chunk(shard, SITE, chunk) for chunk in range(shard.n_chunks)]
        assert all(len(chunk) == SPEC.chunk_rows for chunk in chunks[:-1])
        np.testing.assert_array_equal(np.concatenate(chunks), store.read(shard, SITE))


@pytest.mark.parametrize("rows", [(0, 0), (0, 1), (31, 33), (5, 200), (250, 10_000)])
def test_any_run_of_rows_is_that_of_the_whole_shard(path: Path, rows: tuple[int, int]) -> None:
    store = ActivationStore(path)
    shard = store.shards()[0]
    for site in ("acts/resid_post.0", "acts/resid_post.1", "rows/window"):
        np.testing.assert_array_equal(store.read(shard, site, *rows), store.read(shard, site)[slice(*rows)])


def test_each_row_leads_to_its_token_and_its_document(path: Path) -> None:
    store = ActivationStore(path)
    for shard in store.shards() + store.shards("heldout"):
        tables = build_segment(SPEC, shard.segment).tables
        window, position = (store.read(shard, f"rows/{name}").astype(np.int64) for name in ("window", "position"))
        index = store.token_index(shard)
        np.testing.assert_array_equal(index, tables[f"{shard.part}/windows/token_start"][window] + position - 1)
        np.testing.assert_array_equal(store.token_ids(shard), tables["tokens/ids"][index])
        document = store.documents(shard)
        offsets = store.table(shard.segment, "documents/offsets")
        assert ((offsets[document] <= index) & (index < offsets[document + 1])).all()
        assert (store.table(shard.segment, "documents/heldout")[document] == (shard.part == "heldout")).all()
    assert store.document_names(1) == [f"document {i}" for i in range(SPEC.n_documents)]


def test_threads_may_read_the_tables_of_several_segments_at_once(path: Path) -> None:
    """The reader has one segment's in memory, and lets go of them when another's are asked for."""
    store = ActivationStore(path)
    expected = [build_segment(SPEC, segment).tables["tokens/ids"] for segment in range(SPEC.n_segments)]

    def read(segment: int) -> None:
        for _ in range(40):
            np.testing.assert_array_equal(store.table(segment, "tokens/ids"), expected[segment])

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(read, [0, 1] * 3))


def test_a_row_is_located_by_its_number(path: Path) -> None:
    store = ActivationStore(path)
    before = store.n_rows() - store.shards()[-1].n_rows
    for row, shard, here in [(0, store.shards()[0], 0), (300, store.shards()[1], 44), (before, store.shards()[-1], 0)]:
        origin = store.locate(row)
        assert (origin.segment, origin.shard) == (shard.segment, shard.index)
        window, position = np.array(origin.window), np.array(origin.position)
        assert row_ids(shard.segment, "train", window, position) == ids_in(store, shard)[here]
        assert origin.token_index == store.token_index(shard)[here]
        assert origin.document_start <= origin.token_index < origin.document_stop
        assert origin.document_name == f"document {origin.document}"
    with pytest.raises(InputError, match=rf"has {store.n_rows():,} train rows, row {store.n_rows():,} was asked for"):
        store.locate(store.n_rows())


def test_a_start_of_text_row_has_no_place_in_the_token_table(tmp_path: Path) -> None:
    spec = StoreSpec(n_documents=3)
    write_store(tmp_path / "store", spec, n_shards=0)
    arrays, notes = shard_arrays(spec, build_segment(spec, 0), "train", 0)
    arrays["rows/position"][:2] = 0
    put_shard(tmp_path / "store", spec, arrays, notes)
    store = ActivationStore(tmp_path / "store", partial=True)
    (shard,) = store.shards()
    assert store.token_index(shard)[:2].tolist() == [-1, -1]
    assert store.token_ids(shard)[:2].tolist() == [BOS, BOS]
    starts = store.table(0, "train/windows/token_start")[store.read(shard, "rows/window")[:2]]
    offsets = store.table(0, "documents/offsets")
    np.testing.assert_array_equal(store.documents(shard)[:2], np.searchsorted(offsets, starts, side="right") - 1)


def put_shard(path: Path, spec: StoreSpec, arrays: dict[str, Any], notes: dict[str, Any]) -> None:
    """Write the first training shard of a store's first segment."""
    place = Folder(path)
    write_shard(place, spec.manifest, Records(place).segments[0], "train", 0, arrays, notes)


@pytest.mark.parametrize("part", ["train", "heldout"])
def test_statistics_are_those_of_all_committed_rows(path: Path, part: str) -> None:
    store = ActivationStore(path)
    rows = np.concatenate([store.read(shard, SITE) for shard in store.shards(part)]).astype(np.float64)
    found = store.statistics("resid_post.0", part)
    assert found.n_rows == len(rows)
    np.testing.assert_allclose(found.mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.second_moment, np.square(rows).mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.deviation, rows.std(0), rtol=1e-9)
    np.testing.assert_allclose(found.mean_norm, np.linalg.norm(rows, axis=1).mean(), rtol=1e-12)


def test_rows_of_nothing_but_zeros_are_written_too(tmp_path: Path) -> None:
    """Zarr leaves out chunks that hold only the fill value; what is left out has no checksum."""
    spec = StoreSpec(n_documents=5)
    out = write_store(tmp_path / "store", spec, n_shards=0)
    arrays, notes = shard_arrays(spec, build_segment(spec, 0), "train", 0)
    put_shard(out, spec, {name: np.zeros_like(kept) for name, kept in arrays.items()}, notes)
    store = ActivationStore(out, partial=True)
    (shard,) = store.shards()
    assert not store.read(shard, SITE).any()
    flip_bit(out / SITE_SHARD, 0)
    with pytest.raises(DamagedStore):
        ActivationStore(out, partial=True).read(shard, SITE)


def test_a_short_last_shard_takes_no_more_space_than_its_chunks(path: Path) -> None:
    store = ActivationStore(path)
    for shard in store.shards():
        file = path / f"data.zarr/segments/{shard.segment:04d}/train/{SITE}/c/{shard.index}/0"
        chunks_bytes = shard.n_chunks * (SPEC.chunk_rows * SPEC.d_model * 4 + 4)
        index_bytes = SPEC.shard_rows // SPEC.chunk_rows * 16 + 4
        assert file.stat().st_size == chunks_bytes + index_bytes


def test_any_zarr_library_can_walk_the_store_and_reads_the_same_values(path: Path) -> None:
    group = zarr.open_group(path / "data.zarr", mode="r")
    arrays = {name: member for name, member in group.members(max_depth=None) if isinstance(member, zarr.Array)}
    store = ActivationStore(path)
    for segment in range(SPEC.n_segments):
        prefix = f"segments/{segment:04d}"
        np.testing.assert_array_equal(arrays[f"{prefix}/tokens/ids"][...], store.table(segment, "tokens/ids"))
        for name in (SITE, "rows/window", "rows/position"):
            rows = [store.read(shard, name) for shard in store.shards() if shard.segment == segment]
            np.testing.assert_array_equal(arrays[f"{prefix}/train/{name}"][...], np.concatenate(rows))


def test_no_shard_of_another_shape_or_dtype_is_written(tmp_path: Path) -> None:
    out = write_store(tmp_path / "store", SPEC, n_shards=0)
    before = files_of(out)
    arrays, notes = shard_arrays(SPEC, build_segment(SPEC, 0), "train", 0)
    for wrong in (arrays["rows/window"][:-1], arrays["rows/window"].astype(np.float64), arrays["rows/window"][:, None]):
        with pytest.raises(ValueError, match="is not shard 0's 256 rows"):
            put_shard(out, SPEC, {**arrays, "rows/window": wrong}, notes)
    assert files_of(out) == before


def test_an_array_that_is_not_there_is_refused_by_name(path: Path) -> None:
    store = ActivationStore(path)
    with pytest.raises(InputError, match=r"no array acts/nowhere here; there are .*acts/resid_post\.1"):
        store.read(store.shards()[0], "acts/nowhere")
    assert store.sites == ["resid_post.0", "resid_post.1"]
    with pytest.raises(InputError, match=r"several sites fit resid_post; it holds resid_post\.0, resid_post\.1"):
        store.site("resid_post")
    with pytest.raises(InputError, match=r"has no site mlp_out\.1; it holds resid_post\.0, resid_post\.1"):
        store.site("mlp_out", 1)
    assert store.site(layer=1) == store.site("resid_post", 1) == "resid_post.1"


# The records


def test_a_manifest_comes_back_from_its_bytes(path: Path) -> None:
    manifest = replace(SPEC.manifest, provenance={**SPEC.manifest.provenance, "tokenizer_files": {}})
    assert Manifest.from_bytes(manifest.to_bytes(), "here") == manifest
    assert Store(path).manifest.identity() == manifest.identity()
    assert Store(path).store_id == manifest.store_id
    assert json.loads((path / "manifest.json").read_bytes())["store_id"] == manifest.store_id


def test_a_segment_record_and_a_seal_come_back_from_their_bytes(path: Path) -> None:
    for record in Records(Folder(path)).segments:
        assert SegmentRecord.from_bytes(record.to_bytes(), "here") == record
        seal = Records(Folder(path)).seal(record.index)
        assert seal is not None
        assert Seal.from_bytes(seal.to_bytes(), "here") == seal


def test_provenance_is_no_part_of_the_identity() -> None:
    moved = replace(SPEC.manifest, provenance={"folder": "elsewhere"})
    assert moved.store_id == SPEC.manifest.store_id
    assert differing_fields(moved, SPEC.manifest) == []


@pytest.mark.parametrize("array", [RowArray("a", 4, "uint16", "raw"), RowArray("a", 5, "float32", "raw")])
def test_every_difference_of_an_array_is_a_difference_of_identity(array: RowArray) -> None:
    ours = replace(SPEC.manifest, arrays=(RowArray("a", 4, "float32", "raw"),))
    theirs = replace(SPEC.manifest, arrays=(array,))
    (line,) = differing_fields(ours, theirs)
    assert line == f"arrays: a (4 x float32, raw) / a ({array.width} x {array.dtype}, raw)"


@pytest.mark.parametrize(
    ("old", "new", "error", "message"),
    [
        ('"seed": 0', '"seed": 1', DamagedStore, "the manifest: was changed after it was written"),
        ('"made_by": "', '"made_by": "not ', DamagedStore, "the manifest: was changed after it was written"),
        ('"seed": 0', '"seed":  0', DamagedStore, "the manifest: was changed after it was written"),
        ('"version": 3', '"version": 4', NotAStore, "format version 4, this program reads 3"),
        ('"format": "actstore"', '"format": "other"', NotAStore, "not an actstore manifest"),
        ("{", "", DamagedStore, "the manifest: not readable as JSON"),
    ],
)
def test_a_manifest_edited_by_hand_is_refused(own: Path, old: str, new: str, error: type[Exception], message: str) -> None:
    file = own / "manifest.json"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    for opened in (Store, open_writer):
        with pytest.raises(error, match=message):
            opened(own)


def test_the_manifest_of_another_store_is_refused(own: Path) -> None:
    other = replace(SPEC.manifest, seed=1, provenance=Store(own).manifest.provenance)
    (own / "manifest.json").write_bytes(other.to_bytes())
    with pytest.raises(
        DamagedStore, match=f"manifest.json: is of store {other.store_id}, the segments of {SPEC.manifest.store_id}"
    ):
        Store(own)


def test_a_record_in_the_place_of_another_is_refused(tmp_path: Path) -> None:
    """In a store that is not sealed, too, where no list of the records' hashes says so."""
    write_store(tmp_path / "store", SPEC, n_shards=2)
    records = [tmp_path / f"store/commits/0000/train/{shard:06d}.json" for shard in (0, 1)]
    contents = [record.read_bytes() for record in records]
    for record, content in zip(records, reversed(contents), strict=True):
        record.write_bytes(content)
    store = ActivationStore(tmp_path / "store", partial=True)
    for shard in store.shards()[:2]:
        with pytest.raises(DamagedStore, match=rf"train/{shard.index:06d}\.json: is of another shard"):
            store.read(shard, SITE)


# Who may write where


def test_the_same_identity_continues_and_changes_nothing_that_is_there(own: Path) -> None:
    before = files_of(own)
    write_store(own, SPEC)
    assert files_of(own) == before


def test_another_identity_is_refused_and_the_fields_are_named(own: Path) -> None:
    other = replace(SPEC, seed=5, sites=(("resid_post.0", "fp16"),))
    message = r"arrays: .*resid_post\.0 \(4 x float32, fp32\).* / .*resid_post\.0 \(4 x float16, fp16\); seed: 0 / 5;"
    with pytest.raises(IdentityMismatch, match=message):
        open_writer(own, other.manifest)
    open_writer(own)  # the refusal let go of the lock


def test_a_published_segment_is_never_replaced(own: Path) -> None:
    before = files_of(own)
    for number, other in ((1, SPEC), (0, replace(SPEC, document_tokens=30))):
        segment = build_segment(other, number)
        with (
            StoreWriter.open(own, SPEC.manifest, {}) as writer,
            pytest.raises(ValueError, match=f"segment {number} is not the next one"),
        ):
            writer.add_segment(segment.record, segment.tables)
    assert files_of(own) == before


def test_a_segment_that_another_has_sealed_meanwhile_gets_the_same_seal(own: Path) -> None:
    before = files_of(own)
    with StoreWriter.open(own, SPEC.manifest, {}) as writer:
        for segment in writer.segments():
            writer.seal(segment)
    assert files_of(own) == before


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_something_else_at_the_output_is_refused_and_left_alone(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "thesis"
    if kind == "folder":
        out.mkdir()
    content = out / "chapter.txt" if kind == "folder" else out
    content.write_text("years of work")
    with pytest.raises(OutputExists, match="exists and is not a store; choose another --out"):
        open_writer(out)
    assert content.read_text() == "years of work"
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [content]


def test_an_unfinished_creation_and_an_empty_folder_are_continued(tmp_path: Path) -> None:
    spec = StoreSpec(n_documents=5)
    out = tmp_path / "store"
    out.mkdir()
    write_store(out, spec, n_shards=0)
    for record in ("manifest.json", "commits", "data.zarr"):
        (out / record).rename(tmp_path / record)
    (out / ".manifest.json.12345678.tmp").write_text("{")
    write_store(out, spec)
    assert find_faults(Folder(out)) == []


def test_a_store_that_another_process_writes_is_refused_and_a_killed_writer_is_no_trap(own: Path) -> None:
    here, there = multiprocessing.Pipe()
    process = PROCESSES.Process(target=write_and_hold, args=(own, SPEC, there))
    process.start()
    assert here.recv()
    with pytest.raises(LockedStore, match="another process is writing there"):
        open_writer(own)
    assert find_faults(Folder(own)) == []  # reading is never locked out
    process.kill()
    process.join()
    write_store(own, SPEC)


def test_a_lost_manifest_of_a_sealed_store_is_the_sealed_one_again(own: Path) -> None:
    before = files_of(own)
    (own / "manifest.json").unlink()
    open_writer(own, replace(SPEC.manifest, provenance={"made_by": "a folder that was moved since"}))
    assert files_of(own) == before


def test_a_lost_manifest_is_not_made_up_for_another_store(own: Path) -> None:
    (own / "manifest.json").unlink()
    with pytest.raises(DamagedStore, match=r"manifest\.json is missing; `actstore repair`"):
        Store(own)
    with pytest.raises(IdentityMismatch, match=f"its records are of store {SPEC.manifest.store_id}; what was asked for is"):
        open_writer(own, replace(SPEC.manifest, seed=1))
    assert not (own / "manifest.json").exists()


# Half-written stores


def test_only_committed_shards_are_there(tmp_path: Path) -> None:
    spec = StoreSpec(n_documents=30)
    write_store(tmp_path / "store", spec, n_shards=2)
    with pytest.raises(IncompleteStore, match="half-written, 2 of 5 shards are committed"):
        ActivationStore(tmp_path / "store")
    store = ActivationStore(tmp_path / "store", partial=True)
    committed = store.shards() + store.shards("heldout")
    assert [(shard.part, shard.index) for shard in committed] == [("train", 0), ("train", 1)]
    assert store.n_rows() == 2 * spec.shard_rows
    assert find_faults(Folder(tmp_path / "store")) == []
    snapshot = store.snapshot
    write_store(tmp_path / "store", spec)
    finished = ActivationStore(tmp_path / "store")
    assert finished.snapshot != snapshot
    assert store.snapshot == snapshot, "an open reader stays with the shards it saw"


def test_a_reader_sees_true_rows_only_while_another_process_writes(tmp_path: Path) -> None:
    out = tmp_path / "store"
    process = PROCESSES.Process(target=write_slowly, args=(out, SPEC, 0.01))
    process.start()
    seen = [0]
    while seen[-1] < len(planned_ids(SPEC, "train")) and process.exitcode in (None, 0):
        try:
            store = ActivationStore(out, partial=True)
        except NotAStore:
            time.sleep(0.01)
            continue
        rows = [(store.read(shard, SITE), row_values(ids_in(store, shard), SPEC.d_model)) for shard in store.shards()]
        for found, expected in rows:
            np.testing.assert_array_equal(found, expected)
        seen.append(sum(len(found) for found, _ in rows))
    process.join()
    assert process.exitcode == 0
    assert seen == sorted(seen)
    assert len(set(seen)) > 3, "read too rarely to show anything"
    assert ActivationStore(out).n_rows() == seen[-1]


def test_listing_a_folder_in_which_another_writes_fails_at_nothing(tmp_path: Path) -> None:
    """A file may go between its name being read and its length."""
    place, ended = Folder(tmp_path), threading.Event()

    def write() -> None:
        while not ended.is_set():
            for number in range(5):
                place.publish(f"folder/{number}", b"content")

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(500):
            assert set(place.names()) <= {f"folder/{number}" for number in range(5)}
    finally:
        ended.set()
        writer.join()


def test_snapshots_of_different_stores_differ(path: Path, tmp_path: Path) -> None:
    other = write_store(tmp_path / "other", replace(SPEC, sites=(("resid_post.0", "fp32"),)))
    assert len(Store(other).shards()) == len(Store(path).shards())
    assert Store(other).snapshot != Store(path).snapshot


def test_a_store_that_has_grown_is_opened_as_it_was(tmp_path: Path) -> None:
    out = write_store(tmp_path / "store", replace(SPEC, n_segments=1))
    old = ActivationStore(out)
    rows = [old.read(shard, SITE) for shard in old.shards()]
    write_store(out, SPEC)
    assert len(ActivationStore(out).shards()) > len(rows)
    pinned = ActivationStore(out, snapshot=old.snapshot)
    assert (pinned.snapshot, pinned.n_rows(), pinned.n_rows("heldout")) == (
        old.snapshot,
        old.n_rows(),
        old.n_rows("heldout"),
    )
    for shard, expected in zip(pinned.shards(), rows, strict=True):
        np.testing.assert_array_equal(pinned.read(shard, SITE), expected)
    np.testing.assert_array_equal(pinned.statistics("resid_post.0").mean, old.statistics("resid_post.0").mean)


def test_a_snapshot_that_never_was_is_refused(path: Path) -> None:
    with pytest.raises(IdentityMismatch, match=f"has snapshot {Store(path).snapshot} and never had 0123456789abcdef"):
        Store(path, snapshot="0123456789abcdef")


def test_a_store_sent_to_another_process_is_the_same_snapshot_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by a path relative to a working folder that the other process does not have."""
    write_store(tmp_path / "store", replace(SPEC, n_segments=1))
    monkeypatch.chdir(tmp_path)
    store = ActivationStore("store")
    sent, rows = pickle.dumps(store), store.read(store.shards()[-1], SITE)
    write_store(tmp_path / "store", SPEC)
    monkeypatch.chdir("/")
    received = pickle.loads(sent)
    assert type(received) is ActivationStore
    assert received.snapshot == store.snapshot != ActivationStore(tmp_path / "store").snapshot
    np.testing.assert_array_equal(received.read(received.shards()[-1], SITE), rows)


def test_a_finished_store_is_needed_to_seal_it(tmp_path: Path) -> None:
    write_store(tmp_path / "store", SPEC, n_shards=1)
    with StoreWriter.open(tmp_path / "store", SPEC.manifest, {}) as writer:
        (segment,) = writer.segments()
        with pytest.raises(ValueError, match="segment 0 is not complete"):
            writer.seal(segment)
        assert not writer.is_sealed(segment)


def test_a_folder_that_is_no_store_or_one_of_another_kind_is_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(NotAStore, match=r"not a store \(no manifest\.json\)"):
        Store(tmp_path)

    class CodeStore(Store):
        kind = "codes"

    with pytest.raises(NotAStore, match="holds activations, codes are needed"):
        CodeStore(path)


# Damage that a reader meets (tests/store/test_integrity.py has what `verify` and `repair` make of it)


def test_a_sealed_store_without_a_commit_record_is_a_fault(own: Path) -> None:
    (own / "commits/0000/train/000001.json").unlink()
    for partial in (False, True):
        with pytest.raises(DamagedStore, match="segment 0 is sealed but the commit record of train shard 1 is missing"):
            ActivationStore(own, partial=partial)


@pytest.mark.parametrize("segment", ["0000", "0001"])
def test_a_sealed_store_without_a_segment_record_is_a_fault(own: Path, segment: str) -> None:
    (own / f"commits/{segment}/segment.json").unlink()
    for opened in (lambda: Store(own), lambda: write_store(own, SPEC)):
        with pytest.raises(DamagedStore, match=rf"commits/{segment}/segment\.json is missing, though its segment is sealed"):
            opened()


def _remove(file: Path) -> None:
    file.unlink()


def _truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def _flip(file: Path) -> None:
    flip_bit(file, 12345)


@pytest.mark.parametrize("damage", [_remove, _truncate, _flip])
def test_a_damaged_shard_is_named_and_the_others_are_read(own: Path, damage: Callable[[Path], None]) -> None:
    damage(own / SITE_SHARD)
    store = ActivationStore(own)
    shard, other = store.shards()[:2]
    with pytest.raises(DamagedStore, match=re.escape(SITE_SHARD) + ".*`actstore verify` lists every fault"):
        store.read(shard, SITE)
    assert len(store.read(other, SITE)) == other.n_rows


@pytest.mark.parametrize("damage", [_remove, _truncate, _flip])
def test_damage_after_a_shard_was_opened_is_found_too(own: Path, damage: Callable[[Path], None]) -> None:
    store = ActivationStore(own)
    shard = store.shards()[0]
    store.read(shard, SITE)
    damage(own / SITE_SHARD)
    with pytest.raises(DamagedStore, match=re.escape(SITE_SHARD)):
        store.read(shard, SITE)


@pytest.mark.parametrize("damage", [_remove, _truncate, _flip])
@pytest.mark.parametrize("file", ["tokens/ids/c/0", "tokens/ids/zarr.json", "documents/source/c/0"])
def test_a_damaged_table_is_named(own: Path, damage: Callable[[Path], None], file: str) -> None:
    name = f"data.zarr/segments/0001/{file}"
    damage(own / name)
    with pytest.raises(DamagedStore, match=re.escape(name)):
        ActivationStore(own).table(1, "/".join(file.split("/")[:2]))


@pytest.mark.parametrize("damage", [_remove, _truncate, _flip])
def test_a_damaged_tokenizer_is_named(own: Path, damage: Callable[[Path], None]) -> None:
    assert Store(own).tokenizer_files() == {"tokenizer.json": b"{}"}
    damage(own / "tokenizer/tokenizer.json")
    with pytest.raises(DamagedStore, match=r"tokenizer/tokenizer\.json: it"):
        Store(own).tokenizer_file()


def test_a_damaged_commit_record_is_named(own: Path) -> None:
    (own / "commits/0000/train/000000.json").write_text("{")
    store = ActivationStore(own)
    with pytest.raises(DamagedStore, match=r"commits/0000/train/000000\.json is not the record that was sealed"):
        store.read(store.shards()[0], SITE)


# kill -9

KILLED = StoreSpec(n_segments=2, n_documents=30, document_tokens=12)


def test_a_record_is_published_after_everything_it_names_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Objects and the folders that lead to them: so that a power cut leaves no record of what is not there."""
    flushed: set[int] = set()
    published: list[str] = []
    store, link = tmp_path / "store", os.link

    def link_after_check(source: Path, target: Path) -> None:
        assert os.stat(source).st_ino in flushed
        named = json.loads(Path(source).read_text())
        for name in {**named.get("objects", {}), **named.get("records", {})}:
            for path in (store / name, *(store / name).parents[: len(Path(name).parents) - 1]):
                assert path.stat().st_ino in flushed, path
        published.append(Path(target).relative_to(store / "commits/0000").as_posix())
        link(source, target)

    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.add(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(os, "link", link_after_check)
    write_store(store, StoreSpec(n_documents=10))
    assert published == ["segment.json", "train/000000.json", "heldout/000000.json", "sealed.json"]
    assert (store / "commits/0000").stat().st_ino in flushed, "the folder of the last record"


def test_a_writer_killed_at_any_moment_and_continued_ends_with_the_same_bytes(tmp_path: Path) -> None:
    expected = files_of(write_store(tmp_path / "uninterrupted", KILLED))
    moments = random.Random(0)
    out = tmp_path / "killed"
    progress = []
    while True:
        process = PROCESSES.Process(target=write_and_die, args=(out, KILLED, moments.randint(1, 120)))
        process.start()
        process.join()
        progress.append(len(list(out.glob("commits/**/[!.]*.json"))))
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        if (out / "manifest.json").exists():
            assert_all_that_is_there_is_true(out)

    assert progress == sorted(progress), "a kill takes nothing that was committed"
    assert len(set(progress)) > 3, "killed at too few stages to show anything"
    assert files_of(out) == expected
    assert find_faults(Folder(out)) == []


def assert_all_that_is_there_is_true(out: Path) -> None:
    """Every committed row is the computed one, and nothing is amiss but, at most, that the last step is to be done."""
    store = ActivationStore(out, partial=True)
    for shard in store.shards() + store.shards("heldout"):
        np.testing.assert_array_equal(store.read(shard, SITE), row_values(ids_in(store, shard), KILLED.d_model))
    assert {fault.what for fault in find_faults(Folder(out))} <= {"missing, though every shard is committed"}


def test_the_same_bytes_are_written_in_any_order_of_shards(path: Path, tmp_path: Path) -> None:
    out = write_store(tmp_path / "store", SPEC, n_shards=0)
    with StoreWriter.open(out, SPEC.manifest, {}) as writer:
        segment = build_segment(SPEC, 0)
        record = writer.segments()[0]
        for part, shard in reversed(writer.missing_shards(record)):
            write_shard(writer.place, SPEC.manifest, record, part, shard, *shard_arrays(SPEC, segment, part, shard))
    write_store(out, SPEC)
    assert files_of(out) == files_of(path)


class Blind(Folder):
    """Does not see what another writer has put meanwhile."""

    def exists(self, name: str) -> bool:
        return False


def test_a_shard_that_two_have_computed_is_published_once(own: Path) -> None:
    """As workers do whose answer was lost: what was committed first stays."""
    before = files_of(own)
    arrays, notes = shard_arrays(SPEC, build_segment(SPEC, 0), "train", 0)
    record = Records(Folder(own)).segments[0]
    for place, computed_by in ((Folder(own), "another machine"), (Blind(own), None)):
        own_notes = {**notes, "computed_by": computed_by} if computed_by else notes
        write_shard(place, SPEC.manifest, record, "train", 0, arrays, own_notes)
        assert files_of(own) == before
    with pytest.raises(LockedStore, match=r"train/000000\.json was put by another writer meanwhile"):
        write_shard(Blind(own), SPEC.manifest, record, "train", 0, arrays, {**notes, "computed_by": "another machine"})
    assert files_of(own) == before


def test_a_segment_that_does_not_go_on_where_the_last_one_ended_is_refused(own: Path) -> None:
    before = files_of(own)
    segment = build_segment(replace(SPEC, n_documents=29), 2)
    message = "ends before document 60, token 0; a segment from document 58, token 0 does not go on there"
    with StoreWriter.open(own, SPEC.manifest, {}) as writer, pytest.raises(LockedStore, match=message):
        writer.add_segment(segment.record, segment.tables)
    assert files_of(own) == before
