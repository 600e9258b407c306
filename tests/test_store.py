"""What a store promises: true rows, no trap after a crash, no damage that goes unseen."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from storekit import (
    BOS,
    StoreSpec,
    build_segment,
    row_ids,
    row_values,
    shard_arrays,
    write_and_die,
    write_and_hold,
    write_store,
)

from actstore.codecs import decode_rows, encode_rows
from actstore.errors import (
    DamagedStore,
    IdentityMismatch,
    IncompleteStore,
    InputError,
    LockedStore,
    NotAStore,
    OutputExists,
)
from actstore.reader import ActivationStore, Store
from actstore.schema import Manifest, RowArray, SegmentRecord, differing_fields
from actstore.writer import StoreWriter, read_segments, write_shard

SPEC = StoreSpec(n_segments=2, n_documents=30, document_tokens=20)
SITE = "acts/resid_post.0"
SITE_SHARD = "data.zarr/segments/0000/train/acts/resid_post.0/c/0/0"

PROCESSES = multiprocessing.get_context("forkserver")
"""Processes of their own that start fast: zarr is imported once, in the server they are forked from."""
PROCESSES.set_forkserver_preload(["zarr.codecs", "actstore.reader", "pytest"])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store that no test changes."""
    return write_store(tmp_path_factory.mktemp("store") / "store", SPEC)


@pytest.fixture
def own(path: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(path, tmp_path / "store"))


