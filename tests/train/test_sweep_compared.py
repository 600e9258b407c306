"""A sweep compares its runs on rows that none was trained on, where there are any."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tablekit import SITE, activations, activations_manifest, token_table, write_table_store

from actstore.reader import ActivationStore
from pipelines.sae.checkpoint import load_run
from pipelines.sae.reconstruction_metrics import heldout_metrics
from pipelines.train.sweep import comparison_lines, sweep

D_MODEL = 8


def swept(store: Path, out: Path) -> dict[str, Any]:
    return sweep({"store": store, "out": out, "features": (16,), "k": (2, 4), "batch": 64, "tokens": 1280, "device": "cpu"})


def build(path: Path, n_heldout: int) -> Path:
    rows = np.random.default_rng(0).normal(size=(20 * 41, D_MODEL)).astype(np.float32)
    table = token_table([[2 + i] * 40 for i in range(20)], n_heldout)
    return write_table_store(path, activations_manifest(D_MODEL), table, lambda index: activations(rows[index]))


def test_runs_are_compared_on_heldout_rows(tmp_path: Path) -> None:
    store = build(tmp_path / "store", 4)
    found = swept(store, tmp_path / "out")
    assert found["measured_on"] == "held-out rows"
    for row in found["runs"]:
        sae, record = load_run(tmp_path / "out" / row["run"])
        expected = heldout_metrics(sae, ActivationStore(store), SITE)
        assert [row["fve"], row["l0"], row["dead"], row["heldout_rows"]] == [
            expected[name] for name in ("fve", "l0", "dead_share", "heldout_rows")
        ]
        assert row["training_fve"] == record.metrics["fve"] != row["fve"]
    assert [row["fve"] for row in found["runs"]] == sorted((row["fve"] for row in found["runs"]), reverse=True)
    assert json.loads((tmp_path / "out/sweep.json").read_text())["runs"] == found["runs"]
    lines = comparison_lines(found)
    assert f"{found['runs'][0]['fve']:.4f}" in lines[1]
    assert "FVE and L0 of held-out rows" in lines[-1]


def test_without_heldout_rows_they_are_compared_on_the_last_batch(tmp_path: Path) -> None:
    found = swept(build(tmp_path / "store", 0), tmp_path / "out")
    assert found["measured_on"] == "the last training batch"
    for row in found["runs"]:
        metrics = load_run(tmp_path / "out" / row["run"])[1].metrics
        assert (row["fve"], row["l0"], row["dead"]) == tuple(metrics[name] for name in ("fve", "l0", "dead"))
    assert "FVE and L0 of the last training batch" in comparison_lines(found)[-1]


def test_of_several_ranks_the_first_compares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    found = swept(build(tmp_path / "store", 4), tmp_path / "out")
    assert "runs" not in found
    assert not (tmp_path / "out/sweep.json").exists()
