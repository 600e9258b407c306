"""What an SAE is compared with: the figures of the linear ones by their definitions, the SAEs trained as the run was."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from modelkit import D_MODEL
from numpy.typing import NDArray

from actstore.errors import InputError
from actstore.reader import ActivationStore
from pipelines.collect.config import CollectConfig
from pipelines.collect.stage import collect
from pipelines.evaluate.baselines import (
    COLUMNS,
    RANDOM_MODEL,
    BaselinesConfig,
    evaluate_beside_baselines,
    linear_baselines,
    linear_metrics,
    lines,
    random_weights_model,
    same_training,
    train_sae,
)
from pipelines.evaluate.stage import evaluate, read_evaluation
from pipelines.models.load import load_model, model_identity
from pipelines.sae.architectures.topk import TopKSae
from pipelines.sae.checkpoint import load_run

SITE = "resid_post.2"
N_ROWS = 1024


@pytest.fixture(scope="module")
def opened(store: Path) -> ActivationStore:
    return ActivationStore(store)


@pytest.fixture(scope="module")
def config(store: Path, run: Path, tmp_path_factory: pytest.TempPathFactory) -> BaselinesConfig:
    own = Path(shutil.copytree(run, tmp_path_factory.mktemp("own") / "run"))
    return BaselinesConfig(run=own, store=store, windows=8, device="cpu", baselines=True, baseline_tokens=N_ROWS)


@pytest.fixture(scope="module")
def found(config: BaselinesConfig) -> dict[str, Any]:
    return evaluate_beside_baselines(config)


@pytest.fixture(scope="module")
def rows(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in found["baselines"]["rows"]}


def rows_of(store: ActivationStore, part: str) -> NDArray[np.float64]:
    return np.concatenate([store.read(shard, f"acts/{SITE}") for shard in store.shards(part)]).astype(np.float64)


def fve(x: NDArray[np.float64], guess: NDArray[np.float64]) -> float:
    return float(1 - np.square(x - guess).sum() / np.square(x - x.mean(axis=0)).sum())


# Linear


def test_the_pca_has_as_many_components_as_the_sae_has_features_a_row(
    opened: ActivationStore, rows: dict[str, dict[str, Any]]
) -> None:
    train, x = rows_of(opened, "train"), rows_of(opened, "heldout")
    mean = train.mean(axis=0)
    axes = np.linalg.svd(train - mean, full_matrices=False)[2]
    guess = mean + (x - mean) @ axes[:4].T @ axes[:4]
    own = next(row for name, row in rows.items() if name.startswith("PCA, 4 components"))
    assert own["l0"] == 4
    assert own["fve"] == pytest.approx(fve(x, guess), rel=1e-4)
    assert own["l2_ratio"] == pytest.approx((np.linalg.norm(guess, axis=1) / np.linalg.norm(x, axis=1)).mean(), rel=1e-4)
    scores = [fve(x, mean + (x - mean) @ axes[:n].T @ axes[:n]) for n in range(1, D_MODEL + 1)]
    needed = 1 + int(np.argmax(np.array(scores) >= rows["SAE of this run"]["fve"]))
    assert any(name.startswith(f"PCA, {needed} components (the SAE's FVE)") for name in rows)


def test_the_raw_dimensions_are_those_farthest_from_the_mean(
    opened: ActivationStore, rows: dict[str, dict[str, Any]]
) -> None:
    mean, x = opened.statistics(SITE).mean, rows_of(opened, "heldout")
    guess = np.tile(mean, (len(x), 1))
    for row, own in zip(guess, x, strict=True):
        largest = np.argsort(-np.abs(own - mean))[:4]
        row[largest] = own[largest]
    assert rows["4 largest raw dimensions"]["fve"] == pytest.approx(fve(x, guess), rel=1e-4)
    assert rows["4 largest raw dimensions"]["l0"] == 4


def test_all_dimensions_explain_everything(opened: ActivationStore) -> None:
    every = linear_baselines(opened, SITE, l0=1000.0, fve=0.5, device="cpu")
    assert f"{D_MODEL} largest raw dimensions" in every
    assert f"PCA, {D_MODEL} components" in every
    for n_numbers, replace_rows in every.values():
        if n_numbers == D_MODEL:
            assert linear_metrics(opened, SITE, n_numbers, replace_rows, "cpu")["fve"] == pytest.approx(1, abs=1e-6)


# SAEs


def test_the_same_training_gives_the_run_bit_by_bit(opened: ActivationStore, run: Path) -> None:
    sae, record = load_run(run)
    again = train_sae(same_training(record, record.rows_seen), opened, SITE, record.rows_seen, "cpu")
    for name, weights in sae.state_dict().items():
        assert torch.equal(again.state_dict()[name], weights), name


def test_a_learning_rate_that_was_chosen_is_kept_and_a_default_is_not(run: Path) -> None:
    _, record = load_run(run)
    assert record.config["lr"] > 0
    assert same_training(record, 256).lr == 0
    record.config["lr"] = 0.0123
    assert same_training(record, 256).lr == 0.0123


def test_a_frozen_decoder_stays_at_its_random_directions(opened: ActivationStore, run: Path) -> None:
    _, record = load_run(run)
    config = same_training(record, N_ROWS)
    start = TopKSae(D_MODEL, config.features, config.k, seed=config.seed)
    frozen = train_sae(config, opened, SITE, N_ROWS, "cpu", frozen_decoder=True)
    torch.testing.assert_close(frozen.W_dec, start.W_dec.detach(), rtol=0, atol=1e-6)
    assert (frozen.W_enc - start.W_enc).abs().max() > 1e-3
    assert not torch.equal(frozen.b_enc, start.b_enc)
    free = train_sae(config, opened, SITE, N_ROWS, "cpu")
    assert (free.W_dec - start.W_dec).abs().max() > 1e-3


def test_random_weights_are_another_model_of_the_same_shape(model_folder: Path, tmp_path: Path) -> None:
    states = torch.get_rng_state()
    folder = random_weights_model(str(model_folder), tmp_path / "random", seed=3)
    assert torch.equal(torch.get_rng_state(), states)
    ours, theirs = (model_identity(load_model(name, "cpu", "fp32")) for name in (folder, str(model_folder)))
    assert ours == replace(theirs, weights_sha256=ours.weights_sha256)
    assert ours.weights_sha256 != theirs.weights_sha256
    again = random_weights_model(str(model_folder), tmp_path / "again", seed=3)
    assert model_identity(load_model(again, "cpu", "fp32")) == ours


# All of it


def test_every_baseline_has_a_row_of_the_same_figures(
    config: BaselinesConfig, found: dict[str, Any], rows: dict[str, dict[str, Any]]
) -> None:
    assert [row["name"] for row in found["baselines"]["rows"]][:4] == [
        "SAE of this run",
        "SAE, the same, shorter training",
        "SAE, decoder frozen at random",
        RANDOM_MODEL,
    ]
    for name, row in rows.items():
        features = {"dead_share"} if name.startswith("SAE") else set()
        assert set(COLUMNS) - {"dead_share"} | features <= set(row), name
        assert row.get("trained_rows", 0) in (0, N_ROWS, load_run(config.run)[1].rows_seen)
    assert rows["SAE of this run"]["fve"] == found["fve"]
    assert rows["SAE of this run"]["kl"] == found["kl"]
    alone = evaluate(config)
    assert {name: found[name] for name in alone} == alone


def test_the_baselines_are_kept_beside_the_evaluation_and_nothing_else_is_left(
    config: BaselinesConfig, found: dict[str, Any], run: Path
) -> None:
    saved = Path(found["baselines"]["saved"])
    assert saved.parent.parent == config.run / "baselines"
    assert {**read_evaluation(saved.parent, "baselines"), "saved": str(saved)} == found["baselines"]
    written = {path.name for path in config.run.iterdir()} - {path.name for path in run.iterdir()}
    assert written <= {"baselines", "evaluations"}


def test_the_table_shows_each_baseline_and_no_score_of_a_random_model(
    found: dict[str, Any], rows: dict[str, dict[str, Any]]
) -> None:
    printed = lines(found)
    start = next(i for i, line in enumerate(printed) if "CE score" in line)
    for line, row in zip(printed[start + 1 :], rows.values(), strict=False):
        assert line.startswith(row["name"])
        assert f"{row['fve']:.4f}" in line
        assert ("–" in line) == (not row["name"].startswith("SAE") or row["name"] == RANDOM_MODEL)
    assert lines({name: value for name, value in found.items() if name != "baselines"}) == printed[: start - 1]


def test_a_corpus_that_is_gone_leaves_out_only_the_random_model(
    texts: Path, model_folder: Path, run: Path, tmp_path: Path
) -> None:
    corpus, out = tmp_path / "texts", tmp_path / "store"
    shutil.copytree(texts, corpus)
    collect(CollectConfig(out=out, model=str(model_folder), corpus=str(corpus), layer=(2,), context=32, encoding="fp32"))
    own = Path(shutil.copytree(run, tmp_path / "run"))
    shutil.rmtree(corpus)
    config = BaselinesConfig(run=own, store=out, windows=2, device="cpu", baselines=True, baseline_tokens=512)
    found = evaluate_beside_baselines(config)
    left_out = [row for row in found["baselines"]["rows"] if "left_out" in row]
    assert [row["name"] for row in left_out] == [RANDOM_MODEL]
    assert "no file there" in left_out[0]["left_out"]
    line = next(line for line in lines(found) if line.startswith(f"{RANDOM_MODEL} "))
    assert f"  left out: corpus {corpus}: no " in line


def test_fewer_rows_than_none_are_refused(run: Path, store: Path) -> None:
    with pytest.raises(InputError, match="baseline-tokens -1: need at least 1, or 0"):
        BaselinesConfig(run=run, store=store, baseline_tokens=-1)
