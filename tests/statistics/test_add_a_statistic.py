"""A new statistic is one file: `analyze` computes and writes it, and an analysis reads it back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tablekit import codes_manifest, text_table, write_table_store

import pipelines.statistics.of_codes
from actstore.errors import InputError
from actstore.schema import PARTS
from pipelines.analysis import stage as analyze_module
from pipelines.analysis.reader import Analysis
from pipelines.analysis.stage import AnalyzeConfig, analyze
from pipelines.analysis.survey.survey import Survey
from pipelines.codes.code_store import CodeStore, read_codes
from pipelines.statistics import CodeBlock, Extent, statistics

N_FEATURES = 6

SQUARES = '''
"""The sum of each feature's squared values."""

import numpy as np

from pipelines.statistics.statistic import FEATURES, DenseStatistic


class SquareSums(DenseStatistic):
    name = "squares"
    arrays = (f"{FEATURES}/squares",)

    def __init__(self, n_features):
        self.total = np.zeros(n_features)

    @classmethod
    def make(cls, extent):
        return cls(extent.n_features)

    def update(self, block):
        _, feature, value = block.firings
        self.total += np.bincount(feature, weights=value.astype(float) ** 2, minlength=len(self.total))

    def merge(self, other):
        self.total += other.total
        return self

    def finalize(self):
        return {self.arrays[0]: self.total}
'''

PARITY = '''
"""Firings in windows of even and of odd number."""

from pipelines.statistics.firings_by import FiringsBy


class ParityFirings(FiringsBy):
    name = "parity"

    @classmethod
    def n_columns(cls, extent):
        return 2

    def column(self, block):
        return block.windows[block.firings[0]] % 2
