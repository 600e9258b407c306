"""Analyses cut into tiles and groups, on threads and processes, killed and resumed, in a bucket: always the same arrays."""

from __future__ import annotations

import importlib
import os
import random
import shutil
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from commandkit import Command
from daskkit import dask_process, until, worker_processes
from numpy.typing import NDArray
from tablekit import codes_manifest, text_table, write_table_store

from actstore import paths
from actstore.errors import DamagedStore, IdentityMismatch, InputError, OutputExists
from actstore.reader import Shard
from actstore.schema import PARTS
from pipelines.analysis import stage as analyze_module
from pipelines.analysis.arrays import ColumnWriter, create_arrays, open_arrays
from pipelines.analysis.reader import Analysis, open_place
from pipelines.analysis.stage import AnalyzeConfig, analyze
from pipelines.analysis.survey import held_codes as code_blocks
from pipelines.analysis.survey import pair_task as pair_tasks
from pipelines.analysis.survey.job import shard_name
from pipelines.analysis.survey.partial_results import Bundle, publish_bundle
from pipelines.codes.code_store import CodeStore
from pipelines.statistics import association
from pipelines.statistics.of_codes.documents import burstiness

N_FEATURES = 12


@dataclass(frozen=True)
class Rows:
    """Every row of a code store: dense codes (n, F), window, position, document."""

    codes: NDArray[np.float32]
    window: NDArray[np.int64]
    position: NDArray[np.int64]
    document: NDArray[np.int64]


def rows_of(codes: CodeStore) -> Rows:
    columns, base = [], 0
    for part in PARTS:
        for shard in codes.shards(part):
            dense = np.zeros((shard.n_rows, codes.n_features), np.float32)
            index, value = (codes.read(shard, f"codes/{name}") for name in ("index", "value"))
            row, slot = np.nonzero(value > 0)
            dense[row, index[row, slot]] = value[row, slot]
            window, position = (codes.read(shard, f"rows/{name}").astype(np.int64) for name in ("window", "position"))
            columns.append((dense, window + base, position, codes.documents(shard)))
        base += codes.segments[0].parts[part].n_windows
    return Rows(*(np.concatenate(column) for column in zip(*columns, strict=True)))


def write_codes(path: Path, model: Path, dense: Callable[[NDArray[np.int64]], NDArray[np.float32]], **asked: Any) -> Path:
    """Codes of some text in two folders, whose rows are `dense(places)` (n, F)."""
    texts = {f"books/{'a' if i % 3 else 'b'}/{i}.txt": f"The fox {i} went to the wood. " * (3 + i % 5) for i in range(9)}
    table, codec, files = text_table(texts, model)
    width = dense(np.arange(1)).shape[1]

    def arrays(places: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        index = np.broadcast_to(np.arange(width, dtype=np.uint16), (len(places), width))
        return {"codes/index": index.copy(), "codes/value": dense(places)}

    return write_table_store(path, codes_manifest(width, width, codec), table, arrays, files, **asked)


def mixed(places: NDArray[np.int64]) -> NDArray[np.float32]:
    """Feature 0 is always on, the last is dead, others fire in a third of the rows."""
    values = np.random.default_rng(1).random((4096, N_FEATURES), np.float32)[places] + 0.25
    values = np.where(values < 0.9, 0, 10 * values - 8.5).astype(np.float32)  # 0.5 to 4
    values[:, 0] = 1
    values[:, -1] = 0
    return values


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    return write_codes(tmp_path_factory.mktemp("made") / "codes", model_folder, mixed, shard_rows=48, chunk_rows=16)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, made: Path, client: Any) -> Path:
    out = tmp_path_factory.mktemp("plain") / "analysis"
    analyze(config_of(made, out), client)
    return out


def config_of(codes: str | Path, out: str | Path, **asked: Any) -> AnalyzeConfig:
    return AnalyzeConfig(codes=codes, out=out, examples=3, before=4, after=2, **asked)


def values_of(path: str | Path) -> dict[str, Any]:
    """Every number of an analysis, whatever its tiles."""
    found = Analysis(path)
    result: dict[str, Any] = {
        f"{group}/{name}": found._arrays.whole(f"{group}/{name}")
        for group in ("features", "rows", "examples", "joint", "documents", "parts")
        for name in found._arrays.names(group)
        if name not in ("tile_starts", "tiles")
    }
    for name in ("pairs", "tokens", "positions", "parts", "bins"):
        whole = getattr(found, name).whole()
        result |= {f"{name}/{part}": getattr(whole, part) for part in ("indptr", "indices", "data")}
    result["tokens/total"] = found.tokens.whole("total").data
    return result


