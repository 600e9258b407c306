"""SAEs whose rows have differing numbers of codes go through the whole chain, and what does not fit is counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actstore.reader import ActivationStore
from pipelines.codes.code_store import CodeStore
from pipelines.codes.stage import EncodeConfig, encode
from pipelines.sae.architectures.registry import architectures
from pipelines.sae.architectures.relu import ReluSae
from pipelines.sae.architectures.topk import TopKSae
from pipelines.sae.base import Objective
from pipelines.sae.checkpoint import load_run, save_run
from pipelines.sae.sparse_operators import Active
from pipelines.train.config import TrainConfig
from pipelines.train.stage import train
from pipelines.train.trainee import Recipe, Trainee

SITE = "resid_post.2"


@pytest.mark.parametrize("architecture", sorted(architectures()))
def test_every_architecture_is_trained_saved_and_encoded(
    architecture: str, store: Path, tmp_path: Path, client: Any
) -> None:
    config = TrainConfig(store=store, out=tmp_path / "run", layer=2, features=64, k=4, epochs=4, batch=256)
    found = train(replace(config, architecture=architecture))
    assert found["architecture"] == architecture
    sae, record = load_run(tmp_path / "run")
    result = encode(EncodeConfig(store=store, run=tmp_path / "run", out=tmp_path / "codes"), client)
    codes, rows = CodeStore(tmp_path / "codes"), ActivationStore(store)
    assert result["code_width"] == record.code_width
    n_codes = n_expected = 0
    for part in ("train", "heldout"):
        for shard in codes.shards(part):
            n_codes += int((codes.read(shard, "codes/value") > 0).sum())
        for shard in rows.shards(part):
            n_expected += int((sae.codes(torch.from_numpy(rows.read(shard, f"acts/{SITE}"))).values > 0).sum())
    assert n_codes == n_expected - result["codes_cut"] > 0


def test_codes_that_do_not_fit_are_counted_and_the_largest_kept(store: Path, tmp_path: Path, client: Any) -> None:
    train(TrainConfig(store=store, out=tmp_path / "wide", layer=2, architecture="batchtopk", features=64, k=4, batch=256))
    sae, record = load_run(tmp_path / "wide")
    save_run(tmp_path / "run", sae, replace(record, code_width=2))
    result = encode(EncodeConfig(store=store, run=tmp_path / "run", out=tmp_path / "codes"), client)
    rows = ActivationStore(store)
    found = [
        sae.codes(torch.from_numpy(rows.read(shard, f"acts/{SITE}")))
        for part in ("train", "heldout")
        for shard in rows.shards(part)
    ]
    counts = np.concatenate([codes.active.counts.numpy() for codes in found])
    assert result["rows_cut"] == (counts > 2).sum() > 0
    assert result["codes_cut"] == np.maximum(counts - 2, 0).sum()
    largest = np.concatenate([np.sort(codes.padded(64)[0].numpy(), axis=1)[:, -2:].sum(axis=1) for codes in found])
    codes = CodeStore(tmp_path / "codes")
    kept = np.concatenate(
        [codes.read(shard, "codes/value").sum(axis=1) for part in ("train", "heldout") for shard in codes.shards(part)]
    )
    np.testing.assert_allclose(np.sort(kept), np.sort(largest), rtol=1e-5)


@pytest.mark.parametrize("kernel", ["sparse", "sparse-fp32", "dense"])
def test_a_batch_without_any_code_is_a_step_like_another(kernel: str) -> None:
    sae = ReluSae(8, 32, 2)
    with torch.no_grad():
        sae.b_enc -= 100
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    trainee = Trainee(sae, Recipe.standard(1e-3, 10, 16, 0.1, Objective(l1=1.0, kernel=kernel)), 1.0)
    metrics = trainee.metrics(*trainee.step(x))
    assert (metrics["l0"], metrics["dead"]) == (0, 1)


def test_keeping_no_entry_leaves_empty_rows() -> None:
    active = Active.of_k(torch.tensor([[0, 2], [1, 3]]), 4)
    assert active.keep(torch.zeros(4, dtype=torch.bool)).starts.tolist() == [0, 0, 0]
    assert active.keep(torch.tensor([False, False, True, False])).starts.tolist() == [0, 0, 1]


def test_features_that_never_fired_are_dead_in_a_run_shorter_than_the_window() -> None:
    sae = TopKSae(8, 32, 2)
    with torch.no_grad():
        sae.b_enc[16:] = -1e3
    trainee = Trainee(sae, Recipe.standard(1e-3, 10, 64, 2 / 32, Objective()), 1.0)
    figures = trainee.metrics(*trainee.step(torch.randn(64, 8, generator=torch.Generator().manual_seed(0))))
    assert not trainee.silent(trainee.recipe.revive_after_rows).any()
    assert figures["dead"] >= 0.5