'''


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two more statistics, each by a file in a folder of the registry."""
    folder = tmp_path / "more"
    folder.mkdir()
    (folder / "toy_squares.py").write_text(SQUARES)
    (folder / "toy_parity.py").write_text(PARITY)
    monkeypatch.setattr(pipelines.statistics.of_codes, "__path__", [*pipelines.statistics.of_codes.__path__, str(folder)])
    statistics.cache_clear()
    yield
    statistics.cache_clear()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """Codes with a feature that is always on and a dead one, in several shards of both parts. Values are multiples of 1/4,
    so that sums of squares are exact."""
    texts = {f"books/{i}.txt": f"The fox {i} went to the wood. " * (3 + i % 5) for i in range(9)}
    table, codec, files = text_table(texts, model_folder)

    def arrays(places: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        values = np.random.default_rng(1).integers(0, 9, (4096, N_FEATURES))[places].astype(np.float32) / 4
        values[:, 0], values[:, -1] = 1, 0
        index = np.broadcast_to(np.arange(N_FEATURES, dtype=np.uint16), values.shape)
        return {"codes/index": index.copy(), "codes/value": values}

    out = tmp_path_factory.mktemp("made") / "codes"
    manifest = codes_manifest(N_FEATURES, N_FEATURES, codec)
    return write_table_store(out, manifest, table, arrays, files, shard_rows=48, chunk_rows=16)


def reference(path: Path) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """(F,) sums of squares, and (F, 2) firings by parity of the window, from the definition."""
    codes = CodeStore(path)
    squares, parity, base = np.zeros(N_FEATURES), np.zeros((N_FEATURES, 2), np.int64), 0
    for part in PARTS:
        for shard in codes.shards(part):
            _, values = read_codes(codes, shard)
            window = codes.read(shard, "rows/window").astype(np.int64) + base
            squares += (values.astype(float) ** 2).sum(axis=0)
            parity += np.stack([(values[window % 2 == odd] > 0).sum(axis=0) for odd in (0, 1)], axis=1)
        base += codes.segments[0].parts[part].n_windows
    return squares, parity


def require_written(out: Path, codes: Path) -> None:
    analysis, (squares, parity) = Analysis(out), reference(codes)
    assert squares[0] > 0
    assert (parity[0] > 0).all()
    assert not parity[-1].any()
    np.testing.assert_array_equal(analysis.arrays_of("squares")["features/squares"], squares)
    np.testing.assert_array_equal(analysis.table("parity").whole().toarray(), parity)


def config_of(codes: Path, out: Path, **asked: Any) -> AnalyzeConfig:
    return AnalyzeConfig(codes=codes, out=out, examples=3, before=4, after=2, **asked)


@pytest.mark.usefixtures("added")
@pytest.mark.parametrize(("workers", "tile_firings"), [(1, 1 << 20), (2, 60)])
def test_threads_write_it_and_an_analysis_reads_it(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, tile_firings: int
) -> None:
    """In one tile of features and in several; from every shard of both parts."""
    assert sum(len(CodeStore(made).shards(part)) for part in PARTS) > 2
    tiles = analyze_module.table_tiles
    monkeypatch.setattr(analyze_module, "table_tiles", lambda fires: tiles(fires, tile_firings))
    analyze(config_of(made, tmp_path / "analysis", workers=workers, threads=True))
    require_written(tmp_path / "analysis", made)
    assert (Analysis(tmp_path / "analysis").table("parity").n_tiles > 1) == (tile_firings == 60)


@pytest.mark.usefixtures("added")
@pytest.mark.parametrize("killed_in", ["merge_tables", "reduce_groups", "contexts"])
def test_a_killed_analysis_goes_on_with_it(
    made: Path, client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_in: str
) -> None:
    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(analyze_module, "run_tasks" if killed_in == "merge_tables" else killed_in, kill)
        with pytest.raises(KeyboardInterrupt):
            analyze(config_of(made, tmp_path / "analysis"), client)
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.analysis.survey.shard_task.publish_bundle", kill)  # shards are not surveyed again
        analyze(config_of(made, tmp_path / "analysis"), client)
    require_written(tmp_path / "analysis", made)


def test_partial_results_of_before_it_was_there_are_not_used(
    made: Path, client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(analyze_module, "contexts", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            analyze(config_of(made, tmp_path / "analysis"), client)
    request.getfixturevalue("added")
    analyze(config_of(made, tmp_path / "analysis"), client)
    require_written(tmp_path / "analysis", made)


@pytest.mark.usefixtures("added")
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_cut_and_order_of_merging_gives_the_same(data: st.DataObject) -> None:
    rng, n, extent = np.random.default_rng(3), 24, Extent(4, 2, 5, 8, 2, 1)
    indices = np.sort(np.argsort(rng.random((n, 4)), axis=1)[:, :2], axis=1)
    values = rng.integers(0, 5, (n, 2)).astype(np.float32) / 4
    row = np.arange(n)

    def survey(rows: NDArray[np.int64]) -> Survey:
        whole = Survey(extent)
        places = {"tokens": rows % 5, "windows": rows // 3, "positions": rows % 3, "documents": rows // 13}
        whole.update(CodeBlock(4, indices[rows], values[rows], **places, parts=rows * 0))
        return whole

    cuts = sorted(data.draw(st.sets(st.integers(1, n - 1)), label="cuts"))
    pieces = [survey(rows) for rows in data.draw(st.permutations(np.split(row, cuts)), label="order")]
    while len(pieces) > 1:
        first = pieces.pop(data.draw(st.integers(0, len(pieces) - 1), label="first"))
        second = pieces.pop(data.draw(st.integers(0, len(pieces) - 1), label="second"))
        pieces.append(first.merge(second))
    whole = survey(row)
    np.testing.assert_array_equal(pieces[0]["squares"].total, whole["squares"].total)
    for one, other in zip(pieces[0]["parity"].table.finalize(), whole["parity"].table.finalize(), strict=True):
        assert (one != other).sum() == 0
    assert whole["parity"].table.finalize()[0].sum() == (values > 0).sum()


def test_a_statistic_that_is_not_there_is_an_error_that_names_it(analysis: Path, request: pytest.FixtureRequest) -> None:
    with pytest.raises(InputError, match=r"statistic 'squares': there is none of that name; choose one of bins, counts"):
        Analysis(analysis).arrays_of("squares")
    with pytest.raises(InputError, match=r"statistic 'documents': writes no table"):
        Analysis(analysis).table("documents")
    request.getfixturevalue("added")
    with pytest.raises(InputError, match=r"was made without the statistic 'squares'"):
        Analysis(analysis).arrays_of("squares")
    with pytest.raises(InputError, match=r"was made without the statistic 'parity'"):
        Analysis(analysis).table("parity")


def test_every_statistic_reads_back_under_the_names_that_it_declares(analysis: Path) -> None:
    opened = Analysis(analysis)
    for name, kind in statistics().items():
        assert set(opened.arrays_of(name)) == set(kind.arrays)
    np.testing.assert_array_equal(opened.arrays_of("counts")["features/fires"], opened.fires)
    np.testing.assert_array_equal(opened.table("tokens").whole().sum(axis=1), opened.fires)
