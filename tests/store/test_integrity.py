"""What `verify` and `repair` promise: no damage goes unseen or is read as data, and what is dropped comes back the same."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from storekit import StoreSpec, build_segment, files_of, flip_bit, shard_arrays, write_store

from actstore import paths
from actstore.errors import DamagedStore, IdentityMismatch, LockedStore, NotAStore
from actstore.files import record_bytes
from actstore.folder import Folder
from actstore.integrity import LEVELS, Inspection, find_faults, repair
from actstore.reader import ActivationStore
from actstore.records import Records
from actstore.schema import PARTS
from actstore.writer import StoreWriter

SPEC = StoreSpec(
    n_segments=2,
    n_documents=20,
    document_tokens=12,
    shard_rows=64,
    chunk_rows=16,
    d_model=6,
    sites=(("resid_post.0", "fp32"), ("resid_post.1", "bf16"), ("resid_post.2", "int8")),
)
FP32_SHARD = "data.zarr/segments/0000/train/acts/resid_post.0/c/{}/0"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store that no test changes."""
    return write_store(tmp_path_factory.mktemp("store") / "store", SPEC)


@pytest.fixture(scope="module")
def whole(path: Path) -> dict[str, bytes]:
    """Its files."""
    return files_of(path)


@pytest.fixture
def own(path: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(path, tmp_path / "store"))


def everything(path: Path) -> dict[str, bytes]:
    """All that can be read from a store, as bytes: identity, text, rows, statistics."""
    store = ActivationStore(path)
    values = {"snapshot": store.snapshot.encode(), "manifest": store.manifest.to_bytes(), **store.tokenizer_files()}
    for segment in store.segments:
        names = [name for name in segment.objects if name.endswith("/zarr.json") and "/c/" not in name]
        for name in names:
            table = name.removeprefix(paths.array(segment.index, "")).removesuffix("/zarr.json")
            if f"{name.removesuffix('zarr.json')}c/0" in segment.objects or table.startswith("channels/"):
                values[f"{segment.index}/{table}"] = store.table(segment.index, table).tobytes()
    for shard in (shard for part in PARTS for shard in store.shards(part)):
        for array in store.manifest.arrays:
            values[f"{shard}/{array.name}"] = store.read(shard, array.name).tobytes()
        values[f"{shard}/notes"] = repr(store.notes(shard)).encode()
    return values


@pytest.fixture(scope="module")
def values(path: Path) -> dict[str, bytes]:
    return everything(path)


# Any damage at all


@dataclass(frozen=True)
class Damage:
    """One thing done to one file; `at` chooses where in it."""

    kind: str
    name: str
    at: float

    def do(self, file: Path) -> None:
        n_bytes = file.stat().st_size
        if self.kind == "flipped":
            flip_bit(file, int(self.at * n_bytes * 8))
        elif self.kind == "truncated":
            os.truncate(file, int(self.at * n_bytes))
        else:
            file.unlink()