def require_same(left: str | Path, right: str | Path) -> None:
    one, other = values_of(left), values_of(right)
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name], err_msg=name)
    assert Analysis(left).record == Analysis(right).record


# Against dense references, on codes that are hard


def one_only(places: NDArray[np.int64]) -> NDArray[np.float32]:
    return (1 + places % 5).astype(np.float32)[:, None]


def all_on(places: NDArray[np.int64]) -> NDArray[np.float32]:
    return np.ones((len(places), 4), np.float32)


def none_on(places: NDArray[np.int64]) -> NDArray[np.float32]:
    return np.zeros((len(places), 4), np.float32)


def dense_within(rows: Rows, within: str) -> NDArray[np.int64]:
    fired = rows.codes > 0
    n = fired.shape[1]
    if within == "document":
        has = np.stack([fired[rows.document == d].any(axis=0) for d in np.unique(rows.document)]).astype(np.int64)
        return has.T @ has
    reach = 0 if within == "row" else int(within)
    found = np.zeros((n, n), np.int64)
    for i in range(len(fired)):
        near = (rows.window == rows.window[i]) & (rows.document == rows.document[i])
        near &= np.abs(rows.position - rows.position[i]) <= reach
        found += np.outer(fired[i], fired[near].any(axis=0))
    return found


@pytest.mark.parametrize("within", ["row", "1", "5", "document"])
@pytest.mark.parametrize(("dense", "shard_rows"), [(mixed, 48), (mixed, 1024), (one_only, 64), (all_on, 64), (none_on, 64)])
def test_pairs_equal_the_dense_ones_for_every_window(
    dense: Any, shard_rows: int, within: str, model_folder: Path, client: Any, tmp_path: Path
) -> None:
    codes = write_codes(tmp_path / "codes", model_folder, dense, shard_rows=shard_rows, chunk_rows=16)
    analyze(config_of(codes, tmp_path / "analysis", within=within), client)
    found = Analysis(tmp_path / "analysis")
    expected = dense_within(rows_of(CodeStore(codes)), within)
    each = np.diag(expected).copy()
    np.fill_diagonal(expected, 0)
    np.testing.assert_array_equal(found.pairs.whole().toarray(), expected)
    assert found.record.pairs == np.count_nonzero(expected)
    if within == "document":
        np.testing.assert_array_equal(found.n_documents, each)
    if within == "row":
        features, together = found.joint
        np.testing.assert_array_equal(together, (expected + np.diag(each))[np.ix_(features, features)])


