"""Firings drawn from the feature index are those drawn by a scan of all codes, bit for bit; and when which is read."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tablekit import codes_manifest, text_table, write_table_store

from actstore import paths
from actstore.errors import DamagedStore
from pipelines.causal.engine import drawn_firings
from pipelines.causal.engine.drawn_firings import COLUMNS, PART, DrawnFirings, draw_firings
from pipelines.codes.build_index import build_index
from pipelines.codes.code_store import CodeStore, read_codes

N_FEATURES, K = 12, 5
ALWAYS_ON, DEAD = 4, 11


def ragged(places: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """Rows of 1 to 5 codes whose features lie in no order; feature 4 is always on, the last never."""
    indices, values = np.zeros((len(places), K), np.uint16), np.zeros((len(places), K), np.float32)
    for i, place in enumerate(places.tolist()):
        rng = np.random.default_rng((5, place))
        others = rng.permutation(np.setdiff1d(np.arange(N_FEATURES), [ALWAYS_ON, DEAD]))[: K - 1]
        indices[i] = rng.permutation([ALWAYS_ON, *others])
        values[i] = rng.integers(0, 9, K) / 4
        values[i, indices[i] == ALWAYS_ON] = 1
    return {"codes/index": indices, "codes/value": values}


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, client: Any) -> Path:
    """Two segments of several shards, whose bounds cut windows; with its index. Read-only."""
    texts = {f"books/{i}.txt": f"The fox {i} went to the wood. " * (1 + i % 5) for i in range(9)}
    table, codec, files = text_table(texts, model_folder)
    out = tmp_path_factory.mktemp("indexed") / "codes"
    manifest = codes_manifest(N_FEATURES, K, codec)
    write_table_store(out, manifest, table, ragged, files, shard_rows=48, chunk_rows=16, n_segments=2)
    build_index(CodeStore(out), client)
    return out


@pytest.fixture
def by(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`draw_firings` in a way that is named, whatever the rule would choose."""

    def draw(way: str, *asked: Any, **options: Any) -> DrawnFirings:
        with monkeypatch.context() as patch:
            patch.setattr(drawn_firings, "reads_index", lambda *_: way == "index")
            return draw_firings(*asked, **options)

    return draw


def require_same(one: DrawnFirings, other: DrawnFirings) -> None:
    assert one.rows == other.rows
    for name in (*COLUMNS, "total"):
        mine, others = getattr(one, name), getattr(other, name)
        assert mine.dtype == others.dtype, name
        np.testing.assert_array_equal(mine, others, err_msg=name)


def codes_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of row arrays that are read from here on, one a read."""
    names: list[str] = []
    read = CodeStore.read

    def recording(self: CodeStore, shard: Any, name: str, *rows: int) -> Any:
        names.append(name)
        return read(self, shard, name, *rows)

    monkeypatch.setattr(CodeStore, "read", recording)
    return names


@settings(max_examples=60, deadline=None)
@given(
    features=st.sets(st.integers(0, N_FEATURES - 1), min_size=1),
    n=st.integers(0, 9),
    seed=st.integers(0, 2**32),
    half=st.sampled_from([None, 0, 1]),
    level=st.sampled_from([None, 0.0, 0.3, 0.5, 1.75, 9.0]),
)
def test_a_draw_from_the_index_is_that_of_a_scan(
    indexed: Path, features: set[int], n: int, seed: int, half: int | None, level: float | None
) -> None:
    above = None if level is None else level * np.linspace(0.5, 1, N_FEATURES)
    asked = CodeStore(indexed), np.array(sorted(features)), n, seed, half, above
    drawn = []
    for way in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(drawn_firings, "reads_index", lambda *_, way=way: way)
            drawn.append(draw_firings(*asked))
    require_same(*drawn)


def test_the_cases_hold_what_could_go_wrong(indexed: Path) -> None:
    """Two segments, windows that a shard's bound cuts, rows with several features in no order, rows without a next token."""
    codes = CodeStore(indexed)
    shards = codes.shards(PART)
    assert {shard.segment for shard in shards} == {0, 1}
    ends = [codes.read(shard, "rows/window")[[0, -1]].tolist() for shard in shards]
    assert any(one[1] == other[0] for one, other in pairwise(ends))
    indices, values = read_codes(codes, shards[0])
    assert (np.diff(indices, axis=1) < 0).any()
    assert len(set((values > 0).sum(axis=1).tolist())) > 2
    drawn = draw_firings(codes, None, 3, 0)
    assert 0 < drawn.rows < sum(shard.n_rows for shard in shards)
    assert drawn.total[ALWAYS_ON] == drawn.rows
    assert drawn.total[DEAD] == 0


def test_one_feature_is_drawn_without_reading_codes(indexed: Path, by: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    names = codes_read(monkeypatch)
    by("index", CodeStore(indexed), np.array([3]), 4, 0)
    assert set(names) == {"rows/window", "rows/position"}
    by("scan", CodeStore(indexed), np.array([3]), 4, 0)
    assert "codes/index" in names


def test_the_index_is_read_where_the_features_have_few_firings(indexed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes, names = CodeStore(indexed), codes_read(monkeypatch)
    draw_firings(codes, np.array([DEAD]), 4, 0)
    assert "codes/index" not in names
    draw_firings(codes, np.array([ALWAYS_ON]), 4, 0)
    assert "codes/index" in names, "a feature of more than a hundredth of all firings is scanned for"


def test_a_feature_that_counts_as_firing_at_zero_is_scanned_for(indexed: Path, by: Any) -> None:
    above = np.full(N_FEATURES, -1.0)
    asked = CodeStore(indexed), np.array([0]), 4, 0, None, above
    require_same(by("index", *asked), by("scan", *asked))


def test_without_an_index_of_these_codes_they_are_scanned(indexed: Path, by: Any, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(indexed, tmp_path / "codes"))
    (bare / paths.INDEX_RECORD).unlink()
    require_same(by("index", CodeStore(bare), np.array([3]), 4, 0), by("scan", CodeStore(indexed), np.array([3]), 4, 0))


def test_a_damaged_index_is_an_error_that_names_it(indexed: Path, by: Any, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(indexed, tmp_path / "codes"))
    (damaged / paths.index_object("rows", 0)).unlink()
    with pytest.raises(DamagedStore, match=r"drops the feature index"):
        by("index", CodeStore(damaged), np.array([3]), 4, 0)