def flip_bit(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    file.write_bytes(data)


def files_of(store: Path) -> dict[str, bytes]:
    return {file.relative_to(store).as_posix(): file.read_bytes() for file in store.rglob("*") if file.is_file()}


# What was written is what is read


def test_each_row_read_back_is_the_one_computed_for_its_window_and_position(path: Path) -> None:
    store = ActivationStore(path)
    for part in ("train", "heldout"):
        seen: list[int] = []
        for shard in store.shards(part):
            window, position = (store.read(shard, f"rows/{name}").astype(np.int64) for name in ("window", "position"))
            ids = row_ids(shard.segment, part, window, position)
            rows = row_values(ids, SPEC.d_model)
            np.testing.assert_array_equal(store.read(shard, SITE), rows)
            np.testing.assert_array_equal(
                store.read(shard, "acts/resid_post.1"), decode_rows(encode_rows(rows, "bf16"), "bf16")
            )
            seen.extend(ids.tolist())
        expected = [
            int(row_ids(index, part, np.array(window), np.array(position)))
            for index in range(SPEC.n_segments)
            for window, kept in enumerate(build_segment(SPEC, index).kept_positions[part])
            for position in kept
        ]
        assert sorted(seen) == expected
        assert store.n_rows(part) == len(expected)


def test_chunks_are_the_shard_in_pieces(path: Path) -> None:
    store = ActivationStore(path)
    for shard in store.shards():
        chunks = [store.read_chunk(shard, SITE, chunk) for chunk in range(shard.n_chunks)]
        assert all(len(chunk) == SPEC.chunk_rows for chunk in chunks[:-1])
        np.testing.assert_array_equal(np.concatenate(chunks), store.read(shard, SITE))


def test_each_row_leads_to_its_token_and_its_document(path: Path) -> None:
    store = ActivationStore(path)
    for shard in store.shards() + store.shards("heldout"):
        tables = build_segment(SPEC, shard.segment).tables
        window, position = (store.read(shard, f"rows/{name}").astype(np.int64) for name in ("window", "position"))
        index = store.token_index(shard)
        np.testing.assert_array_equal(index, tables[f"{shard.part}/windows/token_start"][window] + position - 1)
        np.testing.assert_array_equal(store.token_ids(shard), tables["tokens/ids"][index])
        document = np.searchsorted(store.table(shard.segment, "documents/offsets"), index, side="right") - 1
        assert (store.table(shard.segment, "documents/heldout")[document] == (shard.part == "heldout")).all()
    assert store.document_names(1) == [f"document {i}" for i in range(SPEC.n_documents)]


def test_a_start_of_text_row_has_no_place_in_the_token_table(tmp_path: Path) -> None:
    spec = StoreSpec(n_documents=3)
    write_store(tmp_path / "store", spec, n_shards=0)
    segment = build_segment(spec, 0)
    arrays = shard_arrays(spec, segment, "train", 0)
    arrays["rows/position"][:2] = 0
    write_shard(tmp_path / "store", spec.manifest, segment.record, "train", 0, arrays)
    store = ActivationStore(tmp_path / "store", partial=True)
    (shard,) = store.shards()
    assert store.token_index(shard)[:2].tolist() == [-1, -1]
    assert store.token_ids(shard)[:2].tolist() == [BOS, BOS]


def test_moments_are_those_of_all_committed_rows(path: Path) -> None:
    store = ActivationStore(path)
    rows = np.concatenate([store.read(shard, SITE) for shard in store.shards()]).astype(np.float64)
    total, mean, second = store.moments("resid_post.0")
    assert total == len(rows)
    np.testing.assert_allclose(mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(second, np.square(rows).mean(0), rtol=1e-12)


def test_rows_of_nothing_but_zeros_are_written_too(tmp_path: Path) -> None:
    """Zarr leaves out chunks that hold only the fill value; what is left out has no checksum."""
    out = write_store(tmp_path / "store", StoreSpec(n_documents=5), n_shards=0)
    segment = build_segment(StoreSpec(n_documents=5), 0)
    zeros = {name: np.zeros_like(kept) for name, kept in shard_arrays(StoreSpec(n_documents=5), segment, "train", 0).items()}
    write_shard(out, StoreSpec(n_documents=5).manifest, segment.record, "train", 0, zeros)
    store = ActivationStore(out, partial=True)
    (shard,) = store.shards()
    assert not store.read(shard, SITE).any()
    flip_bit(out / SITE_SHARD, 0)
    with pytest.raises(DamagedStore):
        store.read(shard, SITE)


def test_a_short_last_shard_takes_no_more_space_than_its_chunks(path: Path) -> None:
    store = ActivationStore(path)
    for shard in store.shards():
        file = path / f"data.zarr/segments/{shard.segment:04d}/train/{SITE}/c/{shard.index}/0"
        chunks_bytes = shard.n_chunks * (SPEC.chunk_rows * SPEC.d_model * 4 + 4)
        index_bytes = SPEC.shard_rows // SPEC.chunk_rows * 16 + 4
        assert file.stat().st_size == chunks_bytes + index_bytes


def test_any_zarr_library_can_walk_the_store(path: Path) -> None:
    group = zarr.open_group(path / "data.zarr", mode="r")
    arrays = {name for name, member in group.members(max_depth=None) if isinstance(member, zarr.Array)}
    for segment in ("0000", "0001"):
        assert {f"segments/{segment}/{name}" for name in ("tokens/ids", "train/rows/window", f"heldout/{SITE}")} <= arrays


def test_no_shard_of_another_shape_or_dtype_is_written(own: Path) -> None:
    segment = build_segment(SPEC, 0)
    arrays = shard_arrays(SPEC, segment, "train", 0)
    for wrong in (arrays[SITE][:-1], arrays[SITE].astype(np.float64)):
        with pytest.raises(ValueError, match="is not shard 0's 256 rows"):
            write_shard(own, SPEC.manifest, segment.record, "train", 0, {**arrays, SITE: wrong})


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


# The manifest


def test_a_manifest_comes_back_from_json(path: Path) -> None:
    manifest = SPEC.manifest
    text = json.dumps(manifest.to_json())
    assert Manifest.from_json(json.loads(text), "here") == manifest
    assert Store(path).manifest.identity() == manifest.identity()
    assert Store(path).store_id == manifest.store_id


def test_a_segment_record_comes_back_from_json(path: Path) -> None:
    for record in read_segments(path):
        assert SegmentRecord.from_json(json.loads(json.dumps(record.to_json()))) == record


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
        ('"seed": 0', '"seed": 1', NotAStore, "was changed after it was written"),
        ('"made_by": "', '"made_by": "not ', NotAStore, "was changed after it was written"),
        ('"version": 1', '"version": 2', NotAStore, "format version 2, this program reads 1"),
        ('"format": "actstore"', '"format": "other"', NotAStore, "not an actstore manifest"),
        ("{", "", DamagedStore, r"manifest\.json: not readable as JSON"),
    ],
)
def test_a_manifest_edited_by_hand_is_refused(own: Path, old: str, new: str, error: type[Exception], message: str) -> None:
    file = own / "manifest.json"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    for opened in (lambda: Store(own), lambda: StoreWriter.open(own, SPEC.manifest, {})):
        with pytest.raises(error, match=message):
            opened()


