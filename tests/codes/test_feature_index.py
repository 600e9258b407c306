"""The feature index: entries equal those of ten lines of NumPy, however it was made, and reads are few."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import s3kit
from distributed import Client, LocalCluster
from forkkit import PROCESSES, preload
from hypothesis import given, settings
from hypothesis import strategies as st
from modelkit import faults_in
from numpy.typing import NDArray
from s3kit import Server
from storekit import files_of, flip_bit

from actstore import paths
from actstore.errors import DamagedStore, EncodingError, IncompleteStore, InputError
from actstore.folder import Folder
from actstore.integrity import repair
from actstore.open_place import open_place
from actstore.reader import Store
from actstore.schema import PARTS
from pipelines.codes import build_index as index_build
from pipelines.codes.build_index import (
    KeyForm,
    Run,
    build_index,
    merge_shard,
    plan_merges,
    samples_between,
    sort_shard,
    value_of,
)
from pipelines.codes.code_store import CodeStore, read_codes
from pipelines.codes.feature_index import FeatureIndex, index_layout
from pipelines.codes.stage import EncodeConfig, encode, kept_values
from pipelines.shared.cluster import run_tasks
from pipelines.stores.made.made_store import write_made_codes

preload("pipelines.codes.build_index", "pipelines.stores.made.made_store", "zarr.codecs")

N_FEATURES, K = 60, 4
ALWAYS_ON = 7
Codes = Callable[[int, int], tuple[NDArray[np.int64], NDArray[np.float32]]]


def made(k: int = K, n_features: int = N_FEATURES, levels: int = 50) -> Codes:
    """Random codes with dead features, one always on, silent slots, and values of which many are equal."""

    def of(start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        rows = [np.random.default_rng((1, row)) for row in range(start, stop)]
        alive = np.setdiff1d(np.arange(n_features), [ALWAYS_ON, 0, 11, n_features - 1])
        indices = np.stack([np.sort([ALWAYS_ON, *rng.choice(alive, k - 1, replace=False)]) for rng in rows])
        values = np.stack([rng.integers(0, levels, k) / np.float32(8) for rng in rows]).astype(np.float32)
        values[indices == ALWAYS_ON] += 1
        return indices, values

    return of


def reference(indices: NDArray[np.int64], values: NDArray[np.float32], n_features: int) -> list[tuple[Any, Any]]:
    """Each feature's (rows, values) from the definition."""
    found = []
    for feature in range(n_features):
        row, slot = np.nonzero((indices == feature) & (values > 0))
        own = values[row, slot]
        order = np.lexsort((row, -own))
        found.append((row[order], own[order]))
    return found


def assert_index_is(index: FeatureIndex, expected: list[tuple[Any, Any]]) -> None:
    assert len(index.starts) == len(expected) + 1
    for feature, (rows, values) in enumerate(expected):
        found = index.firings(feature)
        np.testing.assert_array_equal(found.rows, rows)
        np.testing.assert_array_equal(found.values, values)
        assert index.fires(feature) == len(rows)


@pytest.fixture
def small_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    """Objects of 64 entries, runs of 20 rows, samples every 4: many of each from few rows."""
    shrink(monkeypatch.setattr)


def shrink(set_attribute: Callable[..., None]) -> None:
    from pipelines.codes import feature_index

    set_attribute(feature_index, "SHARD_ENTRIES", 64)
    set_attribute(feature_index, "CHUNK_ENTRIES", 16)
    set_attribute(index_build, "SHARD_ENTRIES", 64)
    set_attribute(index_build, "RUN_ENTRIES", 20 * K)
    set_attribute(index_build, "MOST_BETWEEN", 4)
    set_attribute(index_build, "LEAST_BETWEEN", 4)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, client: Any) -> Path:
    """120 training and 21 held-out rows in shards of 50, indexed. Read-only."""
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch.setattr)
        return indexed(tmp_path_factory.mktemp("index") / "codes", client)


