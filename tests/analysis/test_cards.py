"""What `features` and `feature` print, on an analysis small enough to work out by hand."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tablekit import codes_manifest, dense_codes, text_table, write_table_store

from actstore.errors import InputError
from actstore.folder import Folder
from actstore.sealed_folder import seal_folder
from pipelines.analysis.cards import feature_card, feature_lines, feature_rows, features_lines, joint_lines, joint_rows
from pipelines.analysis.reader import Analysis
from pipelines.analysis.stage import AnalyzeConfig, analyze
from pipelines.shared.parquet import parquet_bytes

TEXTS = {"one.txt": " fox owl fox mole\n", "two.txt": " owl fox\n owl fox"}
VALUES = {
    " fox": (2.0, 1.0, 0.0),
    " owl": (0.0, 3.0, 0.0),
    "\n": (0.5, 0.0, 0.0),
}
"""Activations of features 0, 1 and 2 on each token; other tokens fire none."""


@pytest.fixture(scope="module")
def analysis(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, client: Any) -> Analysis:
    table, codec, files = text_table(TEXTS, model_folder, modulus=0)
    texts = codec.token_texts()
    values = np.array([VALUES.get(texts[token], (0.0, 0.0, 0.0)) for token in table.ids], np.float32)
    folder = tmp_path_factory.mktemp("terminal")
    manifest = codes_manifest(3, 3, codec)
    write_table_store(folder / "codes", manifest, table, lambda index: dense_codes(values[index]), files)
    analyze(AnalyzeConfig(codes=folder / "codes", out=folder / "analysis", examples=2, before=2, after=1), client)
    return Analysis(folder / "analysis")


def test_the_table_of_features_is_this(analysis: Analysis) -> None:
    n = analysis.n_rows
    expected = [
        "feature    fires band          mean     peak documents  tokens (share of firings)",
        f"      1 {7 / n:>8.3%} common       1.857    3.000         2  ' fox' 57%  ' owl' 43%",
        f"      0 {6 / n:>8.3%} common       1.500    2.000         2  ' fox' 67%  '⏎' 33%",
        f"      2 {0:>8.3%} dead         0.000    0.000         0  ",
    ]
    assert features_lines(feature_rows(analysis, "frequency", 10)) == expected
    assert features_lines(feature_rows(analysis, "frequency", 1)) == expected[:2]


@pytest.mark.parametrize(
    ("sort", "order"), [("frequency", [1, 0, 2]), ("mean", [1, 0, 2]), ("peak", [1, 0, 2]), ("id", [0, 1, 2])]
)
def test_features_come_in_the_order_asked_for(analysis: Analysis, sort: str, order: list[int]) -> None:
    assert [row["feature"] for row in feature_rows(analysis, sort, 3)] == order


def test_the_card_of_a_feature_is_this(analysis: Analysis) -> None:
    n = analysis.n_rows
    rows = analysis.document_rows.astype(float)
    inside = 3 * 2 + 4 * 3  # ordered pairs of firings: three in the first document, four in the second
    bursts = inside / (rows * (rows - 1)).sum() / (7 * 6 / (n * (n - 1)))
    assert feature_lines(feature_card(analysis, 1)) == [
        f"feature 1: fires in 7 rows ({7 / n:.3%}, common), mean 1.857, peak 3.000",
        "activations: median 1.031, 5 to 95 % 1.031 to 3.062",
        f"in 2 documents (100.0%); two firings share one {bursts:.1f}x as often as two rows",
        f"firings in the first, second half of a window: {7}, 0",
        "tokens (share of its firings; share of the token's rows it fires on):",
        "  ' fox'            57.1% 100.0%",
        "  ' owl'            42.9% 100.0%",
        "fires together with (rows; times more often than if independent):",
        f"  feature 0               4 {4 * n / 42:>8.1f}x",
        "strongest firings, each from another window:",
        "  3.000  one.txt",
        "     fox[ owl] fox",
        "    ▃▃▃▃██████▃▃▃▃",
    ]


def test_the_card_tells_which_partners_are_beyond_the_null_of_structure(analysis: Analysis, tmp_path: Path) -> None:
    shutil.copytree(str(analysis.place), tmp_path / "analysis")
    found = Analysis(tmp_path / "analysis")
    assert feature_card(found, 1)["partners_beyond_chance"] is None
    pairs = {
        "left": [0, 1, 1, 1, 0],
        "right": [1, 2, 3, 4, 2],
        "count_2": [40, 90, 70, 1, 5],
        "expected_2": [4.0, 15.0, 7.0, 9.0, 1.0],
        "lift_2": [10.0, 6.0, 10.5, 0.1, 5.0],
        "replicated": [True, True, False, True, True],
    }
    (tmp_path / "analysis/structure").mkdir()
    (tmp_path / "analysis/structure/pairs.parquet").write_bytes(parquet_bytes({n: np.array(v) for n, v in pairs.items()}))
    assert found.partners_beyond_chance(1) is None, "not finished: it has no seal"
    seal_folder(Folder(tmp_path / "analysis/structure"), "structure", "pairs.parquet")
    assert found.partners_beyond_chance(1) == [(0, 40, 4.0, 10.0), (2, 90, 15.0, 6.0)]
    assert found.partners_beyond_chance(1, 1) == [(0, 40, 4.0, 10.0)]
    lines = feature_lines(feature_card(found, 1))
    at = lines.index("together beyond the null of structure (rows on its second half; expected; times that):")
    assert lines[at + 1 : at + 3] == [
        f"  feature 0        {40:>8,} {4.0:>10.1f} {10.0:>8.1f}x",
        f"  feature 2        {90:>8,} {15.0:>10.1f} {6.0:>8.1f}x",
    ]


def test_a_dead_feature_has_only_its_first_line(analysis: Analysis) -> None:
    assert feature_lines(feature_card(analysis, 2)) == ["feature 2: fires in 0 rows (0.000%, dead), mean 0.000, peak 0.000"]


@pytest.mark.parametrize("feature", [-1, 3])
def test_a_feature_that_is_not_there_is_refused(analysis: Analysis, feature: int) -> None:
    with pytest.raises(InputError, match=f"feature {feature}: .* has 3 features; choose 0 to 2"):
        feature_card(analysis, feature)


def test_an_order_that_is_not_there_is_refused(analysis: Analysis) -> None:
    with pytest.raises(InputError, match="sort 'size': choose one of frequency, mean, peak, documents, burstiness, id"):
        feature_rows(analysis, "size", 3)


def test_the_joint_frequencies_are_this(analysis: Analysis) -> None:
    n = analysis.n_rows
    assert joint_lines(joint_rows(analysis, 20)) == [
        "share of rows in which both fire:",
        "               1       0",
        f"       1{7 / n:>8.3%}{4 / n:>8.3%}",
        f"       0{4 / n:>8.3%}{6 / n:>8.3%}",
    ]


def test_examples_of_a_kind_that_is_not_there_are_refused(analysis: Analysis) -> None:
    assert [example["value"] for example in feature_card(analysis, 1, "strata")["examples"]] == [1, 3]
    with pytest.raises(InputError, match="examples 'best': choose one of top, strata, random"):
        feature_card(analysis, 1, "best")
