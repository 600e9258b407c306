"""`info` and `ls`: what each thing is that actstore wrote, without loading what only computing needs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from modelkit import ROOT

from actstore.reader import ActivationStore
from cli import cli
from pipelines.analysis.reader import Analysis
from pipelines.codes.code_store import CodeStore
from pipelines.sae.checkpoint import load_run
from pipelines.sae.run_record import RECORD, read_run_record


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def info(path: Path) -> tuple[dict[str, Any], str]:
    """What `info` gives to a program and to a reader."""
    result, printed = invoke("info", path, "--json"), invoke("info", path)
    assert (result.exit_code, printed.exit_code) == (0, 0), result.output
    assert len(printed.stdout.splitlines()) < 20
    facts: dict[str, Any] = json.loads(result.stdout, parse_constant=pytest.fail)
    return facts, printed.stdout


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Path:
    out = tmp_path_factory.mktemp("swept") / "sweep"
    result = invoke("train", store, "--out", out, "--layer", 2, "--features", 16, "--k", 2, "--k", 4, "--batch", 128)
    assert result.exit_code == 0, result.output
    return out


def test_info_of_a_store(store: Path) -> None:
    facts, printed = info(store)
    opened = ActivationStore(store)
    assert (facts["kind"], facts["store_id"]) == ("activations", opened.store_id)
    assert f"{opened.n_rows('train'):,} to train on, {opened.n_rows('heldout'):,} held out" in printed


def test_info_of_a_run(run: Path, store: Path) -> None:
    facts, printed = info(run)
    _, record = load_run(run)
    assert (facts["kind"], facts["run_id"], facts["store_id"]) == ("run", record.run_id, record.store_id)
    assert facts["metrics"] == record.metrics
    assert (facts["lr"], facts["store"]) == (record.config["lr"], str(store))
    assert facts["disk_bytes"] > (run / "sae.safetensors").stat().st_size
    words = " ".join(printed.split())
    assert f"topk, 64 features, k 4, d_model {record.d_model}" in words
    assert f"resid_post.2 of {store} (id {record.store_id}), {record.rows_seen:,} rows" in words
    assert f"FVE {record.metrics['fve']:.4g} L0 {record.metrics['l0']:.4g}" in words


def test_info_of_codes(codes: Path, run: Path, store: Path) -> None:
    facts, printed = info(codes)
    opened = CodeStore(codes)
    assert (facts["kind"], facts["features"], facts["code_width"]) == ("codes", 64, opened.k)
    assert (facts["run"], facts["store"], facts["feature_index"]) == (str(run), str(store), True)
    assert f"store {store} (id {ActivationStore(store).store_id})" in printed
    assert "with a feature index" in printed


def test_info_says_that_codes_have_no_feature_index(codes: Path, tmp_path: Path) -> None:
    own = shutil.copytree(codes, tmp_path / "codes")
    (own / "commits/index.json").unlink()
    facts, printed = info(own)
    assert facts["feature_index"] is False
    assert "without a feature index: run `encode` again" in printed


def test_info_of_an_analysis(analysis: Path, codes: Path) -> None:
    facts, printed = info(analysis)
    record = Analysis(analysis).record
    assert (facts["kind"], facts["codes_id"], facts["bands"]) == ("analysis", record.codes_id, record.bands)
    assert f"{codes} (id {record.codes_id})" in printed
    assert f"{record.n_rows:,}, {record.k} codes" in printed


def test_info_of_a_sweep(sweep: Path, store: Path) -> None:
    facts, printed = info(sweep)
    assert (facts["kind"], facts["store"]) == ("sweep", str(store))
    assert {row["run"] for row in facts["runs"]} == {"k2", "k4"}
    assert all(f"{row['fve']:.4f}" in printed for row in facts["runs"])


def test_a_damaged_record_is_one_clear_line(run: Path, analysis: Path, sweep: Path, tmp_path: Path) -> None:
    for source, name, remedy in (
        (run, RECORD, "restore it from a copy"),
        (analysis, "analysis.json", "restore it from a copy, or make it again"),
        (sweep, "sweep.json", "restore it from a copy, or make it again"),
    ):
        own = shutil.copytree(source, tmp_path / source.name)
        text = (own / name).read_text()
        (own / name).write_text(text.replace('"k": 4', '"k": 5') if name == RECORD else text[: len(text) // 2])
        result = invoke("info", own)
        assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1)
        assert result.stderr.startswith(f"error: {own}")
        assert remedy in result.stderr


def test_a_runs_record_is_read_without_its_weights(run: Path, tmp_path: Path) -> None:
    shutil.copy(run / RECORD, tmp_path / RECORD)
    assert read_run_record(tmp_path) == load_run(run)[1]


@pytest.mark.parametrize("kind", ["store", "run", "codes", "analysis", "sweep"])
def test_info_and_ls_load_no_torch(kind: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(kind)
    code = f"""
import sys
from click.testing import CliRunner
from cli import cli
for command in ('info', 'ls'):
    result = CliRunner().invoke(cli, [command, {str(path)!r}])
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() and 'unreadable' not in result.stdout, result.stdout
print(*({{'torch', 'transformers', 'dask', 'distributed', 'scipy', 'pyarrow'}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_train_prints_few_lines_with_what_its_defaults_became(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = invoke("train", store, "--out", out, "--layer", 2, "--features", 16, "--k", 2, "--batch", 128)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    record = read_run_record(out)
    assert len(lines) < 15
    words = " ".join(result.stdout.split())
    assert f"run {out} (id {record.run_id})" in words
    assert f"lr {record.config['lr']:.4g}" in words
    assert record.config["lr"] > 0
    assert f"on cpu (kernel {record.config['kernel']})" in words
    assert lines[-1].endswith(f"{out}/run.json, or --json")
    assert record.weights_sha256 not in result.stdout


def test_info_of_an_imported_run(run: Path, store: Path, tmp_path: Path) -> None:
    for arguments in (
        ("export", run, "--out", tmp_path / "params.npz"),
        ("import", tmp_path / "params.npz", "--store", store, "--out", tmp_path / "imported"),
    ):
        result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
    facts, printed = info(tmp_path / "imported")
    _, record = load_run(run)
    assert (facts["kind"], facts["origin"]["run_id"], facts["store"]) == ("run", record.run_id, str(store))
    assert "lr" not in facts
    words = " ".join(printed.split())
    assert f"imported run {record.run_id} of {record.model}" in words
    assert f"reads resid_post.2 of {store}" in words