def indexed(path: Path, client: Any, code: Codes | None = None, n_features: int = N_FEATURES, **options: Any) -> Path:
    options = {"n_rows": 120, "n_heldout": 21, "shard_rows": 50, **options}
    write_made_codes(path, code or made(), n_features=n_features, **options)
    build_index(CodeStore(path), client)
    return path


# The same entries as by the definition


def test_each_features_firings_are_the_definitions(built: Path) -> None:
    index = FeatureIndex(CodeStore(built))
    expected = reference(*made()(0, 141), N_FEATURES)
    assert not len(expected[0][0])
    assert len(expected[ALWAYS_ON][0]) == 141
    assert index.layout.n_shards > 6
    assert_index_is(index, expected)


@pytest.mark.parametrize(
    ("k", "n_features", "options"),
    [
        (1, N_FEATURES, {}),
        (N_FEATURES - 4, N_FEATURES, {"n_rows": 25, "n_heldout": 2}),
        (K, N_FEATURES, {"shard_rows": 1, "n_rows": 9, "n_heldout": 2}),
        (K, N_FEATURES, {"n_rows": 80, "n_heldout": 0}),
        (K, 300, {"n_rows": 80}),
        (K, 70_000, {"n_rows": 40}),
        (K, N_FEATURES, {"n_rows": 80, "value_dtype": "float16"}),
    ],
    ids=["k=1", "nearly every feature", "one-row shards", "no held-out rows", "uint16", "uint32", "fp16"],
)
@pytest.mark.usefixtures("small_objects")
def test_so_they_are_of_other_shapes(k: int, n_features: int, options: dict[str, Any], tmp_path: Path, client: Any) -> None:
    code = made(k, n_features)
    codes = CodeStore(indexed(tmp_path / "codes", client, code, n_features, **options))
    n_rows = options.get("n_rows", 120) + options.get("n_heldout", 21)
    expected = reference(*code(0, n_rows), n_features)
    if n_features > 1000:
        index = FeatureIndex(codes)
        np.testing.assert_array_equal(np.diff(index.starts), [len(rows) for rows, _ in expected])
        expected = expected[:100]
        assert all(np.array_equal(index.firings(f).rows, rows) for f, (rows, _) in enumerate(expected))
    else:
        assert_index_is(FeatureIndex(codes), expected)
    assert faults_in(tmp_path / "codes") == []


@pytest.mark.usefixtures("small_objects")
def test_a_value_that_every_firing_has_leaves_the_rows_in_order(tmp_path: Path, client: Any) -> None:
    code = made(levels=2)
    codes = CodeStore(indexed(tmp_path / "codes", client, lambda a, b: (code(a, b)[0], np.ones((b - a, K), np.float32))))
    np.testing.assert_array_equal(FeatureIndex(codes).firings(ALWAYS_ON).rows, np.arange(141))


@pytest.mark.usefixtures("small_objects")
def test_codes_without_any_firing_have_an_empty_index(tmp_path: Path, client: Any) -> None:
    code = made()
    path = indexed(tmp_path / "codes", client, lambda a, b: (code(a, b)[0], np.zeros((b - a, K), np.float32)))
    index = FeatureIndex(CodeStore(path))
    assert not index.starts.any()
    assert len(index.firings(3).rows) == 0
    assert faults_in(path) == []


def test_top_and_ranks_are_slices_of_the_firings(built: Path) -> None:
    index = FeatureIndex(CodeStore(built))
    everything = index.firings(ALWAYS_ON)
    for first, last in ((0, 10), (17, 111), (140, 400), (400, 500), (5, 5)):
        found = index.ranks(ALWAYS_ON, first, last)
        np.testing.assert_array_equal(found.rows, everything.rows[first:last])
        np.testing.assert_array_equal(found.values, everything.values[first:last])
    np.testing.assert_array_equal(index.top(ALWAYS_ON, 9).rows, everything.rows[:9])
    assert len(index.top(0, 9).rows) == 0
    with pytest.raises(InputError, match=r"feature 60: .* has 60 features; choose 0 to 59"):
        index.firings(N_FEATURES)