def test_a_window_cut_by_shards_of_one_row_is_still_one_window(model_folder: Path, client: Any, tmp_path: Path) -> None:
    def few(places: NDArray[np.int64]) -> NDArray[np.float32]:
        return mixed(places)[:, :5]

    texts = {"one.txt": "The fox went.", "two.txt": "The wood, the fox."}
    table, codec, files = text_table(texts, model_folder, modulus=0)

    def arrays(places: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        index = np.broadcast_to(np.arange(5, dtype=np.uint16), (len(places), 5))
        return {"codes/index": index.copy(), "codes/value": few(places)}

    codes = write_table_store(
        tmp_path / "codes", codes_manifest(5, 5, codec), table, arrays, files, shard_rows=1, chunk_rows=1
    )
    analyze(config_of(codes, tmp_path / "analysis", within="2"), client)
    expected = dense_within(rows_of(CodeStore(codes)), "2")
    np.fill_diagonal(expected, 0)
    np.testing.assert_array_equal(Analysis(tmp_path / "analysis").pairs.whole().toarray(), expected)
    assert expected.any()


def test_documents_and_bursts_are_the_dense_ones(made: Path, plain: Path) -> None:
    rows, found = rows_of(CodeStore(made)), Analysis(plain)
    n_documents = len(found.document_names)
    fired = np.stack([(rows.codes[rows.document == d] > 0).sum(axis=0) for d in range(n_documents)])
    lengths = np.bincount(rows.document, minlength=n_documents)
    np.testing.assert_array_equal(found.n_documents, (fired > 0).sum(axis=0))
    np.testing.assert_array_equal(found.document_rows, lengths)
    fires = fired.sum(axis=0)
    for feature in np.flatnonzero(fires > 1).tolist():
        both = sum(int(c) * (int(c) - 1) for c in fired[:, feature]) / sum(int(n) * (int(n) - 1) for n in lengths)
        by_chance = fires[feature] * (fires[feature] - 1) / (len(rows.codes) * (len(rows.codes) - 1))
        assert found.burstiness[feature] == pytest.approx(both / by_chance, rel=1e-12)
    assert found.burstiness[0] == pytest.approx(1)
    assert np.isnan(found.burstiness[-1])
    assert found.part_names == ["a", "b"]
    in_part = np.array(["a" in name.split("/")[1] for name in found.document_names])
    np.testing.assert_array_equal(
        found.parts.whole().toarray(), np.stack([fired[in_part].sum(axis=0), fired[~in_part].sum(axis=0)], axis=1)
    )


def test_bursts_of_features_with_no_pair_are_no_number() -> None:
    found = burstiness(np.array([0, 0, 2]), np.array([0, 1, 2]), np.array([2, 2]))
    assert np.isnan(found[:2]).all()
    assert found[2] == pytest.approx((2 / 4) / (2 / 12))


def test_quantiles_are_within_a_thirty_second(made: Path, plain: Path) -> None:
    rows, found = rows_of(CodeStore(made)), Analysis(plain)
    for feature in range(N_FEATURES - 1):
        own = np.sort(rows.codes[:, feature][rows.codes[:, feature] > 0])
        for name, value in found.quantiles(feature).items():
            exact = own[int(np.ceil(float(name) * len(own))) - 1]
            assert value == pytest.approx(exact, rel=1 / 31)
    assert found.quantiles(N_FEATURES - 1) == {}


def test_stratified_examples_rise_and_random_ones_are_firings(made: Path, plain: Path) -> None:
    rows, found = rows_of(CodeStore(made)), Analysis(plain)
    for feature in range(1, N_FEATURES - 1):
        values = set(rows.codes[:, feature].tolist())
        strata = [example.value for example in found.examples(feature, "strata")]
        assert strata == sorted(strata)
        assert len(strata) == 5
        shown = [example.value for example in found.examples(feature, "random")]
        assert len(shown) == 5
        assert {*strata, *shown} <= values
        for example in found.examples(feature, "random"):
            assert example.values[example.focus] == example.value


# However the work is cut


@pytest.mark.parametrize(("tile_bytes", "tile_firings", "least_tasks"), [(40, 60, 1), (24, 1, 64), (1 << 20, 1000, 3)])
def test_tiles_and_groups_change_nothing(
    made: Path,
    plain: Path,
    client: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tile_bytes: int,
    tile_firings: int,
    least_tasks: int,
) -> None:
    monkeypatch.setattr(analyze_module, "pair_tiles", lambda fires: pair_tasks.pair_tiles(fires, tile_bytes))
    tiles = analyze_module.table_tiles
    monkeypatch.setattr(analyze_module, "table_tiles", lambda fires: tiles(fires, tile_firings))
    groups = pair_tasks.shard_groups
    monkeypatch.setattr(analyze_module, "shard_groups", lambda shards, n, rows: groups(shards, n, rows, least_tasks))
    analyze(config_of(made, tmp_path / "analysis"), client)
    require_same(tmp_path / "analysis", plain)
    assert Analysis(tmp_path / "analysis").pairs.n_tiles > 1 or tile_bytes == 1 << 20


@pytest.mark.parametrize("n_shards", [1, 2, 5, 17])
@pytest.mark.parametrize("n_tiles", [1, 3, 20])
def test_groups_take_every_shard_once(n_shards: int, n_tiles: int) -> None:
    groups = pair_tasks.shard_groups(n_shards, n_tiles)
    assert [shard for group in groups for shard in group] == list(range(n_shards))
    assert all(len(group) for group in groups)
    assert len(groups) * n_tiles >= min(pair_tasks.LEAST_TASKS, n_shards * n_tiles)
    assert len(pair_tasks.shard_groups(n_shards, n_tiles, 1 << 30)) == n_shards, "many rows make many groups"


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_threads_of_this_process_write_the_same(made: Path, plain: Path, tmp_path: Path, workers: int) -> None:
    analyze(config_of(made, tmp_path / "analysis", workers=workers, threads=True))
    require_same(tmp_path / "analysis", plain)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_processes_write_the_same(made: Path, plain: Path, tmp_path: Path, workers: int) -> None:
    analyze(config_of(made, tmp_path / "analysis", workers=workers))
    require_same(tmp_path / "analysis", plain)


def test_rare_pairs_are_dropped_and_the_threshold_recorded(made: Path, plain: Path, client: Any, tmp_path: Path) -> None:
    analyze(config_of(made, tmp_path / "analysis", min_together=60), client)
    found, everything = Analysis(tmp_path / "analysis"), Analysis(plain)
    all_pairs = everything.pairs.whole().toarray()
    np.testing.assert_array_equal(found.pairs.whole().toarray(), np.where(all_pairs >= 60, all_pairs, 0))
    assert (found.record.min_together, everything.record.min_together) == (60, 1)
    assert found.record.pairs == everything.record.pairs > found.record.pairs_kept == (all_pairs >= 60).sum()


# Killed and resumed


def test_a_finished_part_is_not_computed_again(
    made: Path, plain: Path, client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "analysis"

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(analyze_module, "contexts", interrupt)
        with pytest.raises(KeyboardInterrupt):
            analyze(config_of(made, out), client)
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.analysis.survey.shard_task.publish_bundle", interrupt)
        patch.setattr("pipelines.analysis.survey.table_task.publish_bundle", interrupt)
        patch.setattr("pipelines.analysis.survey.pair_task.PairTile", interrupt)
        analyze(config_of(made, out), client)
    require_same(out, plain)
    assert [path.name for path in tmp_path.iterdir()] == ["analysis"]


def test_partial_results_of_other_options_are_not_used(
    made: Path, plain: Path, client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "analysis"
    with monkeypatch.context() as patch:
        patch.setattr(analyze_module, "contexts", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            analyze(config_of(made, out, within="document", seed=4), client)
    analyze(config_of(made, out), client)
    require_same(out, plain)


def test_a_folder_that_is_not_ours_is_left_alone(made: Path, client: Any, tmp_path: Path) -> None:
    (tmp_path / "analysis.partial").mkdir()
    (tmp_path / "analysis.partial/mine.txt").write_text("mine")
    with pytest.raises(OutputExists, match=r"analysis\.partial: exists and is not left from an analysis"):
        analyze(config_of(made, tmp_path / "analysis"), client)
    assert (tmp_path / "analysis.partial/mine.txt").read_text() == "mine"


def test_a_partial_result_that_is_cut_is_not_read(tmp_path: Path) -> None:
    place = open_place(tmp_path)
    publish_bundle(place, "b", {"x": np.arange(5), "none": np.arange(0), "y": np.arange(3, dtype=np.uint16)})
    bundle = Bundle(place, "b")
    assert (bundle.read("x", 1, 4).tolist(), bundle.read("none").tolist(), bundle.read("y").tolist()) == (
        [1, 2, 3],
        [],
        [0, 1, 2],
    )
    whole = (tmp_path / "b").read_bytes()
    for n in (3, 20, len(whole) - 1):
        (tmp_path / "b").write_bytes(whole[:n])
        with pytest.raises(DamagedStore, match="not as it was written"):
            Bundle(place, "b")


def test_a_flipped_bit_of_a_partial_result_is_never_read(tmp_path: Path) -> None:
    place, generator = open_place(tmp_path), np.random.default_rng(0)
    arrays = {"x": generator.integers(0, 1 << 40, 40_000), "none": np.arange(0), "y": np.arange(9, dtype=np.uint16)}
    publish_bundle(place, "b", arrays)

    def read_all() -> None:
        bundle = Bundle(place, "b")
        for key in arrays:
            bundle.read(key)

    bundle = Bundle(place, "b")
    for start, stop in ((0, 0), (0, 40_000), (8191, 8193), (8192, 8192), (39_990, 40_000)):
        assert (bundle.read("x", start, stop) == arrays["x"][start:stop]).all()
    whole = bytearray((tmp_path / "b").read_bytes())
    header = len(whole) - 40_000 * 8 - 18 - 4 * 6
    ends = [*range(header), *range(len(whole) - 50, len(whole))]
    for place_of_bit in [8 * byte + int(generator.integers(8)) for byte in [*ends, *generator.integers(0, len(whole), 100)]]:
        whole[place_of_bit // 8] ^= 1 << place_of_bit % 8
        (tmp_path / "b").write_bytes(whole)
        with pytest.raises(DamagedStore, match="not as it was written"):
            read_all()
        whole[place_of_bit // 8] ^= 1 << place_of_bit % 8


def test_a_part_of_a_partial_result_is_checked_by_its_own_blocks(tmp_path: Path) -> None:
    place = open_place(tmp_path)
    publish_bundle(place, "b", {"x": np.arange(40_000)})
    whole = bytearray((tmp_path / "b").read_bytes())
    whole[len(whole) - 4 * 5 - 8 * 100] ^= 1  # one of the last hundred numbers
    (tmp_path / "b").write_bytes(whole)
    bundle = Bundle(place, "b")
    assert (bundle.read("x", 0, 32_768) == np.arange(32_768)).all()
    with pytest.raises(DamagedStore, match="not as it was written"):
        bundle.read("x", 32_768, 32_769)


@pytest.mark.slow
def test_a_killed_command_goes_on_where_it_was(made: Path, plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "analysis"
    asked = ["analyze", made, "--out", out, "--workers", 2, "--examples", 3, "--before", 4, "--after", 2]
    generator = random.Random(0)
    n_killed = 0
    for _ in range(4):
        command = Command.forked(tmp_path, *asked)
        wanted = generator.randint(1, 8)
        folder = tmp_path / "analysis.partial"
        until(lambda: True if command.has_ended or len(list(folder.rglob("*-*"))) >= wanted else None)  # noqa: B023
        if command.has_ended:
            break
        os.kill(command.pid, signal.SIGKILL)
        command.join()
        n_killed += 1
        assert not out.exists()
    if not out.exists():
        result = Command.forked(tmp_path, *asked).result()
        assert result.returncode == 0, result.stderr
    assert n_killed >= 1
    require_same(out, plain)


@pytest.mark.slow
@pytest.mark.cluster
def test_workers_killed_at_random_change_nothing(
    made: Path, plain: Path, scheduler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten kills at random moments of analyses that run again and again on a real scheduler and two watched workers."""
    stop, kills = threading.Event(), []
    with dask_process("worker", "--nthreads", "1", "--nworkers", "2", folder=tmp_path) as workers:
        from distributed import Client

        def kill() -> None:
            """Kill running workers only: the watching process gives up a worker that dies while it starts."""
            generator = random.Random(1)
            with Client(scheduler) as client:
                client.run_on_scheduler(lambda dask_scheduler: setattr(dask_scheduler, "allowed_failures", 100))
                while not stop.wait(generator.uniform(0.3, 2)) and len(kills) < 10:
                    client.wait_for_workers(2, timeout=60)
                    victim = generator.choice(worker_processes(workers.process.pid))
                    victim.kill()
                    kills.append(victim.pid)

        killer = threading.Thread(target=kill)
        killer.start()
        n_done = 0
        try:
            while len(kills) < 10:
                out = tmp_path / f"analysis{n_done}"
                analyze(config_of(made, out, scheduler=scheduler))
                require_same(out, plain)
                n_done += 1
        finally:
            stop.set()
            killer.join()
    assert len(kills) == 10
    assert n_done >= 1


def test_codes_that_changed_meanwhile_are_refused(made: Path, client: Any, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(made, tmp_path / "codes"))
    victim = next(file for file in sorted((copy / paths.DATA).rglob("codes/value/c/*/*")))
    data = bytearray(victim.read_bytes())
    data[10] ^= 1
    victim.write_bytes(data)
    with pytest.raises(DamagedStore):
        analyze(config_of(copy, tmp_path / "analysis"), client)
    with pytest.raises(IdentityMismatch):
        CodeStore(copy, snapshot="0" * 16)
    assert not (tmp_path / "analysis").exists()


@pytest.mark.parametrize("cuts", [[0, 50], [0, 0, 1, 17, 17, 33, 50], [0, 16, 32, 48, 50], [0, 0]])
def test_columns_written_piece_by_piece_are_the_files_of_columns_written_whole(
    cuts: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.analysis.arrays.CHUNK_ENTRIES", 4)
    monkeypatch.setattr("pipelines.analysis.arrays.OBJECT_CHUNKS", 4)
    whole = {"columns": np.arange(cuts[-1], dtype=np.uint16), "count": np.arange(cuts[-1], dtype=np.uint8)[::-1]}
    create_arrays(str(tmp_path / "whole"), "group", whole)
    writer = ColumnWriter(str(tmp_path / "pieces"), "group", {name: each.dtype for name, each in whole.items()}, cuts[-1])
    for first, last in pairwise(cuts):
        writer.add(**{name: each[first:last].astype(np.int64) for name, each in whole.items()})
    found, expected = (
        {
            str(file.relative_to(tmp_path / side)): file.read_bytes()
            for file in (tmp_path / side).rglob("*")
            if file.is_file()
        }
        for side in ("pieces", "whole")
    )
    assert found == expected


def test_tiles_that_are_the_first_to_write_may_do_so_at_once(tmp_path: Path) -> None:
    barrier = threading.Barrier(8)

    def write(tile: int, place: Path) -> None:
        barrier.wait()
        create_arrays(str(place), f"table/tiles/{tile}", {"count": np.arange(3)})

    with ThreadPoolExecutor(8) as pool:
        for attempt in range(20):
            place = tmp_path / str(attempt)
            list(pool.map(write, range(8), [place] * 8))
            assert sorted(open_arrays(open_place(place), "r")["table/tiles"].group_keys()) == [str(i) for i in range(8)]


# Tables for others


def test_parquet_tables_open_in_pandas_and_say_what_the_arrays_say(made: Path, plain: Path) -> None:
    found, rows = Analysis(plain), rows_of(CodeStore(made))
    tables = {path.stem: pd.read_parquet(path) for path in plain.glob("*.parquet")}
    assert set(tables) == {
        "features", "pairs", "examples", "tokens", "positions", "parts", "histogram", "documents",
    }  # fmt: skip
    features = tables["features"].set_index("feature")
    np.testing.assert_array_equal(features["fires"], found.fires)
    assert features["band"].tolist() == [found.band(feature) for feature in range(N_FEATURES)]
    assert features["q50"].dropna().tolist() == pytest.approx([found.quantiles(f)["0.5"] for f in range(N_FEATURES - 1)])
    together = found.pairs.whole().toarray()
    fired = (rows.codes > 0).astype(float)
    for pair in tables["pairs"].itertuples():
        assert pair.together == together[pair.feature, pair.partner] >= 5
        if pair.feature != 0 and pair.partner != 0:
            assert pair.phi == pytest.approx(np.corrcoef(fired[:, pair.feature], fired[:, pair.partner])[0, 1])
    assert tables["pairs"].groupby("feature").size().max() <= 10
    for name, table in (("positions", found.positions), ("parts", found.parts)):
        assert tables[name]["count"].sum() == table.whole().sum() == found.fires.sum()
    histogram = tables["histogram"]
    assert histogram["count"].sum() == found.fires.sum()
    assert (histogram["low"] < histogram["high"]).all()
    assert tables["documents"]["rows"].sum() == found.n_rows
    assert tables["documents"]["name"].tolist() == found.document_names
    tokens = tables["tokens"]
    for token in found.top_tokens(0):
        (row,) = tokens[(tokens.feature == 0) & (tokens.token == token.token)].itertuples()
        assert (row.count, row.precision, row.recall, row.mean) == pytest.approx(
            (token.count, token.share, token.recall, token.mean)
        ) or row[4] == token.count
    examples = tables["examples"]
    assert set(examples["kind"]) == {"top", "strata", "random"}
    shown = [example.value for example in found.examples(3)]
    assert examples[(examples.feature == 3) & (examples.kind == "top")]["value"].tolist() == shown
    assert pq.read_schema(plain / "features.parquet").field("fires").type == "int64"


@pytest.mark.parametrize("library", ["polars", "duckdb"])
def test_other_readers_open_the_tables(library: str, plain: Path) -> None:
    module = importlib.import_module(library)
    path = str(plain / "features.parquet")
    if library == "polars":
        assert module.read_parquet(path)["fires"].to_list() == Analysis(plain).fires.tolist()
    else:
        assert module.sql(f"select sum(fires) from '{path}'").fetchall() == [(Analysis(plain).fires.sum(),)]


@pytest.mark.parametrize(
    "asked", [{"within": "0"}, {"within": "65"}, {"within": "line"}, {"strata": 0}, {"min_together": -1}]
)
def test_options_that_mean_nothing_are_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"within .*: choose row|need at least 0, 1 and 0"):
        AnalyzeConfig(codes="c", out="o", **asked)


def test_measures_are_those_of_the_indicators() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random(200) < 0.3, rng.random(200) < 0.5
    both, n_a, n_b = int((a & b).sum()), int(a.sum()), int(b.sum())
    assert association.phi(both, n_a, n_b, 200) == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert association.jaccard(both, n_a, n_b) == pytest.approx(both / (a | b).sum())
    assert association.pmi(both, n_a, n_b, 200) == pytest.approx(np.log((a & b).mean() / (a.mean() * b.mean())))
    assert association.conditional(both, n_a) == pytest.approx(b[a].mean())
    assert np.isnan(association.phi(0, 0, 3, 10))
    assert np.isnan(association.npmi(0, 0, 3, 10))
    assert association.npmi(10, 10, 10, 10) == 1


@pytest.mark.parametrize("block_codes", [1, 40, 90, 1000])
def test_codes_are_counted_shard_after_shard_in_bounded_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_codes: int
) -> None:
    shards = [Shard(0, "train", i, 0, n, n) for i, n in enumerate((10, 10, 7, 10, 3))]
    rows = np.random.default_rng(0).integers(0, 301, (40, 3)).astype(np.uint16)
    for shard, own in zip(shards, np.split(rows, [10, 20, 27, 37]), strict=True):
        publish_bundle(open_place(tmp_path), shard_name(shard), code_blocks.countable(own, 300))
    monkeypatch.setattr(code_blocks, "BLOCK_CODES", block_codes)
    job: Any = SimpleNamespace(work_url=str(tmp_path), extent=SimpleNamespace(n_features=300, k=3))
    for features in (range(20, 290), range(290, 300)):
        first = 0
        for block, firings in code_blocks.row_blocks(job, shards, features.start, features.stop):
            np.testing.assert_array_equal(block, rows[first : first + len(block)])
            assert len(block) <= max(10, block_codes // 3)
            expected = [(block == feature).any(axis=1) for feature in features]
            np.testing.assert_array_equal(firings.toarray(), np.stack(expected))
            first += len(block)
        assert first == len(rows)


def test_the_codes_of_the_last_block_are_kept_for_the_next_tile_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = [Shard(0, "train", i, 0, 10, 10) for i in range(2)]
    jobs: list[Any] = []
    for i in range(2):
        extent = SimpleNamespace(n_features=300, k=3)
        jobs.append(SimpleNamespace(work_url=str(tmp_path / f"{i}"), extent=extent))
        for shard in shards:
            codes = np.random.default_rng((i, shard.index)).integers(0, 301, (10, 3)).astype(np.uint16)
            publish_bundle(open_place(jobs[i].work_url), shard_name(shard), code_blocks.countable(codes, 300))
    read: list[str] = []
    read_into = Bundle.read_into
    monkeypatch.setattr(Bundle, "read_into", lambda self, out, key: (read.append(key), read_into(self, out, key)))

    def times_read(job: Any, shards: list[Shard]) -> int:
        read.clear()
        codes = [block.copy() for block, _ in code_blocks.row_blocks(job, shards, 0, 300)]
        n_read = len(read)
        code_blocks.forget_codes()
        afresh = [block.copy() for block, _ in code_blocks.row_blocks(job, shards, 0, 300)]
        np.testing.assert_array_equal(np.concatenate(codes), np.concatenate(afresh))
        return n_read

    assert times_read(jobs[0], shards) == 2
    assert times_read(jobs[0], shards) == 0, "the same"
    assert times_read(jobs[1], shards) == 2, "another analysis"
    assert times_read(jobs[1], shards[1:]) == 1, "other shards"
    monkeypatch.setattr(code_blocks, "BLOCK_CODES", 30)
    assert times_read(jobs[1], shards) == 2, "two blocks"
    assert times_read(jobs[1], shards) == 2, "of which the last is held, and the first comes first"
    code_blocks.forget_codes()