def damages(names: list[str], n_flipped: int, n_truncated: int, n_deleted: int) -> Iterator[Damage]:
    """Random ones; every file has its turn before one has a second."""
    rng = random.Random(0)
    for kind, n in {"flipped": n_flipped, "truncated": n_truncated, "deleted": n_deleted}.items():
        turns = [name for _ in range(-(-n // len(names))) for name in rng.sample(names, len(names))]
        yield from (Damage(kind, name, rng.random()) for name in turns[:n])


def outcome(own: Path, damage: Damage, whole: dict[str, bytes], values: dict[str, bytes]) -> str:
    """Damage a store, and demand that it is found, not read as data, and mended; how a reader took it."""
    damage.do(own / damage.name)
    assert damage.name in {fault.name for fault in find_faults(Folder(own))}, f"{damage}: not found"
    try:
        assert everything(own) == values, f"{damage}: read as data"
        reader = "read true"
    except (DamagedStore, NotAStore):
        reader = "refused"
    repair(Folder(own))
    write_store(own, SPEC)
    assert files_of(own) == whole, f"{damage}: not as it was"
    return reader


def run_damages(own: Path, whole: dict[str, bytes], values: dict[str, bytes], *numbers: int) -> Counter[tuple[str, str]]:
    names = sorted(name for name, data in whole.items() if data)
    return Counter((damage.kind, outcome(own, damage, whole, values)) for damage in damages(names, *numbers))


def test_damage_is_found_is_never_read_as_data_and_is_mended(
    own: Path, whole: dict[str, bytes], values: dict[str, bytes]
) -> None:
    found = run_damages(own, whole, values, 40, 10, 10)
    assert sum(found.values()) == 60
    assert found["flipped", "refused"] > found["flipped", "read true"]


@pytest.mark.slow
def test_300_flips_50_truncations_and_30_deletions_are_found_never_read_as_data_and_mended(
    own: Path, whole: dict[str, bytes], values: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    found = run_damages(own, whole, values, 300, 50, 30)
    with capsys.disabled():
        print(f"\n{len(whole) - 1} files, {sum(map(len, whole.values())):,} bytes")
        for kind, n in (("flipped", 300), ("truncated", 50), ("deleted", 30)):
            refused, true = found[kind, "refused"], found[kind, "read true"]
            assert refused + true == n
            print(
                f"{kind}: {n} done, {n} found; a reader of everything refused {refused} and read the same values in {true}"
            )
        print("repair and a second writing gave back the identical bytes of every file each time")


# Levels


def test_a_healthy_store_has_no_fault_at_any_level_and_progress_counts_its_bytes(
    path: Path, whole: dict[str, bytes]
) -> None:
    for level in LEVELS:
        told: list[int] = []
        inspection = Inspection(Folder(path))
        assert inspection.find(level, told.append) == []
        objects = [data for name, data in whole.items() if name.startswith(("data.zarr/", "tokenizer/"))]
        assert sum(told) == inspection.n_bytes == sum(map(len, objects))
        assert len(told) == len(objects), "each object is checked once"


class Watched(Folder):
    """Remembers which objects were read."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.seen: set[str] = set()

    def read(self, name: str) -> bytes:
        self.seen.add(name)
        return super().read(name)

    def read_into(self, name: str, start: int, *buffers: memoryview) -> int:
        self.seen.add(name)
        return super().read_into(name, start, *buffers)


@pytest.mark.parametrize("level", LEVELS)
def test_what_is_missing_or_too_short_is_found_at_every_level(own: Path, level: str) -> None:
    missing = [
        "data.zarr/segments/0000/train/rows/window/c/1",
        "data.zarr/segments/0001/tokens/ids/c/0",
        "data.zarr/zarr.json",
    ]
    short = [FP32_SHARD.format(0), "data.zarr/segments/0000/heldout/windows/n_tokens/c/0", "tokenizer/tokenizer.json"]
    for name in missing:
        (own / name).unlink()
    for name in short:
        os.truncate(own / name, (own / name).stat().st_size - 1)
    place = Watched(own)
    found = {fault.name: fault.what for fault in find_faults(place, level)}
    assert set(found) == {*missing, *short}
    assert {found[name] for name in missing} == {"missing"}
    assert all(re.fullmatch(r"[\d,]+ bytes, [\d,]+ were committed", found[name]) for name in short)
    if level == "meta":
        assert all(name == paths.MANIFEST or name.startswith(f"{paths.COMMITS}/") for name in place.seen), "no data is read"


def test_meta_reads_no_data_and_so_finds_no_flip_in_it(own: Path) -> None:
    flip_bit(own / FP32_SHARD.format(0), 100)
    place = Watched(own)
    assert find_faults(place, "meta") == []
    assert not any(name.startswith(("data.zarr/", "tokenizer/")) for name in place.seen)


def test_crc_finds_every_flip_inside_a_shards_chunks_and_index(own: Path, whole: dict[str, bytes]) -> None:
    """The first, a middle and the last byte of every chunk, of its checksum, of the index and of that's checksum."""
    arrays = {array.name: array for array in SPEC.manifest.arrays}
    for array in arrays.values():
        name = paths.shard_object(0, "train", array.name, 0, 1 + len(array.tail))
        data = whole[name]
        inspection = Inspection(Folder(own))
        inspection.checks = [check for check in inspection.checks if check.name == name]
        assert inspection.find("crc", int) == []
        index = np.frombuffer(data[-(16 * 4 + 4) : -4], "<u8").reshape(-1, 2)
        assert len(index) == SPEC.shard_rows // SPEC.chunk_rows
        edges = [*index[:, 0], *(index.sum(axis=1) - 4), *(index.sum(axis=1) - 1), len(data) - 4, len(data) - 1]
        middles = [*(index[:, 0] + index[:, 1] // 2), *range(len(data) - 68, len(data) - 4, 7)]
        for byte in [*map(int, edges), *map(int, middles)]:
            flip_bit(own / name, 8 * byte + byte % 8)
            assert [fault.name for fault in inspection.find("crc", int)] == [name], byte
            (own / name).write_bytes(data)


@pytest.mark.parametrize("level", ["crc", "full"])
def test_a_flip_in_a_table_is_found_by_crc_too(own: Path, level: str) -> None:
    names = ["data.zarr/segments/0001/channels/resid_post.2/c/0/0", "data.zarr/segments/0000/documents/offsets/zarr.json"]
    for name in names:
        flip_bit(own / name, 77)
    assert {fault.name for fault in find_faults(Folder(own), level)} == set(names)


@pytest.mark.parametrize("level", ["crc", "full"])
def test_a_shard_with_another_ones_bytes_is_found_and_never_read(own: Path, level: str) -> None:
    """Every checksum inside it matches; its record alone tells which chunks were committed."""
    first, second = (own / FP32_SHARD.format(shard) for shard in (0, 1))
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    for shard in ActivationStore(own).shards()[:2]:
        with pytest.raises(DamagedStore, match="another chunk lies there: its crc32c is"):
            ActivationStore(own).read(shard, "acts/resid_post.0")
    faults = find_faults(Folder(own), level)
    assert [(fault.name, fault.shard) for fault in faults] == [
        (FP32_SHARD.format(0), (0, "train", 0)),
        (FP32_SHARD.format(1), (0, "train", 1)),
    ]
    said = {"crc": r"another chunk .* [0-9a-f]{8}, [0-9a-f]{8} was", "full": r"sha256 [0-9a-f]{12}, [0-9a-f]{12} was"}
    assert all(re.fullmatch(f"{said[level]} committed", fault.what) for fault in faults)


# What a fault says


def test_a_fault_names_segment_split_shard_and_array(own: Path) -> None:
    flip_bit(own / "data.zarr/segments/0001/heldout/acts/resid_post.2/c/0/0", 9)
    flip_bit(own / "data.zarr/segments/0001/documents/source/c/0", 9)
    (own / "commits/0000/train/000001.json").unlink()
    lines = sorted(str(fault) for fault in find_faults(Folder(own), "crc"))
    assert lines[0].startswith("data.zarr/segments/0001/documents/source/c/0: sha256 ")
    assert lines[1] == "segment 0, train shard 1: commits/0000/train/000001.json: missing"
    assert lines[2] == (
        "segment 1, heldout shard 0: data.zarr/segments/0001/heldout/acts/resid_post.2/c/0/0: "
        "the crc32c of a chunk does not match"
    )
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("manifest.json", "missing"),
        ("commits/0000/segment.json", "missing"),
        ("commits/0001/sealed.json", "missing, though every shard is committed"),
        ("commits/0001/heldout/000000.json", "missing"),
    ],
)
def test_a_record_that_is_gone_is_missed(own: Path, name: str, what: str) -> None:
    (own / name).unlink()
    (fault,) = find_faults(Folder(own))
    assert (fault.name, fault.what) == (name, what)


def test_a_record_that_was_exchanged_is_noticed_though_it_is_a_good_one(own: Path) -> None:
    """A shard's record by another's, a segment's by one of other text, the manifest by one with other notes."""
    shards = [own / f"commits/0000/train/{shard:06d}.json" for shard in (0, 1)]
    first = shards[0].read_bytes()
    shards[0].write_bytes(shards[1].read_bytes())
    shards[1].write_bytes(first)
    segment = Records(Folder(own)).segments[1]
    (own / "commits/0001/segment.json").write_bytes(replace(segment, first_document=0).to_bytes())
    (own / "manifest.json").write_bytes(replace(SPEC.manifest, provenance={"tokenizer_files": {}}).to_bytes())
    assert {fault.name: fault.what for fault in find_faults(Folder(own), "meta")} == {
        "manifest.json": "is not the manifest that was sealed",
        "commits/0000/train/000000.json": "is not the record that was sealed",
        "commits/0000/train/000001.json": "is not the record that was sealed",
        "commits/0001/segment.json": "is not the record that was sealed",
    }


def test_before_a_segment_is_sealed_exchanged_records_are_noticed_by_what_they_say(tmp_path: Path) -> None:
    own = write_store(tmp_path / "store", SPEC, n_shards=2)
    records = [own / f"commits/0000/train/{shard:06d}.json" for shard in (0, 1)]
    contents = [record.read_bytes() for record in records]
    for record, content in zip(records, reversed(contents), strict=True):
        record.write_bytes(content)
    assert [(fault.name, fault.what) for fault in find_faults(Folder(own), "meta")] == [
        (f"commits/0000/train/{shard:06d}.json", "is of another shard") for shard in (0, 1)
    ]


def test_the_same_number_written_otherwise_is_a_change(tmp_path: Path) -> None:
    """A flipped bit makes 1e-05 1E-05, or the last of 17 digits another that rounds to the same number."""
    own = write_store(tmp_path / "store", SPEC, n_shards=1)
    record = own / "commits/0000/train/000000.json"
    plain = json.loads(record.read_bytes())
    del plain["content_sha256"]
    for value, other in ((1e-05, b"1E-05"), (0.30000000000000004, b"0.30000000000000005")):
        plain["stats"]["resid_post.0"]["mean_norm"] = value
        data = record_bytes(plain)
        assert repr(value).encode() in data
        record.write_bytes(data.replace(repr(value).encode(), other))
        assert [fault.what for fault in find_faults(Folder(own), "meta")] == ["was changed after it was written"]
        record.write_bytes(data)
        assert find_faults(Folder(own), "meta") == []


def test_what_the_disk_does_not_give_is_a_fault_and_no_failure(own: Path) -> None:
    class Broken(Folder):
        bad = ("manifest.json", "commits/0000/segment.json", "commits/0001/sealed.json", FP32_SHARD.format(0))

        def read(self, name: str) -> bytes:
            self.fail(name)
            return super().read(name)

        def read_into(self, name: str, start: int, *buffers: memoryview) -> int:
            self.fail(name)
            return super().read_into(name, start, *buffers)

        def fail(self, name: str) -> None:
            if name in self.bad:
                raise OSError(errno.EIO, "Input/output error")

    faults = find_faults(Broken(own))
    assert {fault.name for fault in faults} == set(Broken.bad)
    assert all("Input/output error" in fault.what for fault in faults)


def test_files_that_are_no_part_of_a_store_are_no_faults(own: Path) -> None:
    for name in ("commits/.DS_Store", "commits/notes/readme.txt", ".DS_Store", "data.zarr/segments/thumbs.db"):
        (own / name).parent.mkdir(exist_ok=True)
        (own / name).write_text("put there by a file browser")
    assert find_faults(Folder(own)) == []
    assert ActivationStore(own).n_rows() > 0


def test_a_half_written_store_has_no_faults(tmp_path: Path) -> None:
    for _ in range(6):
        own = write_store(tmp_path / "store", SPEC, n_shards=1)
        assert find_faults(Folder(own)) == []
    assert len(ActivationStore(own, partial=True).shards()) >= 4


def test_what_segments_share_is_one_fault_when_it_is_damaged(own: Path, whole: dict[str, bytes]) -> None:
    """The groups above them are named by each."""
    flip_bit(own / "data.zarr/segments/zarr.json", 50)
    assert [fault.name for fault in find_faults(Folder(own))] == ["data.zarr/segments/zarr.json"]
    assert repair(Folder(own)).dropped == ["data.zarr/segments/zarr.json"]
    write_store(own, SPEC)
    assert files_of(own) == whole


# Repair


@pytest.mark.parametrize("name", ["manifest.json", "commits/0000/segment.json", "commits/0001/segment.json"])
@pytest.mark.parametrize("damage", [lambda file: flip_bit(file, 321), lambda file: os.truncate(file, 5), Path.unlink])
def test_a_record_that_the_seal_has_a_copy_of_is_put_back_and_nothing_else_is_done(
    own: Path, whole: dict[str, bytes], name: str, damage: Callable[[Path], None]
) -> None:
    damage(own / name)
    done = repair(Folder(own))
    assert (done.restored, done.dropped, done.shards) == ([name], [], [])
    assert files_of(own) == whole


def test_a_damaged_shard_alone_is_computed_again(own: Path, whole: dict[str, bytes]) -> None:
    """Whatever is wrong with it, all its arrays are dropped with its record; no other file is touched."""
    before = {name: (own / name).stat().st_mtime_ns for name in whole}
    flip_bit(own / FP32_SHARD.format(1), 99)
    (own / "data.zarr/segments/0001/heldout/rows/position/c/0").unlink()
    done = repair(Folder(own))
    assert done.shards == [(0, "train", 1), (1, "heldout", 0)]
    assert done.restored == []
    n_objects = len(SPEC.manifest.arrays) + 1
    assert len(done.dropped) == 2 * n_objects - 1, "one was gone already"
    assert not (own / "commits/0000/sealed.json").exists()
    assert find_faults(Folder(own)) == [], "the rest is whole, and what was dropped is not yet there"
    write_store(own, SPEC)
    assert files_of(own) == whole
    after = {name: (own / name).stat().st_mtime_ns for name in whole}
    expected = {*done.dropped, "data.zarr/segments/0001/heldout/rows/position/c/0"}
    expected |= {f"commits/{segment}/sealed.json" for segment in ("0000", "0001")}
    assert {name for name in whole if after[name] != before[name]} == expected


def test_a_damaged_table_is_made_again_from_the_same_text(own: Path, whole: dict[str, bytes]) -> None:
    name = "data.zarr/segments/0001/tokens/ids/c/0"
    flip_bit(own / name, 99)
    done = repair(Folder(own))
    assert (done.restored, done.dropped, done.shards) == ([], [name], [])
    with pytest.raises(DamagedStore, match="cannot be made again, since its source is no longer the same"):
        restore_from(own, replace(SPEC, n_documents=21))
    write_store(own, SPEC)
    assert files_of(own) == whole


def restore_from(own: Path, other: StoreSpec) -> None:
    with StoreWriter.open(own, SPEC.manifest, {}) as writer:
        writer.restore_segment(writer.segments()[1], build_segment(other, 1).tables)


def test_a_damaged_seal_is_dropped_and_put_again_by_the_next_writer(own: Path, whole: dict[str, bytes]) -> None:
    flip_bit(own / "commits/0000/sealed.json", 4000)
    done = repair(Folder(own))
    assert (done.dropped, done.shards) == (["commits/0000/sealed.json"], [])
    write_store(own, SPEC)
    assert files_of(own) == whole


def test_a_tokenizer_file_is_put_again_by_the_next_writer(own: Path, whole: dict[str, bytes]) -> None:
    flip_bit(own / "tokenizer/tokenizer.json", 3)
    assert repair(Folder(own)).dropped == ["tokenizer/tokenizer.json"]
    write_store(own, SPEC)
    assert files_of(own) == whole


def test_many_faults_at_once_are_mended_at_once(own: Path, whole: dict[str, bytes]) -> None:
    for name in (
        "manifest.json",
        "commits/0001/segment.json",
        FP32_SHARD.format(0),
        "data.zarr/segments/0001/tokens/ids/c/0",
    ):
        flip_bit(own / name, 1234)
    for name in ("tokenizer/tokenizer.json", "commits/0000/train/000001.json", "data.zarr/segments/zarr.json"):
        (own / name).unlink()
    repair(Folder(own))
    write_store(own, SPEC)
    assert files_of(own) == whole


@pytest.mark.parametrize("level", LEVELS)
def test_repair_of_a_healthy_store_changes_nothing(own: Path, level: str) -> None:
    def state() -> dict[str, tuple[int, int, int]]:
        statuses = {str(file): file.stat() for file in own.rglob("*")}
        return {name: (status.st_ino, status.st_mtime_ns, status.st_size) for name, status in statuses.items()}

    before = state()
    done = repair(Folder(own), level)
    assert (done.restored, done.dropped, done.shards) == ([], [], [])
    assert state() == before


def test_repair_is_refused_while_a_writer_lives(own: Path) -> None:
    flip_bit(own / FP32_SHARD.format(0), 99)
    damaged = files_of(own)
    with StoreWriter.open(own, SPEC.manifest, {}), pytest.raises(LockedStore, match="another process is writing there"):
        repair(Folder(own))
    assert files_of(own) == damaged
    assert repair(Folder(own)).shards == [(0, "train", 0)]


@pytest.mark.parametrize(
    "name",
    [
        "manifest.json",
        "commits/0000/segment.json",
        "commits/0000/train/000001.json",
        FP32_SHARD.format(0),
        "data.zarr/segments/0000/documents/heldout/c/0",
        "tokenizer/tokenizer.json",
    ],
)
@pytest.mark.parametrize("n_shards", [2, 3])
def test_a_store_that_is_not_sealed_is_mended_too(tmp_path: Path, whole: dict[str, bytes], name: str, n_shards: int) -> None:
    own = write_store(tmp_path / "store", SPEC, n_shards=n_shards)
    flip_bit(own / name, 200)
    assert name in {fault.name for fault in find_faults(Folder(own))}
    repair(Folder(own))
    write_store(own, SPEC)
    assert files_of(own) == whole


def test_a_lost_segment_record_is_made_again_around_the_shards_that_are_there(
    tmp_path: Path, whole: dict[str, bytes]
) -> None:
    own = write_store(tmp_path / "store", SPEC, n_shards=2)
    (own / "commits/0000/segment.json").unlink()
    (fault,) = find_faults(Folder(own))
    assert (fault.name, fault.what) == ("commits/0000/segment.json", "missing, though shards of the segment are committed")
    before = {shard: (own / FP32_SHARD.format(shard)).stat().st_mtime_ns for shard in (0, 1)}
    with pytest.raises(IdentityMismatch, match="segment 0 has shards of other text"):
        write_store(own, replace(SPEC, document_tokens=12, n_documents=20, chunk_rows=32))
    write_store(own, SPEC)
    assert before == {shard: (own / FP32_SHARD.format(shard)).stat().st_mtime_ns for shard in (0, 1)}
    assert files_of(own) == whole


def test_a_note_of_mixed_hardware_is_sealed_and_its_loss_noticed(tmp_path: Path) -> None:
    own = write_store(tmp_path / "store", SPEC, n_shards=2)
    name = paths.environment_record(0, "0123abcd")
    Folder(own).create(name, record_bytes({"cpu": "another"}))
    flip_bit(own / name, 60)
    assert [fault.name for fault in find_faults(Folder(own))] == [name]
    flip_bit(own / name, 60)
    write_store(own, SPEC)
    assert find_faults(Folder(own)) == []
    (own / name).unlink()
    assert [(fault.name, fault.what) for fault in find_faults(Folder(own))] == [(name, "missing")]
    repair(Folder(own))
    write_store(own, SPEC)
    assert find_faults(Folder(own)) == []


def test_shards_computed_again_are_what_they_were(own: Path) -> None:
    """`repair` never computes: what it drops is not yet there, and its shard arrays are asked for again."""
    flip_bit(own / FP32_SHARD.format(0), 99)
    repair(Folder(own))
    with StoreWriter.open(own, SPEC.manifest, {}) as writer:
        assert writer.missing_shards(writer.segments()[0]) == [("train", 0)]
        assert writer.missing_shards(writer.segments()[1]) == []
    rows = shard_arrays(SPEC, build_segment(SPEC, 0), "train", 0)[0]["acts/resid_post.0"]
    write_store(own, SPEC)
    store = ActivationStore(own)
    np.testing.assert_array_equal(store.read(store.shards()[0], "acts/resid_post.0"), rows)
