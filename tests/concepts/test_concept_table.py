"""The command `concepts` on a planted store, run and code store: the table says what was planted, by any means of asking."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from markdown_it import MarkdownIt
from modelkit import run_cli
from tablekit import SITE, activations, activations_manifest, codes_manifest, dense_codes, text_table, write_table_store

from actstore.errors import IdentityMismatch, InputError, OutputExists
from actstore.reader import ActivationStore
from pipelines.concepts.stage import ConceptsConfig, concepts
from pipelines.concepts.table import concept_lines
from pipelines.sae.architectures.topk import TopKSae
from pipelines.sae.checkpoint import RunRecord, save_run

D, F = 64, 6
WORDS = ("fox", "hare", "owl")
TEXTS = {
    f"story{i:02}.txt": "".join(
        f"The {WORDS[(i + j) % 3]} went to the wood, and {'ran' if (i * j) % 4 else 'slept'} there with {j} others.\n"
        for j in range(20 + i % 5)
    )
    for i in range(80)
}
ANIMAL, SLEEP, RARE = "an animal", "sleep", "one word"


@pytest.fixture(scope="module")
def labels_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("labels") / "labels.jsonl"
    records: list[dict[str, Any]] = []
    for name, text in TEXTS.items():
        for label, words in ((ANIMAL, WORDS), (SLEEP, ("slept",))):
            for word in words:
                at = text.find(word)
                while at >= 0:
                    records.append({"document": name, "start": at, "stop": at + len(word), "label": label})
                    at = text.find(word, at + 1)
    records.append({"document": "story00.txt", "start": 0, "stop": 3, "label": RARE})
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, labels_file: Path) -> Path:
    """A folder with `store`, `run`, `codes`: feature 0 fires on animals but for one animal in 25, where 1 stands in for it;
    2 fires on `slept`; 3 and 4 each at random; 5 never. Dimension 7 is low on `slept`."""
    from pipelines.concepts.labels import read_labels

    folder = tmp_path_factory.mktemp("planted")
    table, codec, files = text_table(TEXTS, model_folder)
    generator = np.random.default_rng(0)
    n = len(table.ids)
    bare = write_table_store(
        folder / "bare",
        activations_manifest(1, codec),
        table,
        lambda i: activations(np.ones((len(i), 1), np.float32)),
        files,
    )
    labels = read_labels(ActivationStore(bare), codec, labels_file)
    holds = labels.segments[0].holds.toarray() > 0
    animal, sleep = (holds[:, labels.names.index(name)] for name in (ANIMAL, SLEEP))
    absorbed = animal & (generator.random(n) < 0.04)
    axes = np.linalg.qr(generator.standard_normal((D, 8)))[0].T
    strength = generator.uniform(2, 3, n)
    noise = generator.random((n, 2)) < 0.1
    values = np.zeros((n, F), np.float32)
    values[:, 0], values[:, 1] = (animal & ~absorbed) * strength, absorbed * strength * np.sqrt(2)
    values[:, 2], values[:, 3:5] = sleep * strength, noise * strength[:, None]
    decoder = np.stack([axes[0], (axes[0] + axes[1]) / np.sqrt(2), axes[2], axes[3], axes[4], axes[5]])
    rows = (values @ decoder + 0.05 * generator.standard_normal((n, D))).astype(np.float32)
    store = write_table_store(
        folder / "store", activations_manifest(D, codec), table, lambda i: activations(rows[i]), files, shard_rows=4096
    )
    opened = ActivationStore(store)
    sae = TopKSae(D, F, 2)
    sae.W_dec.data = torch.from_numpy(decoder).float()
    record = RunRecord(
        architecture="topk", d_model=D, n_features=F, k=2, code_width=2, site=SITE, store_id=opened.store_id,
        snapshot=opened.snapshot, weights_sha256="0" * 64, model="none", bos=True, input_scale=1.0, rows_seen=1,
        history=[], config={}, metrics={},
    )  # fmt: skip
    record = save_run(folder / "run", sae, record)
    manifest = codes_manifest(F, F, codec)
    manifest = replace(
        manifest,
        source={**manifest.source, "store_id": opened.store_id, "snapshot": opened.snapshot, "run_id": record.run_id},
        provenance={"model": "none", "run": str(folder / "run"), "store": str(store)},
    )
    write_table_store(folder / "codes", manifest, table, lambda i: dense_codes(values[i]), files, shard_rows=4096)
    return folder


@pytest.fixture(scope="module")
def found(planted: Path, labels_file: Path, client: Any) -> dict[str, Any]:
    config = ConceptsConfig(
        codes=planted / "codes", labels=str(labels_file), out=planted / "found", beside=(str(planted / "codes"),)
    )
    return concepts(config, client)


@pytest.fixture(scope="module")
def rows(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["label"]: row for row in found["concepts"]}


def test_each_concept_has_its_feature_and_its_scores(rows: dict[str, dict[str, Any]]) -> None:
    assert rows[ANIMAL]["feature"] == 0
    assert rows[ANIMAL]["precision"] == 1
    assert 0.9 < rows[ANIMAL]["recall"] < 1
    assert rows[ANIMAL]["f1"] == pytest.approx(2 * rows[ANIMAL]["recall"] / (1 + rows[ANIMAL]["recall"]))
    assert rows[ANIMAL]["f1_2"] == 1
    assert (rows[SLEEP]["feature"], rows[SLEEP]["f1"], rows[SLEEP]["f1_5"]) == (2, 1, 1)
    assert rows[ANIMAL]["main_features"] == [0]


def test_the_absorber_is_found_through_the_whole_stage(rows: dict[str, dict[str, Any]]) -> None:
    own = rows[ANIMAL]
    assert own["probe_f1"] > 0.95
    assert [absorber["feature"] for absorber in own["absorbers"]] == [1]
    assert own["absorbed"] == own["absorbers"][0]["rows"] == own["silent"] > 5
    assert own["absorbers"][0]["cosine"] > 0.5
    assert own["absorption_rate"] == pytest.approx(1 - own["recall"], abs=0.02)
    assert (rows[SLEEP]["absorbed"], rows[SLEEP]["absorbers"]) == (0, [])


def test_a_label_of_too_few_rows_has_no_figures(found: dict[str, Any], rows: dict[str, dict[str, Any]]) -> None:
    assert rows[RARE]["rows"] >= 1
    assert rows[RARE]["f1"] is None
    assert "1 labels have fewer than 20 rows" in "\n".join(concept_lines(found))


def test_raw_dimensions_and_other_codes_stand_beside(planted: Path, rows: dict[str, dict[str, Any]]) -> None:
    for label in (ANIMAL, SLEEP):
        beside = rows[label]["beside"]
        assert list(beside) == ["raw dimensions", f"features {planted / 'codes'}"]
        assert beside[f"features {planted / 'codes'}"]["f1"] == rows[label]["f1"]
        assert beside["raw dimensions"]["unit"][0] in "+-"
        assert 0.05 < beside["raw dimensions"]["f1"] <= beside["raw dimensions"]["f1_2"] + 0.1


def test_the_result_is_published_and_read_back(planted: Path, found: dict[str, Any]) -> None:
    assert sorted(path.name for path in (planted / "found").iterdir()) == [
        "concepts.json", "concepts.parquet", "features.parquet", "findings.md", "lock", "seal.json",
    ]  # fmt: skip
    kept = json.loads((planted / "found" / "concepts.json").read_text())
    assert kept["concepts"] == found["concepts"]
    table = pq.read_table(planted / "found" / "concepts.parquet").to_pylist()
    assert [row["label"] for row in table] == [row["label"] for row in found["concepts"]]
    assert table[0]["raw dimensions: f1"] == found["concepts"][0]["beside"]["raw dimensions"]["f1"]
    features = {row["feature"]: row for row in pq.read_table(planted / "found" / "features.parquet").to_pylist()}
    assert features[0]["rule"] == ANIMAL
    assert (
        (planted / "found" / "findings.md").read_text().startswith("Of 2 concepts 2 have a feature with F1 of at least 0.7")
    )
    assert found["findings"] in concept_lines(found)


def test_without_the_probe_nothing_but_the_codes_is_needed(
    planted: Path, found: dict[str, Any], labels_file: Path, tmp_path: Path, client: Any
) -> None:
    shutil.copytree(planted / "codes", tmp_path / "codes")
    alone = ConceptsConfig(codes=tmp_path / "codes", labels=str(labels_file), probe=False)
    result = concepts(alone, client)
    assert result["out"] == str(tmp_path / "codes.concepts")
    for ours, theirs in zip(result["concepts"], found["concepts"], strict=True):
        assert {key: theirs[key] for key in ours if key != "beside"} == {key: ours[key] for key in ours if key != "beside"}
        assert "probe_f1" not in ours
    with pytest.raises(OutputExists, match="exists; choose another --out"):
        concepts(alone, client)


def test_a_store_or_run_that_is_gone_or_another_is_named(
    planted: Path, labels_file: Path, run: Path, store: Path, tmp_path: Path, client: Any
) -> None:
    config = ConceptsConfig(codes=planted / "codes", labels=str(labels_file), out=tmp_path / "out")
    with pytest.raises(InputError, match="which is not there; name it with --store, or pass --no-probe"):
        concepts(replace(config, store=str(tmp_path / "gone")), client)
    with pytest.raises(InputError, match="which is not there; name it with --run"):
        concepts(replace(config, run=tmp_path / "gone"), client)
    with pytest.raises(IdentityMismatch, match="the codes are of"):
        concepts(replace(config, run=run), client)
    with pytest.raises(IdentityMismatch):
        concepts(replace(config, store=str(store)), client)
    assert not (tmp_path / "out").exists()


def values_of(found: dict[str, Any]) -> Any:
    return found["concepts"]


@pytest.mark.slow
@pytest.mark.cluster
def test_the_command_with_two_workers_gives_the_same_figures(
    planted: Path, found: dict[str, Any], labels_file: Path, tmp_path: Path
) -> None:
    done = run_cli(
        "concepts", planted / "codes", "--labels", labels_file, "--out", tmp_path / "out", "--beside", planted / "codes",
        "--json", TMPDIR="/var/tmp",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert values_of(json.loads(done.stdout)) == json.loads(json.dumps(values_of(found)))


def test_a_label_is_no_markup_in_the_findings(planted: Path, labels_file: Path, tmp_path: Path, client: Any) -> None:
    hostile = "<img src=x> [a](http://a.example)\x1b[2J **b**"
    labels = tmp_path / "labels.jsonl"
    labels.write_text(labels_file.read_text().replace(json.dumps(SLEEP), json.dumps(hostile)))
    asked = ConceptsConfig(codes=planted / "codes", labels=str(labels), out=tmp_path / "found", probe=False)
    assert hostile in {row["label"] for row in concepts(asked, client)["concepts"]}
    page = MarkdownIt("commonmark").render((tmp_path / "found/findings.md").read_text())
    assert re.findall(r"<(\w+)", page) == ["p"]
    assert "&lt;img src=x&gt; [a](http://a.example)" in page
