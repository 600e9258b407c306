"""Runs compared: itself is 1, a permuted copy is matched exactly, random ones give what chance gives."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp
import torch
from modelkit import run_cli
from numpy.typing import NDArray

from actstore.errors import IdentityMismatch, InputError, OutputExists
from actstore.sealed_folder import open_sealed
from pipelines.compare import stage as comparing
from pipelines.compare import superposition as plots
from pipelines.compare.coactivation import best_correlations, correlations
from pipelines.compare.same_rows import code_source, encoded_source, shared_codes
from pipelines.compare.stage import CompareConfig, compare
from pipelines.compare.superposition import SuperpositionConfig, superposition
from pipelines.compare.table import compare_lines
from pipelines.metrics.directions import all_pairs, best_cosines, match_one_to_one, random_directions, unit_rows
from pipelines.sae.architectures.topk import TopKSae
from pipelines.sae.checkpoint import load_run, save_run

ROWS = 600


@pytest.fixture(scope="module")
def permutation() -> NDArray[np.int64]:
    return np.random.default_rng(0).permutation(64)


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory, run: Path, permutation: NDArray[np.int64]) -> dict[str, Path]:
    """The run of the tests, `permuted`: its features in another order; `random`: untrained, other directions; `narrow`: of
    half the width and another d_model."""
    folder = tmp_path_factory.mktemp("runs")
    sae, record = load_run(run)
    order = torch.from_numpy(permutation)
    permuted = TopKSae(sae.d_model, sae.n_features, sae.k)
    permuted.load_state_dict(
        {name: value[order] if len(value) == sae.n_features else value for name, value in sae.state_dict().items()}
    )
    random = TopKSae(sae.d_model, sae.n_features, sae.k, seed=7)
    narrow = TopKSae(16, 32, sae.k, seed=8)
    save_run(folder / "permuted", permuted, record)
    save_run(folder / "random", random, record)
    save_run(folder / "narrow", narrow, replace(record, d_model=16, n_features=32))
    return {"run": run, **{name: folder / name for name in ("permuted", "random", "narrow")}}


def both(found: dict[str, Any]) -> list[dict[str, Any]]:
    (pair,) = found["pairs"]
    return [pair["decoder"], pair["coactivation"]]


def test_a_run_compared_with_itself_shares_everything(run: Path, store: Path) -> None:
    found = compare(CompareConfig(runs=(run, run), store=(str(store),), rows=ROWS))
    assert found["rows"] == ROWS
    for means in both(found):
        assert means["mean_best"] == pytest.approx([1, 1], abs=1e-5)
        assert means["shared"][0] == pytest.approx(
            {"features_0.7": 1, "firings_0.7": 1, "features_0.9": 1, "firings_0.9": 1}
        )
        assert means["one_to_one"]["mean"] == pytest.approx(1, abs=1e-5)
        assert means["random"] < 0.8
    assert found["stability"] is None


def test_a_permuted_copy_is_matched_feature_by_feature(
    copies: dict[str, Path], store: Path, permutation: NDArray[np.int64], tmp_path: Path
) -> None:
    config = CompareConfig(runs=(copies["run"], copies["permuted"]), store=(str(store),), rows=ROWS, out=tmp_path / "out")
    found = compare(config)
    for means in both(found):
        assert means["mean_best"] == pytest.approx([1, 1], abs=1e-5)
        assert means["one_to_one"]["share_0.9"] == 1
    table = pq.read_table(tmp_path / "out" / "features.parquet").to_pylist()
    mine = [row for row in table if row["run"] == "permuted"]
    assert len(mine) == 64
    live = [row for row in mine if row["fires"]]
    assert len(live) > 20
    assert all(row[f"partner {copies['run'].name}"] == permutation[row["feature"]] for row in live)
    correlated = [row for row in live if row[f"correlation {copies['run'].name}"] > 0.999]
    assert len(correlated) == len(live)


def test_random_directions_share_what_chance_gives(copies: dict[str, Path]) -> None:
    found = compare(CompareConfig(runs=(copies["run"], copies["random"])))
    (pair,) = found["pairs"]
    assert "coactivation" not in pair
    assert found["rows"] == 0
    decoder = pair["decoder"]
    assert decoder["mean_best"][0] == pytest.approx(decoder["random"], abs=0.03)
    assert decoder["shared"][0]["features_0.9"] == 0
    assert decoder["one_to_one"]["pairs"] == 64
    printed = "\n".join(compare_lines(found))
    assert f"{decoder['random']:.3f}" in printed


def test_three_runs_give_each_feature_its_stability(copies: dict[str, Path], store: Path, tmp_path: Path) -> None:
    runs = tuple(copies[name] for name in ("run", "permuted", "random"))
    found = compare(CompareConfig(runs=runs, store=(str(store),), rows=20, out=tmp_path / "out"))
    assert len(found["pairs"]) == 3
    assert found["runs"][0]["live"] < 64
    rows = [row for row in pq.read_table(tmp_path / "out" / "features.parquet").to_pylist() if row["run"] == "run"]
    for row in rows:
        if not row["fires"]:
            assert row["stability"] is row["correlation permuted"] is row["coactive partner permuted"] is None
            continue
        assert row["coactive partner permuted"] is not None
        assert row["stability"] == pytest.approx((row["cosine permuted"] + row["cosine random"]) / 2, abs=1e-6)
        assert row["cosine permuted"] > 0.9999 > row["cosine random"]
    kept = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert kept["stability"] == found["stability"]
    assert found["stability"]["run"]["mean"] == pytest.approx(np.mean([row["stability"] for row in rows if row["fires"]]))
    with pytest.raises(OutputExists):
        compare(CompareConfig(runs=runs, out=tmp_path / "out"))


def test_codes_give_the_same_as_the_rows_they_were_made_from(
    run: Path, copies: dict[str, Path], store: Path, codes: Path
) -> None:
    """All rows of both splits, the rows of one in (window, position) order and of the other shuffled."""
    from_rows = compare(CompareConfig(runs=(run, run), store=(str(store),), rows=10**6))
    from_codes = compare(CompareConfig(runs=(run, run), codes=(str(codes), str(codes)), rows=10**6))
    assert from_rows["rows"] == from_codes["rows"] > ROWS
    for ours, theirs in zip(both(from_rows), both(from_codes), strict=True):
        assert ours["mean_best"] == pytest.approx(theirs["mean_best"], abs=1e-6)
        for mine, other in zip(ours["shared"], theirs["shared"], strict=True):
            assert mine == pytest.approx(other, abs=1e-6)
    sae, record = load_run(run)
    sources = [encoded_source(str(store), sae, record, run), code_source(str(codes), record, run)]
    encoded, read = (shared.toarray() for shared in shared_codes(sources, 10**6))
    assert len(encoded) == from_rows["rows"]
    assert encoded.any()
    np.testing.assert_allclose(encoded, read, rtol=1e-3, atol=1e-3)
    with pytest.raises(IdentityMismatch, match="pass codes in the order of the runs"):
        compare(CompareConfig(runs=(run, copies["random"]), codes=(str(codes), str(codes))))


def test_other_widths_are_compared_by_rows_alone_and_refused_without_any(copies: dict[str, Path]) -> None:
    with pytest.raises(InputError, match=r"^d_model: run 32, narrow 16: directions of different widths have no cosine"):
        compare(CompareConfig(runs=(copies["run"], copies["narrow"])))


def test_other_text_is_refused(run: Path, store: Path, small_store: Path, tmp_path: Path) -> None:
    from actstore.reader import ActivationStore
    from pipelines.compare.same_rows import Source, shared_codes

    def never(*_: object) -> Any:
        raise AssertionError

    sources = [Source(ActivationStore(path), never) for path in (store, small_store)]
    with pytest.raises(IdentityMismatch, match="hold other text, or other windows of it"):
        shared_codes(sources, 100)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"runs": (Path("a"),)}, "runs: 1 given; pass at least 2"),
        ({"store": ("s",), "codes": ("c", "d")}, "store, codes: both given"),
        ({"store": ("s",) * 3}, "store: 3 given for 2 runs; pass one for all, or one for each"),
        ({"codes": ("s",)}, "codes: 1 given for 2 runs; pass one for each"),
        ({"rows": 0}, "rows 0: need at least 1."),
    ],
)
def test_what_cannot_be_compared_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CompareConfig(**{"runs": (Path("a"), Path("b")), **change})


def test_the_command_prints_every_pair(copies: dict[str, Path]) -> None:
    done = run_cli("compare", copies["run"], copies["permuted"])
    assert done.returncode == 0, done.stderr
    assert "run -> permuted" in done.stdout
    assert "decoder cosine" in done.stdout
    assert "1.000" in done.stdout


# Against dense references


def test_correlations_are_those_of_numpy() -> None:
    generator = np.random.default_rng(1)
    a = np.where(generator.random((200, 5)) < 0.3, generator.random((200, 5)), 0)
    b = np.where(generator.random((200, 4)) < 0.3, generator.random((200, 4)), 0)
    b[:, 0] = a[:, 2] * 3
    a[:, 4] = 0
    b[:, 3] = 1.5
    found, jaccard = correlations(sp.csc_array(a), sp.csc_array(b))
    with np.errstate(invalid="ignore", divide="ignore"):
        expected = np.nan_to_num(np.corrcoef(a.T, b.T)[:5, 5:])
    expected[:, 3] = 0
    np.testing.assert_allclose(found, expected, atol=1e-6)
    for i in range(5):
        for j in range(4):
            x, y = a[:, i] > 0, b[:, j] > 0
            assert jaccard[i, j] == pytest.approx((x & y).sum() / max((x | y).sum(), 1))
    best, overlap, which = best_correlations(sp.csc_array(a), sp.csc_array(b))
    np.testing.assert_allclose(best, expected.max(axis=1), atol=1e-6)
    np.testing.assert_array_equal(which[:4], expected.argmax(axis=1)[:4])
    np.testing.assert_allclose(overlap, jaccard.max(axis=1))
    assert which[2] == 0
    assert best[2] == pytest.approx(1)


def test_best_cosines_and_matching_are_those_of_a_full_table() -> None:
    one, other = random_directions(40, 6, 0), random_directions(30, 6, 1)
    table = one @ other.T
    best, which = best_cosines(one, other)
    np.testing.assert_allclose(best, table.max(axis=1), atol=1e-6)
    np.testing.assert_array_equal(which, table.argmax(axis=1))
    partner = match_one_to_one(table)
    taken = partner[partner >= 0]
    assert len(taken) == len(set(taken.tolist())) == 30
    greedy = sum(table[i, i] for i in range(30))
    assert table[partner >= 0, taken].sum() > greedy


def test_all_pairs_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines.metrics import directions as cosines

    monkeypatch.setattr(cosines, "BLOCK_COSINES", 100)
    directions = unit_rows(np.random.default_rng(2).standard_normal((33, 5)))
    bins = np.linspace(0, 1, 11)
    counts, largest = all_pairs(directions, bins)
    table = np.abs(directions @ directions.T)
    upper = table[np.triu_indices(33, 1)]
    np.testing.assert_array_equal(counts, np.histogram(np.minimum(upper, 1), bins=bins)[0])
    assert counts.sum() == 33 * 32 // 2
    np.fill_diagonal(table, -1)
    np.testing.assert_allclose(largest, table.max(axis=1), atol=1e-6)


def test_a_comparison_stopped_between_its_files_is_not_there(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = CompareConfig(runs=(run, run), out=tmp_path / "out")
    for name in ("json_bytes", "seal_folder"):
        with monkeypatch.context() as patched:
            patched.setattr(comparing, name, stop)
            with pytest.raises(KeyboardInterrupt):
                compare(asked)
        assert not list(tmp_path.iterdir())
    compare(asked)
    assert open_sealed(tmp_path / "out", "compare", "compare").record()["rows"] == 0


def test_plots_stopped_between_files_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = SuperpositionConfig(tmp_path / "out", steps=10, sparsities=2)
    for name in ("json_bytes", "seal_folder"):
        with monkeypatch.context() as patched:
            patched.setattr(plots, name, stop)
            with pytest.raises(KeyboardInterrupt):
                superposition(asked)
        assert not list(tmp_path.iterdir())
    superposition(asked)
    assert open_sealed(tmp_path / "out", "superposition", "superposition").record()["features"] == 20


def stop(*_: object) -> None:
    raise KeyboardInterrupt