def test_a_real_code_stores_index_holds_its_codes_and_leads_to_their_text(codes: Path) -> None:
    opened = CodeStore(codes)
    index = FeatureIndex(opened)
    indices, values = (
        np.concatenate(column)
        for column in zip(*(read_codes(opened, shard) for p in PARTS for shard in opened.shards(p)), strict=True)
    )
    assert_index_is(index, reference(indices, values, 64))
    columns = {
        "window": [opened.read(shard, "rows/window") for p in PARTS for shard in opened.shards(p)],
        "position": [opened.read(shard, "rows/position") for p in PARTS for shard in opened.shards(p)],
        "token_index": [opened.token_index(shard) for p in PARTS for shard in opened.shards(p)],
        "token": [opened.token_ids(shard) for p in PARTS for shard in opened.shards(p)],
        "document": [opened.documents(shard) for p in PARTS for shard in opened.shards(p)],
    }
    rows = np.random.default_rng(0).permutation(len(indices))[:200]
    places = FeatureIndex(CodeStore(codes)).places(rows)
    for name, column in columns.items():
        np.testing.assert_array_equal(getattr(places, name), np.concatenate(column)[rows].astype(np.int64), err_msg=name)


@given(st.lists(st.floats(2.0**-149, 2.0**127, width=32), min_size=1, max_size=20), st.integers(1, 1 << 24))
def test_packed_keys_are_in_the_order_of_falling_values_and_give_them_back(found: list[float], n_features: int) -> None:
    values = np.array(found, np.float32)
    form = KeyForm.choose(n_features, 32)
    rows = np.arange(len(values)) % form.run_rows
    packed = form.pack(np.full(len(values), n_features - 1), values, rows)
    np.testing.assert_array_equal(value_of(form.key(packed)), values)
    np.testing.assert_array_equal(form.row(packed), rows)
    np.testing.assert_array_equal(np.argsort(packed, kind="stable"), np.lexsort((rows, -values.astype(np.float64))))


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 30), max_size=60), min_size=1, max_size=6),
    st.integers(1, 9),
    st.sampled_from([16, 32, 64]),
)
def test_the_pieces_of_an_object_hold_all_its_entries_whatever_the_runs(
    drawn: list[list[int]], between: int, shard_entries: int
) -> None:
    sorted_runs = [np.sort(np.array(run, np.uint64)) for run in drawn]
    runs = [Run(str(i), len(run), 1000 * i, run[::between]) for i, run in enumerate(sorted_runs)]
    everything = [(int(key), i, place) for i, run in enumerate(sorted_runs) for place, key in enumerate(run)]
    layout = index_layout(len(everything)).__class__(len(everything), shard_entries, 16)
    expected = sorted(everything)
    planned = plan_merges(runs, layout, between)
    assert len(planned) == layout.n_shards
    for number, (pieces, n_before) in enumerate(planned):
        first, last = layout.shard_range(number)
        read = sorted((int(key), int(name), a + i) for name, _, a, b in pieces
                      for i, key in enumerate(sorted_runs[int(name)][a:b]))  # fmt: skip
        assert read[first - n_before : last - n_before] == expected[first:last]
        assert len(read) <= last - first + 2 * (len(runs) + 1) * between


# However it was made


@pytest.mark.slow
def test_two_worker_processes_make_the_same_bytes_as_one_thread(built: Path, tmp_path: Path, small_objects: None) -> None:
    write_made_codes(tmp_path / "codes", made(), 120, 21, n_features=N_FEATURES, shard_rows=50)
    processes = LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0")
    with processes as cluster, Client(cluster) as two:
        two.run(_shrink_here)
        build_index(CodeStore(tmp_path / "codes"), two)
    assert index_files(tmp_path / "codes") == index_files(built)


