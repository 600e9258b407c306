"""What `recode` promises: the copy that collecting in the other encoding would have made, and what it costs."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import storekit
from forkkit import PROCESSES
from storekit import StoreSpec, build_segment, files_of, flip_bit, recode_and_die, write_store

from actstore.encodings.channels import CHANNEL_WINDOWS, Channels
from actstore.encodings.registry import encoding_of
from actstore.errors import DamagedStore, EncodingError, IdentityMismatch, IncompleteStore, NoSpace, NotAStore, OutputExists
from actstore.folder import Folder
from actstore.integrity import find_faults, repair
from actstore.reader import ActivationStore, Shard
from actstore.recode import recode_store
from actstore.schema import PARTS

SITES = ("resid_post.0", "resid_post.1")
SPEC = StoreSpec(
    n_segments=2,
    n_documents=150,
    document_tokens=40,
    shard_rows=1024,
    chunk_rows=128,
    d_model=5,
    sites=tuple((site, "fp32") for site in SITES),
)
"""More windows than those that int8 takes its channels from."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An fp32 store that no test changes."""
    return write_store(tmp_path_factory.mktemp("store") / "store", SPEC)


@pytest.fixture(scope="module")
def recoded(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """The store in another encoding and what was reported of it; made once each."""
    folder, made = tmp_path_factory.mktemp("recoded"), {}

    def make(encoding: str) -> tuple[Path, dict[str, Any]]:
        if encoding not in made:
            made[encoding] = recode_store(path, folder / encoding, encoding)
        return folder / encoding, made[encoding]

    return make


Recoded = Callable[[str], tuple[Path, dict[str, Any]]]


def all_shards(store: ActivationStore) -> list[Shard]:
    return [shard for part in PARTS for shard in store.shards(part)]


def all_rows(store: ActivationStore, site: str) -> np.ndarray:
    return np.concatenate([store.read(shard, f"acts/{site}") for shard in all_shards(store)]).astype(np.float64)


def first_channels(store: ActivationStore, segment: int, site: str) -> Channels:
    """Mean and deviation of the rows of the plan's first 256 training windows, by looking each row's window up."""
    first = build_segment(SPEC, segment).plans["train"].window_order[:CHANNEL_WINDOWS]
    shards = [shard for shard in store.shards() if shard.segment == segment]
    rows = np.concatenate([store.read(shard, f"acts/{site}") for shard in shards]).astype(np.float64)
    chosen = rows[np.isin(np.concatenate([store.read(shard, "rows/window") for shard in shards]), first)]
    assert len(chosen) < len(rows)
    return Channels(chosen.mean(axis=0).astype(np.float32), chosen.std(axis=0).astype(np.float32))


# The copy


@pytest.mark.parametrize("encoding", ["fp32", "fp16", "bf16", "int8"])
def test_each_row_is_the_one_that_encoding_it_gives(path: Path, recoded: Recoded, encoding: str) -> None:
    source, copy = ActivationStore(path), ActivationStore(recoded(encoding)[0])
    for site in SITES:
        channels = {segment: first_channels(source, segment, site) for segment in range(SPEC.n_segments)}
        for shard, of_copy in zip(all_shards(source), all_shards(copy), strict=True):
            assert of_copy == shard
            own = copy.channels(shard.segment, f"acts/{site}") if encoding == "int8" else None
            kept, scale = encoding_of(encoding).encode(source.read(shard, f"acts/{site}"), own)
            np.testing.assert_array_equal(copy.read(shard, f"acts/{site}"), encoding_of(encoding).decode(kept, scale, own))
            if own is not None:
                np.testing.assert_allclose(own.table, channels[shard.segment].table, rtol=1e-5)


@pytest.mark.parametrize("encoding", ["fp32", "fp16", "bf16"])
def test_from_fp32_the_copy_is_the_store_that_collecting_so_would_have_made(
    tmp_path: Path, recoded: Recoded, encoding: str
) -> None:
    """To the byte, but for the note of where it was copied from, and the copies of that note in the seals."""
    direct = write_store(tmp_path / "direct", replace(SPEC, sites=tuple((site, encoding) for site in SITES)))
    assert_same_store(recoded(encoding)[0], direct)


def test_from_fp32_the_int8_copy_is_the_one_that_collecting_so_would_have_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = replace(SPEC, n_segments=1)
    source = write_store(tmp_path / "source", spec)
    recode_store(source, tmp_path / "copy", "int8")
    channels = ActivationStore(tmp_path / "copy").channels(0, f"acts/{SITES[0]}")
    monkeypatch.setattr(storekit, "CHANNELS", lambda d_model: channels)
    direct = write_store(tmp_path / "direct", replace(spec, sites=tuple((site, "int8") for site in SITES)))
    assert_same_store(tmp_path / "copy", direct)


def assert_same_store(copy: Path, direct: Path) -> None:
    assert ActivationStore(copy).store_id == ActivationStore(direct).store_id
    found, expected = files_of(copy), files_of(direct)
    assert found.keys() == expected.keys()
    noting = {"manifest.json", *(name for name in found if name.endswith("sealed.json"))}
    assert {name for name in found if found[name] != expected[name]} == noting
    assert find_faults(Folder(copy)) == []


def test_the_text_the_plan_and_the_statistics_are_those_of_the_source(path: Path, recoded: Recoded) -> None:
    source, copy = ActivationStore(path), ActivationStore(recoded("int8")[0])
    for segment in range(SPEC.n_segments):
        for name in build_segment(SPEC, segment).tables:
            np.testing.assert_array_equal(copy.table(segment, name), source.table(segment, name))
    for shard in all_shards(source):
        for name in ("rows/window", "rows/position"):
            np.testing.assert_array_equal(copy.read(shard, name), source.read(shard, name))
        assert copy.notes(shard) == source.notes(shard)
    assert copy.tokenizer_files() == source.tokenizer_files()
    assert copy.locate(1234) == source.locate(1234)


# What is reported


@pytest.mark.parametrize("encoding", ["fp32", "fp16", "bf16", "int8"])
def test_the_reported_errors_are_the_measured_ones(path: Path, recoded: Recoded, encoding: str) -> None:
    source, (out, report) = ActivationStore(path), recoded(encoding)
    copy = ActivationStore(out)
    for site in SITES:
        rows, back = all_rows(source, site), all_rows(copy, site)
        mean = (
            np.concatenate([source.read(shard, f"acts/{site}") for shard in source.shards()]).astype(np.float64).mean(axis=0)
        )
        expected = np.square(rows - back).sum() / np.square(rows - mean).sum()
        np.testing.assert_allclose(report["unexplained"][site], expected, rtol=1e-6)
    assert (report["unexplained"][SITES[0]] == 0) == (encoding == "fp32")
    assert report["rows"] == source.n_rows() + source.n_rows("heldout")
    assert report["disk_bytes"] == sum(map(len, files_of(out).values()))
    assert report["of_the_source"] == report["disk_bytes"] / sum(map(len, files_of(path).values()))
    assert (report["store"], report["store_id"]) == (str(out), copy.store_id)


def test_progress_counts_the_rows_that_are_written(path: Path, tmp_path: Path) -> None:
    done: list[int] = []
    expected: list[int] = []
    report = recode_store(path, tmp_path / "copy", "fp16", done.append, expected.append)
    assert sum(done) == sum(expected) == report["rows"]
    again = recode_store(path, tmp_path / "copy", "fp16", done.append, expected.append)
    assert sum(done) == sum(expected) == report["rows"], "nothing is written twice"
    assert again == {**report, "unexplained": {}}


# Going on


class Stop(Exception):
    """What ends a recoding in the middle."""


@pytest.mark.parametrize("encoding", ["bf16", "int8"])
def test_an_interrupted_recoding_goes_on_to_the_same_bytes(
    path: Path, recoded: Recoded, tmp_path: Path, encoding: str
) -> None:
    def stop_after(n_shards: int) -> Callable[[int], None]:
        left = iter(range(n_shards - 1))

        def advance(_: int) -> None:
            if next(left, None) is None:
                raise Stop

        return advance

    for n_shards in (1, 2, 1):
        with pytest.raises(Stop):
            recode_store(path, tmp_path / "copy", encoding, stop_after(n_shards))
    with pytest.raises(IncompleteStore, match="half-written"):
        ActivationStore(tmp_path / "copy")
    report = recode_store(path, tmp_path / "copy", encoding)
    assert files_of(tmp_path / "copy") == files_of(recoded(encoding)[0])
    assert set(report["unexplained"]) == set(SITES)


def test_a_recoding_killed_at_any_moment_goes_on_to_the_same_bytes(path: Path, recoded: Recoded, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    exits = []
    for n_operations in (3, 40, 90, 60, 130, 10**9):
        process = PROCESSES.Process(target=recode_and_die, args=(path, out, "int8", n_operations))
        process.start()
        process.join()
        exits.append(process.exitcode)
        if (out / "manifest.json").exists():
            assert {fault.what for fault in find_faults(Folder(out))} <= {"missing, though every shard is committed"}
    assert exits == [-signal.SIGKILL] * 5 + [0]
    assert files_of(out) == files_of(recoded("int8")[0])


def test_the_copy_of_a_store_that_has_grown_grows_by_the_new_segment_alone(recoded: Recoded, tmp_path: Path) -> None:
    source = write_store(tmp_path / "source", replace(SPEC, n_segments=1))
    recode_store(source, tmp_path / "copy", "int8")
    before = {name: (tmp_path / "copy" / name).stat().st_mtime_ns for name in files_of(tmp_path / "copy")}
    write_store(source, SPEC)
    recode_store(source, tmp_path / "copy", "int8")
    expected = files_of(recoded("int8")[0])
    noting = {"manifest.json", *(name for name in expected if name.endswith("sealed.json"))}
    found = files_of(tmp_path / "copy")
    assert {name: data for name, data in found.items() if name not in noting} == {
        name: data for name, data in expected.items() if name not in noting
    }
    shared = {"data.zarr/zarr.json", "data.zarr/segments/zarr.json"}
    for name, changed in before.items():
        assert name in shared or (tmp_path / "copy" / name).stat().st_mtime_ns == changed, name


def test_a_repaired_copy_is_filled_in_again(path: Path, recoded: Recoded, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(recoded("int8")[0], tmp_path / "copy"))
    before = files_of(copy)
    for name in (
        f"data.zarr/segments/0000/train/scales/{SITES[1]}/c/1",
        f"data.zarr/segments/0001/channels/{SITES[0]}/c/0/0",
        "manifest.json",
    ):
        flip_bit(copy / name, 1000)
    repair(Folder(copy))
    recode_store(path, copy, "int8")
    assert files_of(copy) == before


# What the copy is


@pytest.mark.parametrize(("first", "second"), [("fp16", "int8"), ("bf16", "fp32"), ("int8", "fp16"), ("int8", "int8")])
def test_a_copy_of_what_was_rounded_names_its_source(recoded: Recoded, tmp_path: Path, first: str, second: str) -> None:
    """Its rows are not those that collecting in that encoding gives, and so it is another store."""
    source = ActivationStore(recoded(first)[0])
    recode_store(source.url, tmp_path / "copy", second)
    copy = ActivationStore(tmp_path / "copy")
    assert copy.manifest.source == {"store_id": source.store_id}
    assert copy.store_id != ActivationStore(recoded(second)[0]).store_id
    for shard in all_shards(source):
        channels = copy.channels(shard.segment, f"acts/{SITES[0]}") if second == "int8" else None
        kept, scale = encoding_of(second).encode(source.read(shard, f"acts/{SITES[0]}"), channels)
        np.testing.assert_array_equal(
            copy.read(shard, f"acts/{SITES[0]}"), encoding_of(second).decode(kept, scale, channels)
        )


def test_a_copy_of_a_copy_of_what_was_rounded_is_still_no_original(recoded: Recoded, tmp_path: Path) -> None:
    recode_store(recoded("bf16")[0], tmp_path / "fp32", "fp32")
    recode_store(tmp_path / "fp32", tmp_path / "fp16", "fp16")
    assert ActivationStore(tmp_path / "fp16").manifest.source == {"store_id": ActivationStore(tmp_path / "fp32").store_id}
    assert ActivationStore(tmp_path / "fp16").store_id != ActivationStore(recoded("fp16")[0]).store_id


# What is refused


def test_another_store_at_the_output_is_refused_and_left_alone(path: Path, recoded: Recoded, tmp_path: Path) -> None:
    out = Path(shutil.copytree(recoded("bf16")[0], tmp_path / "copy"))
    before = files_of(out)
    with pytest.raises(IdentityMismatch, match=r"holds another store .*arrays: .*bf16.*int8"):
        recode_store(path, out, "int8")
    assert files_of(out) == before


def test_something_else_at_the_output_is_refused_and_left_alone(path: Path, tmp_path: Path) -> None:
    (tmp_path / "chapter.txt").write_text("years of work")
    with pytest.raises(OutputExists, match="exists and is not a store"):
        recode_store(path, tmp_path, "int8")
    assert files_of(tmp_path) == {"chapter.txt": b"years of work"}


def test_a_store_is_never_recoded_into_itself(recoded: Recoded, tmp_path: Path) -> None:
    out = Path(shutil.copytree(recoded("fp16")[0], tmp_path / "copy"))
    before = files_of(out)
    for encoding in ("int8", "fp16"):
        with pytest.raises(IdentityMismatch, match="holds another store"):
            recode_store(out, out, encoding)
    assert files_of(out) == before


def test_a_source_that_is_no_whole_activation_store_is_refused(path: Path, tmp_path: Path) -> None:
    partial = write_store(tmp_path / "partial", SPEC, n_shards=3)
    damaged = Path(shutil.copytree(path, tmp_path / "damaged"))
    (damaged / "commits/0000/sealed.json").write_text("{")
    cases: list[tuple[Path, type[Exception]]] = [
        (partial, IncompleteStore),
        (damaged, DamagedStore),
        (tmp_path / "nothing", NotAStore),
    ]
    for source, error in cases:
        with pytest.raises(error):
            recode_store(source, tmp_path / "copy", "int8")
    assert not (tmp_path / "copy").exists()


def test_damaged_rows_of_the_source_are_not_copied(path: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(path, tmp_path / "source"))
    damaged = f"data.zarr/segments/0000/train/acts/{SITES[1]}/c/1/0"
    flip_bit(source / damaged, 54321)
    with pytest.raises(DamagedStore, match=damaged):
        recode_store(source, tmp_path / "copy", "bf16")
    (source / damaged).write_bytes((path / damaged).read_bytes())
    recode_store(source, tmp_path / "copy", "bf16")
    assert find_faults(Folder(tmp_path / "copy")) == []


def test_a_value_that_does_not_fit_is_named_with_its_site_document_and_position(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = replace(SPEC, n_segments=1, n_documents=20, sites=((SITES[0], "fp32"),))

    def too_large(ids: np.ndarray, d_model: int) -> np.ndarray:
        rows = np.zeros((len(ids), d_model), np.float32)
        rows[ids == 16 * 30 + 7, 3] = 1e5  # window 30, position 7
        return rows

    monkeypatch.setattr(storekit, "row_values", too_large)
    source = write_store(tmp_path / "source", spec)
    token = int(ActivationStore(source).table(0, "train/windows/token_start")[30]) + 6
    offsets = ActivationStore(source).table(0, "documents/offsets")
    document = int(np.searchsorted(offsets, token, side="right")) - 1
    message = (
        f"^{SITES[0]}: document {document}, token {token} of the segment's table, position 7 of its window: "
        "value 100000.0 in channel 3 does not fit fp16; bf16 keeps"
    )
    with pytest.raises(EncodingError, match=message):
        recode_store(source, tmp_path / "copy", "fp16")


def test_a_disk_too_small_for_what_is_still_to_be_written_is_refused_first(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def require_space(place: Folder, needed_bytes: int, what: str) -> None:
        asked.append(needed_bytes)
        if len(asked) == 1:
            raise NoSpace(what)

    monkeypatch.setattr(Folder, "require_space", require_space)
    with pytest.raises(NoSpace, match=f"fp16 of {path}"):
        recode_store(path, tmp_path / "copy", "fp16")
    assert not (tmp_path / "copy").exists()
    recode_store(path, tmp_path / "copy", "fp16")
    recode_store(path, tmp_path / "copy", "fp16")
    n_rows = sum(shard.n_rows for shard in all_shards(ActivationStore(path)))
    row_bytes = 4 + 2 + len(SITES) * SPEC.d_model * 2
    assert asked[0] == asked[1] == n_rows * row_bytes
    assert asked[2] < 0.3 * asked[1], "what is there is not asked for again"