# Who may write where


def test_the_same_identity_continues_and_changes_nothing_that_is_there(own: Path) -> None:
    before = files_of(own)
    write_store(own, SPEC)
    assert files_of(own) == before


def test_another_identity_is_refused_and_the_fields_are_named(own: Path) -> None:
    other = replace(SPEC, seed=5, sites=(("resid_post.0", "fp16"),))
    message = r"arrays: .*resid_post\.0 \(4 x float32, fp32\).* / .*resid_post\.0 \(4 x float16, fp16\); seed: 0 / 5;"
    with pytest.raises(IdentityMismatch, match=message):
        StoreWriter.open(own, other.manifest, {})
    with StoreWriter.open(own, SPEC.manifest, {}):
        pass  # the refusal let go of the lock


def test_a_published_segment_is_never_replaced(own: Path) -> None:
    segment = build_segment(SPEC, 1)
    with (
        StoreWriter.open(own, SPEC.manifest, {}) as writer,
        pytest.raises(ValueError, match="segment 1 is not the next one"),
    ):
        writer.add_segment(segment.record, segment.tables)
    assert Store(own).verify() == []


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_something_else_at_the_output_is_refused_and_left_alone(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "thesis"
    if kind == "folder":
        out.mkdir()
    content = out / "chapter.txt" if kind == "folder" else out
    content.write_text("years of work")
    with pytest.raises(OutputExists, match="exists and is not a store; choose another --out"):
        StoreWriter.open(out, SPEC.manifest, {})
    assert content.read_text() == "years of work"
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [content]


def test_an_unfinished_creation_and_an_empty_folder_are_continued(tmp_path: Path) -> None:
    spec = StoreSpec(n_documents=5)
    out = tmp_path / "store"
    out.mkdir()
    write_store(out, spec, n_shards=0)
    for record in ("manifest.json", "commits", "data.zarr"):
        (out / record).rename(tmp_path / record)
    (out / ".manifest.json.tmp").write_text("{")
    write_store(out, spec)
    assert ActivationStore(out).verify() == []


def test_a_store_that_another_process_writes_is_refused_and_a_killed_writer_is_no_trap(own: Path) -> None:
    here, there = multiprocessing.Pipe()
    process = PROCESSES.Process(target=write_and_hold, args=(own, SPEC, there))
    process.start()
    assert here.recv()
    with pytest.raises(LockedStore, match="another process is writing this store"):
        StoreWriter.open(own, SPEC.manifest, {})
    assert Store(own).verify() == []  # reading is never locked out
    process.kill()
    process.join()
    write_store(own, SPEC)


# Half-written stores


def test_only_committed_shards_are_there(tmp_path: Path) -> None:
    spec = StoreSpec(n_documents=30)
    write_store(tmp_path / "store", spec, n_shards=2)
    with pytest.raises(IncompleteStore, match="half-written, 2 of 5 shards are committed"):
        ActivationStore(tmp_path / "store")
    store = ActivationStore(tmp_path / "store", partial=True)
    committed = store.shards("heldout") + store.shards()
    assert [(shard.part, shard.index) for shard in committed] == [("heldout", 0), ("train", 0)]
    assert store.n_rows() == spec.shard_rows
    assert store.verify() == []
    snapshot = store.snapshot
    write_store(tmp_path / "store", spec)
    finished = ActivationStore(tmp_path / "store")
    assert finished.snapshot != snapshot
    assert store.snapshot == snapshot, "an open reader stays with the shards it saw"


def test_snapshots_of_different_stores_differ(path: Path, tmp_path: Path) -> None:
    other = write_store(tmp_path / "other", replace(SPEC, sites=(("resid_post.0", "fp32"),)))
    assert len(Store(other).shards()) == len(Store(path).shards())
    assert Store(other).snapshot != Store(path).snapshot


def test_a_finished_store_is_needed_to_seal_it(tmp_path: Path) -> None:
    write_store(tmp_path / "store", SPEC, n_shards=1)
    with StoreWriter.open(tmp_path / "store", SPEC.manifest, {}) as writer, pytest.raises(ValueError, match="not complete"):
        writer.seal(0)


def test_a_folder_that_is_no_store_or_one_of_another_kind_is_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(NotAStore, match=r"not a store \(no manifest\.json\)"):
        Store(tmp_path)

    class CodeStore(Store):
        kind = "codes"

    with pytest.raises(NotAStore, match="holds activations, codes are needed"):
        CodeStore(path)


# Damage


def test_a_sealed_store_without_a_commit_record_is_a_fault(own: Path) -> None:
    (own / "commits/0000/train/000001.json").unlink()
    for partial in (False, True):
        with pytest.raises(DamagedStore, match="segment 0 is sealed but the commit record of train shard 1 is missing"):
            ActivationStore(own, partial=partial)


@pytest.mark.parametrize("segment", ["0000", "0001"])
def test_a_sealed_store_without_a_segment_record_is_a_fault(own: Path, segment: str) -> None:
    (own / f"commits/{segment}/segment.json").unlink()
    for opened in (lambda: Store(own), lambda: write_store(own, SPEC)):
        with pytest.raises(DamagedStore, match=rf"commits/{segment}/segment\.json: missing"):
            opened()


def _remove(file: Path) -> None:
    file.unlink()


def _truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def _flip(file: Path) -> None:
    flip_bit(file, 12345)


@pytest.mark.parametrize("damage", [_remove, _truncate, _flip])
def test_a_damaged_shard_is_named_by_read_and_by_verify(own: Path, damage: Callable[[Path], None]) -> None:
    damage(own / SITE_SHARD)
    store = ActivationStore(own)
    shard, other = store.shards()[:2]
    with pytest.raises(DamagedStore, match=re.escape(SITE_SHARD)):
        store.read(shard, SITE)
    assert len(store.read(other, SITE)) == other.n_rows
    (fault,) = store.verify()
    assert fault.startswith(f"{SITE_SHARD}: ")


@pytest.mark.parametrize("damage", [_remove, _truncate, _flip])
@pytest.mark.parametrize("file", ["tokens/ids/c/0", "tokens/ids/zarr.json", "documents/source/c/0"])
def test_a_damaged_table_is_named_by_read_and_by_verify(own: Path, damage: Callable[[Path], None], file: str) -> None:
    name = f"data.zarr/segments/0001/{file}"
    damage(own / name)
    store = ActivationStore(own)
    with pytest.raises(DamagedStore, match=re.escape(name)):
        store.table(1, "/".join(file.split("/")[:2]))
    (fault,) = store.verify()
    assert fault.startswith(f"{name}: ")


def test_no_flipped_bit_goes_unseen(path: Path, tmp_path: Path) -> None:
    """Anywhere in any object: verify names it, and the rows it holds are not handed out. In a segment's record: the
    store does not open."""
    copy = Path(shutil.copytree(path, tmp_path / "copy"))
    names = sorted(dict(Store(path).objects()))

    @settings(max_examples=60, deadline=None)
    @given(name=st.sampled_from(names), bit=st.integers(0, 2**20))
    def flip_one(name: str, bit: int) -> None:
        whole = (copy / name).read_bytes()
        flip_bit(copy / name, bit)
        try:
            if name.endswith("segment.json"):
                with pytest.raises(DamagedStore, match=re.escape(name)):
                    ActivationStore(copy)
                return
            store = ActivationStore(copy)
            assert [fault.partition(": ")[0] for fault in store.verify()] == [name]
            parts = name.split("/")
            array = "/".join(parts[4 : parts.index("c")]) if "c" in parts else None
            if array in {row_array.name for row_array in SPEC.manifest.arrays}:
                damaged = next(
                    shard
                    for shard in store.shards(parts[3])
                    if shard.segment == int(parts[2]) and str(shard.index) == parts[parts.index("c") + 1]
                )
                with pytest.raises(DamagedStore, match=re.escape(name)):
                    store.read(damaged, array)
        finally:
            (copy / name).write_bytes(whole)

    flip_one()


def test_a_damaged_commit_record_is_named(own: Path) -> None:
    (own / "commits/0000/train/000000.json").write_text("{")
    store = ActivationStore(own)
    with pytest.raises(DamagedStore, match=r"commits/0000/train/000000\.json: 1 bytes"):
        store.read(store.shards()[0], SITE)


# kill -9

KILLED = StoreSpec(n_segments=2, n_documents=30, document_tokens=12)


def test_a_record_is_published_after_everything_it_names_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Objects and the folders that lead to them: so that a power cut leaves no record of what is not there."""
    flushed: set[int] = set()
    published: list[str] = []
    rename = os.replace

    def replace_after_check(source: Path, target: Path) -> None:
        if Path(target).parent.is_relative_to(tmp_path / "store/commits"):
            assert os.stat(source).st_ino in flushed
            for name in json.loads(Path(source).read_text()).get("objects", {}):
                file = tmp_path / "store" / name
                for path in (file, *file.parents[: len(Path(name).parents) - 1]):
                    assert path.stat().st_ino in flushed, path
            published.append(Path(target).name)
        rename(source, target)

    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.add(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(os, "replace", replace_after_check)
    write_store(tmp_path / "store", StoreSpec(n_documents=10))
    assert published == ["segment.json", "000000.json", "000000.json", "sealed.json"]


def test_a_writer_killed_at_any_moment_and_continued_ends_with_the_same_bytes(tmp_path: Path) -> None:
    expected = files_of(write_store(tmp_path / "uninterrupted", KILLED))
    moments = random.Random(0)
    out = tmp_path / "killed"
    progress = []
    while True:
        process = PROCESSES.Process(target=write_and_die, args=(out, KILLED, moments.randint(1, 900)))
        process.start()
        process.join()
        progress.append(len(list(out.glob("commits/**/*.json"))))
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        if (out / "manifest.json").exists():
            assert Store(out, partial=True).verify() == []

    assert progress == sorted(progress), "a kill takes nothing that was committed"
    assert len(set(progress)) > 3, "killed at too few stages to show anything"
    assert files_of(out) == expected
    assert ActivationStore(out).verify() == []


def test_the_same_bytes_are_written_in_any_order_of_shards(own: Path, path: Path) -> None:
    segment = build_segment(SPEC, 0)
    shards: list[tuple[str, int]] = [("heldout", 0), ("train", 2), ("train", 0), ("train", 1)]
    for part, shard in shards:
        (own / f"commits/0000/{part}/{shard:06d}.json").unlink()
        _truncate(own / f"data.zarr/segments/0000/{part}/{SITE}/c/{shard}/0")
        arrays: dict[str, Any] = shard_arrays(SPEC, segment, part, shard)
        write_shard(own, SPEC.manifest, segment.record, part, shard, arrays)
    assert files_of(own) == files_of(path)