def _shrink_here() -> None:
    shrink(setattr)


def test_the_entries_do_not_depend_on_the_size_of_runs_and_samples(
    built: Path, tmp_path: Path, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch.setattr)
    monkeypatch.setattr(index_build, "RUN_ENTRIES", 7 * K)
    monkeypatch.setattr(index_build, "MOST_BETWEEN", 9)
    monkeypatch.setattr(index_build, "LEAST_BETWEEN", 9)
    assert index_files(indexed(tmp_path / "codes", client)) == index_files(built)


def index_files(path: Path) -> dict[str, bytes]:
    """The objects of the index, and its record; nothing else may be there."""
    found = files_of(path)
    assert not [name for name in found if name.startswith(paths.INDEX_RUNS)]
    return {name: data for name, data in found.items() if name.startswith(paths.INDEX) or name == paths.INDEX_RECORD}


def write_and_die(path: Path, n_publications: int) -> None:
    """Build an index in tasks of this process, killed at the n-th publication."""
    shrink(setattr)
    publish, left = Folder.publish, [n_publications]

    def counting(place: Folder, name: str, data: bytes) -> None:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), 9)
        publish(place, name, data)

    Folder.publish = counting  # type: ignore[method-assign]
    index_build.run_tasks = here  # type: ignore[assignment]
    build_index(CodeStore(path), None)


def here(_client: Any, _label: str, function: Callable[..., Any], tasks: list[tuple[Any, ...]]) -> list[Any]:
    return [function(*task) for task in tasks]


@pytest.mark.usefixtures("small_objects")
@pytest.mark.parametrize("n_publications", [1, 9, 20, 29])
def test_killed_at_any_moment_there_is_no_index_and_the_next_attempt_makes_the_same(
    built: Path, tmp_path: Path, client: Any, n_publications: int
) -> None:
    path = Path(write_made_codes(tmp_path / "codes", made(), 120, 21, n_features=N_FEATURES, shard_rows=50))
    process = PROCESSES.Process(target=write_and_die, args=(path, n_publications))
    process.start()
    process.join()
    assert process.exitcode == -9
    with pytest.raises(IncompleteStore, match="has no feature index; run `encode` again"):
        FeatureIndex(CodeStore(path))
    assert faults_in(path) == []
    build_index(CodeStore(path), client)
    assert index_files(path) == index_files(built)


def test_a_finished_index_is_left_alone(built: Path, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Folder, "publish", pytest.fail)
    build_index(CodeStore(built), client)


def test_runs_that_change_on_the_disk_are_noticed(
    tmp_path: Path, client: Any, monkeypatch: pytest.MonkeyPatch, small_objects: None
) -> None:
    def flipping(client: Any, label: str, function: Callable[..., Any], tasks: list[tuple[Any, ...]]) -> list[Any]:
        if function is merge_shard:
            flip_bit(sorted((tmp_path / "codes" / paths.INDEX_RUNS).iterdir())[2], 8 * 40 + 5)
        return run_tasks(client, label, function, tasks)

    monkeypatch.setattr(index_build, "run_tasks", flipping)
    with pytest.raises(DamagedStore, match="firings were changed on the disk while they were sorted"):
        indexed(tmp_path / "codes", client)
    assert not (tmp_path / "codes" / paths.INDEX_RECORD).exists()


