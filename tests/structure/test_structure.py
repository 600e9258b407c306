"""Structure where it was planted, none where there is none; chosen on one half of the documents, tested on the other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from tablekit import codes_manifest, dense_codes, text_table, token_table, write_table_store

from actstore.errors import IdentityMismatch, InputError, OutputExists
from cli import cli
from pipelines.analysis.reader import Analysis
from pipelines.analysis.stage import AnalyzeConfig, analyze
from pipelines.codes.code_store import CodeStore
from pipelines.shared.cluster import connect
from pipelines.structure import effect_sizes as effects
from pipelines.structure import facts, planted, stage
from pipelines.structure.graph import adjusted_rand
from pipelines.structure.null import candidates, hypergeometric
from pipelines.structure.null_rounds import MIN_EXPECTATION, Q
from pipelines.structure.page import findings_page, summary_lines
from pipelines.structure.sample import cut_blocks, sample_halves
from pipelines.structure.stage import StructureConfig, seek, structure
from pipelines.text.tokens import document_half

N_FEATURES, SIZES = 120, [15, 12, 10, 8, 6]


@pytest.fixture(autouse=True, scope="module")
def _fewer_further_draws() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "NULL_DRAWS", 5)
        yield


def sought(
    client: Any, make: Callable[[np.random.Generator], NDArray[np.bool_]], seed: int = 0, draws: int = 20, rows: int = 500
) -> facts.Sought:
    """Both halves drawn from one generator, in documents of `rows` rows, and what is found in them."""
    rng = np.random.default_rng(seed)
    samples = (planted.sample_of(make(rng), rows), planted.sample_of(make(rng), rows))
    return seek(client, samples, draws, 2.0, seed, None, planted.Unnamed())  # type: ignore[arg-type]


# Where there is nothing


@pytest.mark.parametrize("kind", planted.NOTHING)
def test_codes_without_structure_give_no_calls_and_no_community(kind: str, client: Any) -> None:
    found = sought(client, lambda rng: planted.nothing(kind, 10, 60, rng, 200), rows=200)
    record, table = facts.pairs_facts(found)
    assert record["tested"] > 300
    assert record["called"] <= 0.01 * record["tested"]
    assert max(record["called_in_null_draws"]) <= 0.01 * record["tested"]
    assert not facts.communities_facts(found)[0]["reported"]
    assert facts.implications_facts(found)["replicated"] == 0
    assert len(table["left"]) == record["attracted"]["called"] + record["repelled"]["called"]


def test_under_independence_bursts_alone_would_be_called(client: Any) -> None:
    found = sought(client, lambda rng: planted.nothing("bursty", 16, 40, rng, 400), rows=400)
    record, _ = facts.pairs_facts(found)
    assert record["called_under_independence"] > 0.05 * record["tested"]
    assert record["called_under_independence_alone"] > 0.05 * record["tested"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", planted.NOTHING)
def test_of_twenty_seeds_at_least_nineteen_report_no_community(kind: str, client: Any) -> None:
    """On little data; `benchmarks/structure.py` does the same with a hundred draws of larger tables."""
    reported = 0
    for seed in range(20):
        found = sought(client, lambda rng: planted.nothing(kind, 8, N_FEATURES, rng), seed, draws=20)
        record, _ = facts.pairs_facts(found)
        assert record["called"] <= 0.01 * record["tested"]
        reported += facts.communities_facts(found)[0]["reported"]
    assert reported <= 1


# Where something was planted


def test_planted_communities_are_recovered_and_replicated(client: Any) -> None:
    found = sought(client, lambda rng: planted.communities(10, N_FEATURES, SIZES, rng)[0])
    truth = planted.communities(1, N_FEATURES, SIZES, np.random.default_rng(0))[1]
    record, table = facts.communities_facts(found)
    assert record["reported"]
    labels = -1 - np.arange(N_FEATURES)
    labels[table["feature"]] = table["community"]
    grouped = truth >= 0
    assert adjusted_rand(labels[grouped], truth[grouped]) >= 0.95
    for community in record["communities"]:
        assert community["replicated"]
        assert 1 < community["lift_2_low"] < community["lift_2"] < community["lift_2_high"]


def test_a_planted_implication_is_found_in_its_direction_and_an_absorber_is_none(client: Any) -> None:
    made: dict[str, tuple[int, int]] = {}

    def make(rng: np.random.Generator) -> NDArray[np.bool_]:
        fired, truth = planted.hierarchy(8, 40, rng)
        made.update(truth)
        return fired

    found = sought(client, make)
    implications = facts.implications_facts(found)
    held = {(arrow["source"], arrow["target"]) for arrow in implications["arrows"] if arrow["replicated"]}
    assert held == {made["implication"], made["second"]}
    assert implications["followed_from_others"] == 1
    for arrow in implications["arrows"]:
        assert arrow["target_given_source_2"] == 1.0
        assert arrow["null_2"] < 0.5
    _, table = facts.pairs_facts(found)
    absorber, concept = made["absorber"]
    (place,) = np.flatnonzero((table["left"] == concept) & (table["right"] == absorber))
    assert table["count_2"][place] == 0
    assert table["replicated"][place]
    assert table["lift_1"][place] < 0.5


def test_intervals_over_documents_hold_the_lift_and_widen_with_fewer_documents(client: Any) -> None:
    widths = []
    for n_documents in (8, 24):
        found = sought(client, lambda rng, n=n_documents: planted.communities(n, N_FEATURES, SIZES, rng)[0])  # type: ignore[misc]
        _, table = facts.pairs_facts(found)
        inside = (table["lift_2_low"] <= table["lift_2"]) & (table["lift_2"] <= table["lift_2_high"])
        assert inside.mean() > 0.9
        is_attracted = table["lift_1"] > 1
        assert is_attracted.sum() > 20
        widths.append(
            np.median(((table["lift_2_high"] - table["lift_2_low"])[is_attracted]) / table["lift_2"][is_attracted])
        )
    assert widths[1] < 0.85 * widths[0]


def test_the_documents_counts_add_up_to_the_pairs_counts() -> None:
    sample = planted.sample_of(planted.nothing("bursty", 5, 30, np.random.default_rng(0)), block_rows=100)
    pairs = candidates(sample.table, 5)
    counts = sum(part.sum(axis=0) for _, part, _ in effects.by_documents(sample, pairs))
    expected = sum(part.sum(axis=0) for _, _, part in effects.by_documents(sample, pairs))
    assert np.array_equal(counts, pairs.count(sample.table))
    np.testing.assert_allclose(expected, hypergeometric(sample.table, pairs)[0])


# The stage


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, client: Any) -> Path:
    """A folder with `codes` of planted communities and a hierarchy, and their `analysis`."""
    folder = tmp_path_factory.mktemp("planted")
    _, codec, files = text_table({"one": "a text"}, model_folder)
    rng = np.random.default_rng(0)
    vocabulary = codec.n_vocabulary
    documents = [rng.integers(2, vocabulary, 119).tolist() for _ in range(100)]
    table = token_table(documents, 4, separator=codec.separator_token_id)
    fired, _ = planted.communities(100, 40, [8, 6], rng, rows=120)
    fired[:, 30] = rng.random(len(fired)) < 0.2
    fired[:, 31] = fired[:, 30] & (rng.random(len(fired)) < 0.4)
    values = np.where(fired, rng.uniform(1, 2, fired.shape), 0).astype(np.float32)
    manifest = codes_manifest(40, 40, codec)
    write_table_store(folder / "codes", manifest, table, lambda index: dense_codes(values[index]), files, shard_rows=2048)
    analyze(AnalyzeConfig(codes=folder / "codes", out=folder / "analysis", examples=2), client)
    return folder


def config_of(made: Path, out: Path, **asked: Any) -> StructureConfig:
    settings = {"draws": 20, "rows": 100_000, "block_rows": 200, **asked}
    return StructureConfig(analysis=made / "analysis", codes=str(made / "codes"), out=out, **settings)


@pytest.fixture(scope="module")
def result(made: Path, tmp_path_factory: pytest.TempPathFactory, client: Any) -> Path:
    out = tmp_path_factory.mktemp("found") / "structure"
    structure(config_of(made, out), client)
    return out


def test_a_feature_is_shown_with_its_replicated_partners(made: Path, result: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "analysis", tmp_path / "analysis")
    shutil.copytree(result, tmp_path / "analysis/structure")
    analysis, pairs = Analysis(tmp_path / "analysis"), pd.read_parquet(result / "pairs.parquet")
    pairs = pairs[pairs.replicated & (pairs.lift_2 > 1)]
    assert len(pairs) > 3
    for feature in range(analysis.n_features):
        own = pairs[(pairs.left == feature) | (pairs.right == feature)].sort_values("lift_2", ascending=False, kind="stable")
        partner = (own.left + own.right - feature).tolist()
        expected = list(zip(partner, own.count_2, own.expected_2, own.lift_2, strict=True))
        assert analysis.partners_beyond_chance(feature, len(own)) == expected


def test_the_halves_are_whole_documents_in_the_order_of_the_text(made: Path, client: Any) -> None:
    codes = CodeStore(made / "codes")
    names = codes.document_names(0)
    halves = sample_halves(codes, 100_000, 100, 0, client)
    assert sum(half.table.n_rows for half in halves) == codes.n_rows("train") + codes.n_rows("heldout")
    for number, half in enumerate(halves):
        assert {document_half(names[i]) for i in codes.documents_of(0, half.tokens)} == {number}
        assert half.n_documents == half.n_corpus_documents == [document_half(name) for name in names].count(number)
        for document in range(half.n_documents):
            own = half.tokens[half.documents == document]
            assert (np.diff(own) > 0).all()
            assert len(set(codes.documents_of(0, own).tolist())) == 1
        assert np.bincount(half.table.blocks).max() <= 100


def test_fewer_rows_take_fewer_documents_and_another_seed_others(made: Path, client: Any) -> None:
    codes = CodeStore(made / "codes")
    few = sample_halves(codes, 1000, 100, 0, client)
    assert all(half.n_documents < half.n_corpus_documents for half in few)
    again, other = sample_halves(codes, 1000, 100, 0, client), sample_halves(codes, 1000, 100, 1, client)
    assert np.array_equal(few[0].tokens, again[0].tokens)
    assert not np.array_equal(few[0].tokens, other[0].tokens)


def test_blocks_are_documents_cut_into_stretches_of_nearly_equal_length() -> None:
    documents = np.repeat([0, 1, 2], [10, 3, 7])
    blocks = cut_blocks(documents, 4)
    assert np.bincount(blocks).tolist() == [4, 3, 3, 3, 4, 3]
    assert np.array_equal(cut_blocks(documents, 100), documents)


def test_the_record_the_tables_and_the_page_say_the_same(result: Path) -> None:
    record = json.loads((result / "structure.json").read_text())
    page = (result / "findings.md").read_text()
    assert sorted(path.name for path in result.iterdir()) == [
        "communities.parquet",
        "findings.md",
        "pairs.parquet",
        "structure.json",
    ]
    assert findings_page(record) == page
    assert record["communities"]["reported"]
    pairs = pq.read_table(result / "pairs.parquet").to_pydict()
    assert len(pairs["left"]) == record["pairs"]["attracted"]["called"] + record["pairs"]["repelled"]["called"]
    assert sum(pairs["replicated"]) == record["pairs"]["attracted"]["replicated"] + record["pairs"]["repelled"]["replicated"]
    assert max(pairs["q_1"]) <= Q
    assert min(pairs["expected_1"]) >= MIN_EXPECTATION
    communities = pq.read_table(result / "communities.parquet").to_pydict()
    listed = [(one["community"], f) for one in record["communities"]["communities"] for f in one["features"]]
    assert sorted(zip(communities["community"], communities["feature"], strict=True)) == sorted(listed)
    assert f"{record['pairs']['called']:,} of {record['pairs']['tested']:,}" in page
    assert "**31 ⇒ 30**" in page
    assert any("communities" in line for line in summary_lines(record))


def test_examples_are_places_where_the_features_fire_together(result: Path, made: Path) -> None:
    record = json.loads((result / "structure.json").read_text())
    (arrow,) = [arrow for arrow in record["implications"]["arrows"] if (arrow["source"], arrow["target"]) == (31, 30)]
    assert len(arrow["examples"]) == 3
    assert all(document_half(example["document"]) == 1 for example in arrow["examples"])
    assert all(example["text"].count("⟦") == 1 for example in arrow["examples"])


def test_two_processes_publish_the_same_bytes_as_one_thread(result: Path, made: Path, tmp_path: Path) -> None:
    with connect(None, 2) as client:
        structure(config_of(made, tmp_path / "again"), client)
    for path in result.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_another_seed_finds_the_same_communities(result: Path, made: Path, tmp_path: Path, client: Any) -> None:
    structure(config_of(made, tmp_path / "other", seed=5), client)
    both = [json.loads((folder / "structure.json").read_text()) for folder in (result, tmp_path / "other")]
    sets = [{tuple(one["features"]) for one in record["communities"]["communities"]} for record in both]
    assert sets[0] == sets[1]
    assert both[0]["pairs"]["called_in_null_draws"] is not None


# What is refused


def test_an_output_that_is_there_is_not_touched(result: Path, made: Path, client: Any) -> None:
    before = (result / "structure.json").read_bytes()
    with pytest.raises(OutputExists, match="move it away"):
        structure(config_of(made, result), client)
    assert (result / "structure.json").read_bytes() == before


def test_codes_of_another_analysis_are_refused(made: Path, codes: Path, tmp_path: Path, client: Any) -> None:
    with pytest.raises(IdentityMismatch, match="--codes"):
        structure(replace(config_of(made, tmp_path / "out"), codes=str(codes)), client)


def test_a_run_of_another_analysis_is_refused(made: Path, run: Path, tmp_path: Path, client: Any) -> None:
    with pytest.raises(IdentityMismatch, match="pass that one"):
        structure(replace(config_of(made, tmp_path / "out"), run=run), client)


def test_a_run_adds_cosines_and_a_few_documents_are_too_few(
    analysis: Path, run: Path, codes: Path, tmp_path: Path, client: Any
) -> None:
    asked = StructureConfig(analysis=analysis, codes=str(codes), run=run, out=tmp_path / "out", draws=20)
    record = structure(asked, client)
    assert -1 <= record["cosine"]["spearman_2"] <= 1
    cosines = pq.read_table(tmp_path / "out" / "pairs.parquet")["decoder_cosine"].to_numpy()
    assert np.isfinite(cosines).all()
    with pytest.raises(InputError, match="at least 4 are needed"):
        structure(replace(asked, out=tmp_path / "few", rows=2), client)
    assert not (tmp_path / "few").exists()


@pytest.mark.parametrize(
    ("name", "value"), [("draws", 5), ("rows", 0), ("rows", 1 << 25), ("block_rows", 1), ("min_lift", 1.0)]
)
def test_settings_that_cannot_be_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(InputError, match=name):
        StructureConfig(analysis=Path("x"), **{name: value})


def test_the_command_prints_the_answers_and_writes_inside_the_analysis(made: Path) -> None:
    asked = ["structure", str(made / "analysis"), "--codes", str(made / "codes"), "--draws", "20", "--workers", "1"]
    result = CliRunner().invoke(cli, [*asked, "--rows", "6000"])
    assert result.exit_code == 0, result.output
    assert "called at q <= 0.01" in result.stdout
    assert (made / "analysis" / "structure" / "findings.md").exists()
    Analysis(made / "analysis")
    again = CliRunner().invoke(cli, asked)
    assert again.exit_code == 1
    assert again.stderr.splitlines()[-1].startswith("error: ")
