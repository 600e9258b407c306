"""A folder of another kind than a command takes is named by its kind; `ls`, `info` and `verify` take every kind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from actstore.kind import RECORDS, SEAL
from cli import cli
from pipelines.analysis import record as analysis_record
from pipelines.causal.effects import stage as effects_stage
from pipelines.compare import stage as compare_stage
from pipelines.compare import superposition
from pipelines.concepts import stage as concepts_stage
from pipelines.sae import run_record
from pipelines.structure import stage as structure_stage
from pipelines.train import sweep_record


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def refused(*arguments: object) -> str:
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


@pytest.fixture(scope="module")
def shelf(
    tmp_path_factory: pytest.TempPathFactory, store: Path, run: Path, codes: Path, analysis: Path, client: Any
) -> Path:
    """One thing of every kind, side by side."""
    folder = tmp_path_factory.mktemp("shelf")
    for source in (store, codes, analysis, run):
        shutil.copytree(source, folder / source.name)
    cut = ["--layer", 2, "--features", 16, "--batch", 128, "--device", "cpu"]
    small = ["--firings", 5, "--top", 3, "--resamples", 10, "--device", "cpu"]
    scheduler = ["--scheduler", client.scheduler.address]
    for arguments in (
        ["train", folder / "store", "--out", folder / "sweep", "--k", 2, "--k", 4, *cut],
        ["effects", folder / "run", folder / "codes", "--out", folder / "effects", *small],
        ["compare", folder / "sweep/k2", folder / "sweep/k4", "--out", folder / "compare"],
        ["superposition", "--out", folder / "superposition", "--steps", 5, "--sparsities", 2],
        ["evaluate", folder / "run", folder / "store", "--windows", 2, "--device", "cpu"],
        ["concepts", folder / "codes", "--out", folder / "concepts", "--no-probe", "--labels", labels(folder), *scheduler],
    ):
        result = invoke(*arguments)
        assert result.exit_code == 0, result.output
    return folder


def labels(folder: Path) -> Path:
    """A file of labels for the texts of the store."""
    names = [row["name"] for row in documents(folder / "analysis")]
    path = folder / "labels.jsonl"
    lines = [json.dumps({"document": name, "start": 0, "stop": 5, "label": "first"}) for name in names]
    path.write_text("\n".join(lines) + "\n")
    return path


def documents(analysis: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = pq.read_table(analysis / "documents.parquet").to_pylist()
    return rows


KINDS = {
    "store": "a store of activations",
    "codes": "a code store",
    "run": "a run",
    "analysis": "an analysis",
    "sweep": "a sweep",
    "effects": "effects",
    "compare": "a compare",
    "superposition": "a superposition",
    "concepts": "concepts",
}


def test_a_folder_of_another_kind_is_named_by_its_kind(shelf: Path, tmp_path: Path) -> None:
    text = tmp_path / "texts.txt"
    text.write_text("the fox\n")
    takes: dict[str, tuple[str, list[list[object]]]] = {
        "run": (
            "a finished run (no run.json)",
            [["inspect", None, "--texts", text], ["export", None, "--out", tmp_path / "x.npz"]],
        ),
        "analysis": (
            "an analysis (no analysis.json)",
            [["features", None], ["report", None, "--out", tmp_path / "page.html"]],
        ),
        "store": ("a store (no manifest.json)", [["info", None, "--row", 1], ["repair", None]]),
    }
    for wanted, (words, commands) in takes.items():
        for name, kind in KINDS.items():
            if name == wanted or (wanted == "store" and name == "codes"):
                continue
            for command in commands:
                line = refused(*(shelf / name if argument is None else argument for argument in command))
                expected = "a store" if command[0] == "repair" else words
                assert line.startswith(f"{shelf / name}: holds {kind}, not {expected}; pass "), line


def test_inspect_of_a_sweep_names_its_runs(shelf: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("the fox\n")
    line = refused("inspect", shelf / "sweep", "--texts", tmp_path / "texts.txt")
    assert line.endswith("holds a sweep, not a finished run (no run.json); pass one of the runs in it: k2, k4.")


def test_info_says_what_was_passed(shelf: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "training").mkdir()
    (tmp_path / "training/training.safetensors").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/manifest.json").write_text('{"name": "a web page"}')
    for path, words in (
        (tmp_path / "empty", "is an empty folder"),
        (tmp_path / "nowhere", "nothing is there"),
        (shelf / "labels.jsonl", "is a file"),
        (tmp_path / "training", "holds a training that is not finished (continue it with `train --resume`)"),
        (tmp_path / "other", "is a folder with nothing of actstore's directly in it"),
        (shelf, "is a folder with nothing of actstore's directly in it"),
    ):
        line = refused("info", path)
        assert line.startswith(f"{path}: {words}; pass a store, codes, a run, an analysis, a sweep or other results"), line


@pytest.mark.parametrize("name", ["effects", "compare", "superposition", "concepts"])
def test_info_of_other_results(shelf: Path, name: str) -> None:
    facts = json.loads(invoke("info", shelf / name, "--json").stdout)
    printed = invoke("info", shelf / name).stdout.splitlines()
    assert facts["kind"] == name
    assert printed[0].split() == ["kind", name]
    assert len(printed) < 20
    (shelf / name / SEAL).rename(shelf / name / "away")
    try:
        assert "is not finished (no seal.json)" in refused("info", shelf / name)
    finally:
        (shelf / name / "away").rename(shelf / name / SEAL)


def test_ls_lists_every_kind(shelf: Path) -> None:
    listed = {row["path"]: row["kind"] for row in json.loads(invoke("ls", shelf, "--json").stdout)}
    kinds = {**{name: name for name in KINDS}, "sweep/k2": "run", "sweep/k4": "run"}
    found = {str(Path(path).relative_to(shelf)): kind for path, kind in listed.items()}
    assert {path: kind for path, kind in found.items() if "evaluations" not in path} == kinds
    assert {kind for path, kind in found.items() if "evaluations" in path} == {"evaluation"}


def test_verify_takes_every_kind_and_a_folder_of_them(shelf: Path) -> None:
    for path in (*(shelf / name for name in KINDS), shelf):
        result = invoke("verify", path)
        assert (result.exit_code, result.stdout) == (0, f"{path}: no fault found\n"), result.output


@pytest.mark.parametrize(
    ("name", "damaged"),
    [
        ("run", "sae.safetensors"),
        ("run", "run.json"),
        ("sweep", "k4/sae.safetensors"),
        ("sweep", "sweep.json"),
        ("sweep", "frontier.svg"),
        ("analysis", "tokens.parquet"),
        ("analysis", "tokenizer/tokenizer.json"),
        ("effects", "effects.parquet"),
        ("compare", "features.parquet"),
        ("superposition", "toy.png"),
        ("concepts", "findings.md"),
        ("codes", "manifest.json"),
    ],
)
def test_verify_names_what_was_changed_in_every_kind(shelf: Path, tmp_path: Path, name: str, damaged: str) -> None:
    own = shutil.copytree(shelf / name, tmp_path / "shelf" / name)
    data = bytearray((own / damaged).read_bytes())
    data[len(data) // 2] ^= 1
    (own / damaged).write_bytes(data)
    for path, prefix in ((own, ""), (tmp_path / "shelf", name)):
        result = invoke("verify", path)
        assert result.exit_code == 1
        assert any(Path(damaged).name in line and line.startswith(prefix) for line in result.stdout.splitlines()), result
        assert result.stderr.splitlines()[-1].startswith(f"error: {path}: ")
        assert "faults; " in result.stderr
    (own / damaged).unlink()
    assert invoke("verify", own, "--level", "meta").exit_code == 1


def test_the_kinds_are_known_by_the_records_that_the_rooms_write() -> None:
    written = {
        run_record.RECORD,
        analysis_record.RECORD,
        structure_stage.RECORD,
        concepts_stage.SUMMARY,
        effects_stage.RECORD,
        effects_stage.PLAN,
        sweep_record.SUMMARY,
        "evaluation.json",
        "baselines.json",
        compare_stage.SUMMARY,
        superposition.SUMMARY,
        "demo.json",
    }
    assert set(RECORDS) == written


# A sweep's evaluation


def test_evaluate_of_a_sweep_evaluates_each_of_its_runs(shelf: Path, tmp_path: Path) -> None:
    sweep = shutil.copytree(shelf / "sweep", tmp_path / "sweep")
    asked = ["--windows", 2, "--device", "cpu"]
    result = invoke("evaluate", sweep, shelf / "store", *asked, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    scores = [figures["fve"] for figures in found["runs"]]
    assert scores == sorted(scores, reverse=True)
    for figures in found["runs"]:
        single = json.loads(invoke("evaluate", sweep / figures["run"], shelf / "store", *asked, "--json").stdout)
        assert {"run": figures["run"], **single} == figures
        assert Path(figures["saved"]).is_relative_to(sweep / figures["run"] / "evaluations")
    printed = invoke("evaluate", sweep, shelf / "store", *asked).stdout.splitlines()
    assert [line.split()[0] for line in printed[:3]] == ["run", *(figures["run"] for figures in found["runs"])]
    assert f"{found['runs'][0]['delta_ce']:+.4f}" in printed[1]
    for one, other in (("k2", "away"), ("k4", "k2"), ("away", "k4")):
        (sweep / one).rename(sweep / other)
    assert "the sweep trained" in refused("evaluate", sweep, shelf / "store", *asked)