@pytest.mark.parametrize("n_rows", [20_000, 80_000])
def test_the_memory_of_a_task_does_not_grow_with_the_rows(
    n_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entries held at a time: of a run when it is sorted, of an object and the samples' slack when it is merged."""
    monkeypatch.setattr(index_build, "RUN_ENTRIES", 8192)
    monkeypatch.setattr("pipelines.codes.feature_index.SHARD_ENTRIES", 8192)
    monkeypatch.setattr("pipelines.codes.feature_index.CHUNK_ENTRIES", 1024)
    monkeypatch.setattr(index_build, "SHARD_ENTRIES", 8192)
    monkeypatch.setattr(index_build, "MOST_BETWEEN", 16)
    monkeypatch.setattr(index_build, "LEAST_BETWEEN", 16)
    rng = np.random.default_rng(0)
    indices = np.sort(rng.permuted(np.tile(np.arange(20), (n_rows, 1)), axis=1)[:, :K], axis=1)
    indices[:, 0] = 0  # fires everywhere: its entries are many times an object's
    values = rng.random((n_rows, K), np.float32) + 1
    write_made_codes(tmp_path / "codes", lambda a, b: (indices[a:b], values[a:b]), n_rows, n_features=20, shard_rows=10_000)
    largest = {sort_shard: 0, merge_shard: 0}

    def measured(_client: Any, _label: str, function: Any, tasks: list[tuple[Any, ...]]) -> list[Any]:
        done = [function(*task) for task in tasks]
        if function is sort_shard:
            largest[function] = max(run.n_entries for shard in done for run in shard.runs)
        else:
            largest[function] = max(sum(b - a for _, _, a, b in task[5]) for task in tasks)
        return done

    monkeypatch.setattr(index_build, "run_tasks", measured)
    build_index(CodeStore(tmp_path / "codes"), None)
    assert largest[sort_shard] <= 8192
    assert largest[merge_shard] <= 8192 + 2 * (1 + n_rows * K // 8192 + n_rows // 10_000) * 16
    found = FeatureIndex(CodeStore(tmp_path / "codes")).firings(0)
    mine = indices == 0
    row, slot = np.nonzero(mine)
    order = np.lexsort((row, -values[row, slot]))
    np.testing.assert_array_equal(found.rows, row[order])


def test_samples_are_closer_where_there_are_more_runs() -> None:
    assert [samples_between(n_rows, 131_072) for n_rows in (10**6, 10**8, 10**9)] == [1024, 687, 256]


# Read in part


@contextmanager
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Bytes read of each object in a block."""
    found: dict[str, int] = {}
    read, read_into = Folder.read, Folder.read_into

    def reading(place: Folder, name: str) -> bytes:
        data = read(place, name)
        found[name] = found.get(name, 0) + len(data)
        return data

    def reading_into(place: Folder, name: str, start: int, *buffers: memoryview) -> int:
        n = read_into(place, name, start, *buffers)
        found[name] = found.get(name, 0) + n
        return n

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "read", reading)
        patch.setattr(Folder, "read_into", reading_into)
        yield found


def test_a_features_firings_are_one_read_of_each_array(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = FeatureIndex(CodeStore(built))
    feature = next(
        f for f in range(N_FEATURES) if index.starts[f] // 64 == (index.starts[f + 1] - 1) // 64 and index.fires(f) > 4
    )
    index.firings(feature)
    n_calls, read_into = [0], Folder.read_into

    def counting(place: Folder, name: str, start: int, *buffers: memoryview) -> int:
        n_calls[0] += 1
        return read_into(place, name, start, *buffers)

    monkeypatch.setattr(Folder, "read_into", counting)
    with reads(monkeypatch) as found:
        firings = index.firings(feature)
    assert len(firings.rows) > 4
    assert n_calls == [2]
    assert {name.split("/")[2] for name in found} == {"rows", "values"}


def test_a_lookup_reads_chunks_and_not_columns(codes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = CodeStore(codes)
    with reads(monkeypatch) as found:
        index = FeatureIndex(opened)
        feature = int(np.argmax(np.diff(index.starts)))
        top = index.top(feature, 3)
        index.places(top.rows)
    assert not [name for name in found if "/codes/" in name]
    assert len([name for name in found if "rows/window/c" in name]) <= 3
    sizes = opened.place.names()
    chunk_bytes = opened.shards()[0].chunk_rows * 4 + 4
    touched = {name: n for name, n in found.items() if "/rows/window/c/" in name}
    assert touched
    assert all(n <= 3 * chunk_bytes + 16 * 200 and n < sizes[name] + chunk_bytes for name, n in touched.items())


def test_values_of_a_table_at_some_places_are_those_of_the_table_and_only_their_chunks_are_read(
    codes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Store(codes).table(0, "tokens/ids")
    places = np.array([5, 0, len(whole) - 1, 5])
    np.testing.assert_array_equal(Store(codes).table_at(0, "tokens/ids", places), whole[places])
    opened = Store(codes)
    opened.table(0, "tokens/ids")
    with reads(monkeypatch) as found:
        np.testing.assert_array_equal(opened.table_at(0, "tokens/ids", places), whole[places])
    assert not found


# Damage


def read_everything(path: Path) -> None:
    for feature in range(N_FEATURES):
        FeatureIndex(CodeStore(path)).firings(feature)


@pytest.fixture
def own(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "own"))


@pytest.mark.usefixtures("small_objects")
@pytest.mark.parametrize("array", ["rows", "values"])
def test_a_flipped_bit_is_not_read_and_verify_repair_and_encode_mend_it(
    array: str, own: Path, built: Path, client: Any
) -> None:
    name = paths.index_object(array, 2)
    flip_bit(own / name, 8 * 30)
    with pytest.raises(DamagedStore, match=rf"{name}: the crc32c of a chunk does not match; `actstore repair` drops"):
        read_everything(own)
    assert [name in fault for fault in faults_in(own)] == [True]
    done = repair(open_place(own), "crc")
    assert (done.faults, done.shards) == (1, [])
    assert done.dropped == [paths.INDEX_RECORD, name]
    assert faults_in(own) == []
    build_index(CodeStore(own), client)
    assert index_files(own) == index_files(built)


@pytest.mark.usefixtures("small_objects")
@pytest.mark.parametrize("what", ["missing", "short", "starts", "record"])
def test_what_is_missing_or_short_is_refused_named_and_mended(what: str, own: Path, built: Path, client: Any) -> None:
    name = {"starts": f"{paths.INDEX}/starts/c/0", "record": paths.INDEX_RECORD}.get(what, paths.index_object("rows", 1))
    if what == "missing":
        (own / name).unlink()
    elif what == "short":
        (own / name).write_bytes((own / name).read_bytes()[:-1])
    else:
        flip_bit(own / name, 301)
    with pytest.raises(DamagedStore, match=name):
        read_everything(own)
    assert [name in fault for fault in faults_in(own)] == [True]
    repair(open_place(own))
    build_index(CodeStore(own), client)
    assert index_files(own) == index_files(built)


@pytest.mark.usefixtures("small_objects")
def test_an_index_of_other_codes_is_refused_and_replaced(own: Path, tmp_path: Path, client: Any) -> None:
    other = indexed(tmp_path / "other", client, n_rows=100)
    shutil.copy(own / paths.INDEX_RECORD, other / paths.INDEX_RECORD)
    with pytest.raises(IncompleteStore, match=r"its feature index is of snapshot \w+, the codes are \w+; run `encode`"):
        FeatureIndex(CodeStore(other))
    build_index(CodeStore(other), client)
    assert_index_is(FeatureIndex(CodeStore(other)), reference(*made()(0, 121), N_FEATURES))


# encode


def test_encode_makes_the_index_again_where_it_is_gone(
    codes: Path, store: Path, run: Path, client: Any, tmp_path: Path
) -> None:
    own = Path(shutil.copytree(codes, tmp_path / "codes"))
    before = files_of(own)
    (own / paths.INDEX_RECORD).unlink()
    shutil.rmtree(own / paths.INDEX)
    encode(EncodeConfig(store=store, run=run, out=own), client)
    assert files_of(own) == before


def test_values_in_fp16_are_the_rounded_ones_and_no_firing_is_lost(
    codes: Path, store: Path, run: Path, client: Any, tmp_path: Path
) -> None:
    encode(EncodeConfig(store=store, run=run, out=tmp_path / "half", value_dtype="fp16"), client)
    half, whole = CodeStore(tmp_path / "half"), CodeStore(codes)
    assert half.manifest.array("codes/value").dtype == "float16"
    assert half.store_id != whole.store_id
    for shard in whole.shards():
        np.testing.assert_array_equal(half.read(shard, "codes/index"), whole.read(shard, "codes/index"))
        values = whole.read(shard, "codes/value")
        np.testing.assert_array_equal(read_codes(half, shard)[1], kept_values(values, "float16").astype(np.float32))
        np.testing.assert_allclose(read_codes(half, shard)[1], values, rtol=2**-11, atol=2**-25)
    assert faults_in(tmp_path / "half") == []
    assert kept_values(np.array([[1e-12, 0]], np.float32), "float16").tolist() == [[2.0**-24, 0]]
    with pytest.raises(EncodingError, match="a code of 70000 does not fit fp16, which ends at 65504; encode with --value"):
        kept_values(np.array([[1, 70_000]], np.float32), "float16")


def dense_codes(codes: CodeStore, shard: Any) -> NDArray[np.float32]:
    """(rows, F): which feature a code of value 0 is of does not matter."""
    features, values = read_codes(codes, shard)
    found = np.zeros((len(features), codes.n_features), np.float32)
    np.put_along_axis(found, features.astype(np.int64), values, axis=1)
    return found


def test_the_fast_search_is_another_code_store_whose_values_are_exact(
    codes: Path, store: Path, run: Path, client: Any, tmp_path: Path
) -> None:
    encode(EncodeConfig(store=store, run=run, out=tmp_path / "fast", kernel="sparse"), client)
    fast, exact = CodeStore(tmp_path / "fast"), CodeStore(codes)
    assert fast.manifest.source == {**exact.manifest.source, "kernel": "sparse"}
    same = total = 0
    for shard in exact.shards():
        mine, theirs = (dense_codes(codes, shard) for codes in (fast, exact))
        rows = ((mine > 0) == (theirs > 0)).all(axis=1)
        same, total = same + int(rows.sum()), total + len(rows)
        np.testing.assert_allclose(mine[rows], theirs[rows], rtol=1e-5, atol=1e-5)
    assert same > 0.99 * total


def test_what_encode_cannot_do_is_refused_before_anything_is_written(store: Path, run: Path, tmp_path: Path) -> None:
    for wrong, message in (({"value_dtype": "fp8"}, "value dtype 'fp8': choose from fp32, fp16"),
                           ({"kernel": "dense"}, "kernel 'dense': choose from sparse-fp32, sparse")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            EncodeConfig(store=store, run=run, out=tmp_path / "codes", **wrong)
    assert not list(tmp_path.iterdir())


# In a bucket


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with s3kit.serving(tmp_path_factory.mktemp("s3")) as found, pytest.MonkeyPatch.context() as patch:
        for name, value in found.environment.items():
            patch.setenv(name, value)
        s3kit.shorten_lease(patch)
        yield found


@pytest.mark.usefixtures("small_objects")
def test_in_a_bucket_it_is_the_same_and_reads_few_ranges(built: Path, server: Server, client: Any) -> None:
    url = f"{server.bucket()}/codes"
    write_made_codes(url, made(), 120, 21, n_features=N_FEATURES, shard_rows=50)
    build_index(CodeStore(url), client)
    there = {name: data for name, data in server.objects(url).items() if name in index_files(built)}
    assert there == index_files(built)
    assert not [name for name in server.objects(url) if name.startswith(paths.INDEX_RUNS)]
    codes = CodeStore(url)
    before = len(server.requests())
    index = FeatureIndex(codes)
    found = index.top(ALWAYS_ON, 5)
    assert len(server.requests()) - before <= 9
    np.testing.assert_array_equal(found.rows, reference(*made()(0, 141), N_FEATURES)[ALWAYS_ON][0][:5])
    assert len(index.places(found.rows).token) == 5
