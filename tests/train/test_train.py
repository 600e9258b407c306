"""What training promises: the same bits for the same seed, a good fit in raw units, an honest record."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tablekit import SITE, activations, activations_manifest, token_table, write_table_store
from torch import Tensor

from actstore.errors import InputError, NotAStore, OutputExists
from actstore.reader import ActivationStore
from pipelines.sae import run_record
from pipelines.sae.architectures.topk import TopKSae
from pipelines.sae.base import Codes, Losses
from pipelines.sae.checkpoint import RECORD, WEIGHTS, RunRecord, load_run, save_run
from pipelines.sae.row_sample import sample_rows
from pipelines.train import trainee
from pipelines.train.config import TrainConfig
from pipelines.train.log import METRICS
from pipelines.train.stage import train
from pipelines.train.trainee import Trainee

D_MODEL, N_DOCUMENTS, DOCUMENT_TOKENS = 16, 60, 40
HELDOUT = 6
MARK = 1e6
"""The last channel of held-out rows, and of no other."""


def low_rank_rows() -> NDArray[np.float32]:
    """Three of twelve directions a row, far from the origin and of a scale of about thirty."""
    generator = np.random.default_rng(0)
    n = N_DOCUMENTS * (DOCUMENT_TOKENS + 1)
    directions = generator.normal(size=(12, D_MODEL))
    weights = np.zeros((n, 12))
    chosen = np.argsort(generator.random((n, 12)), axis=1)[:, :3]
    np.put_along_axis(weights, chosen, generator.uniform(5, 15, size=(n, 3)), axis=1)
    rows = weights @ directions + 50 + 0.1 * generator.normal(size=(n, D_MODEL))
    rows[:, -1] = 0
    rows[-HELDOUT * (DOCUMENT_TOKENS + 1) :, -1] = MARK
    return rows.astype(np.float32)


def build_store(path: Path, shard_rows: int, chunk_rows: int) -> Path:
    rows = low_rank_rows()
    documents = [[2 + i] * DOCUMENT_TOKENS for i in range(N_DOCUMENTS)]
    table = token_table(documents, HELDOUT)
    manifest = activations_manifest(D_MODEL)
    return write_table_store(
        path, manifest, table, lambda index: activations(rows[index]), shard_rows=shard_rows, chunk_rows=chunk_rows
    )


@pytest.fixture(scope="module")
def rows_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,160 training rows in shards of 256 and chunks of 32."""
    return build_store(tmp_path_factory.mktemp("rows") / "store", 256, 32)


@pytest.fixture(scope="module")
def config(rows_store: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    out = tmp_path_factory.mktemp("runs") / "run"
    return TrainConfig(store=rows_store, out=out, features=48, k=4, batch=120, tokens=9600, lr=0.01, device="cpu")


@pytest.fixture(scope="module")
def trained(config: TrainConfig) -> dict[str, Any]:
    """One run that no test changes, at `config.out`."""
    return train(config)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Tensor, Codes]]]:
    """(scaled rows, codes) of every step of any training."""
    calls: list[tuple[Tensor, Codes]] = []
    step = Trainee.step

    def recorded(self: Trainee, rows: Tensor, global_rows: int | None = None) -> tuple[Tensor, Losses]:
        x, losses = step(self, rows, global_rows)
        calls.append((x, losses.codes))
        return x, losses

    monkeypatch.setattr(Trainee, "step", recorded)
    return calls


def train_rows(store: Path) -> NDArray[np.float32]:
    opened = ActivationStore(store)
    return np.concatenate([opened.read(shard, f"acts/{SITE}") for shard in opened.shards()])


def metrics_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / METRICS).read_text().splitlines()]


def fve(rows: NDArray[np.float32], reconstruction: NDArray[np.float32]) -> float:
    return 1 - np.square(rows - reconstruction).sum() / np.square(rows - rows.mean(axis=0)).sum()


# Order and bits


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(config: TrainConfig, tmp_path: Path) -> None:
    short = replace(config, tokens=2400)
    first, again, other = (
        train(replace(short, out=tmp_path / name, seed=seed, order_seed=seed))
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    )
    for name in (WEIGHTS, METRICS):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()
        assert (tmp_path / "other" / name).read_bytes() != (tmp_path / "first" / name).read_bytes()
    assert again["metrics"] == first["metrics"] != other["metrics"]


def test_the_global_generators_play_no_part(config: TrainConfig, tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    torch.manual_seed(12345)
    seeded = torch.random.get_rng_state()
    short = replace(config, tokens=1200)
    train(replace(short, out=tmp_path / "a"))
    assert torch.equal(torch.random.get_rng_state(), seeded)
    torch.random.set_rng_state(state)
    train(replace(short, out=tmp_path / "b"))
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()


def test_full_batches_train_to_the_same_weights_whatever_the_chunks(config: TrainConfig, tmp_path: Path) -> None:
    """When a batch is an epoch, its rows are the same ones in another order: only rounding differs."""
    weights = []
    for shard_rows, chunk_rows in ((256, 32), (1024, 1024), (96, 8)):
        store = build_store(tmp_path / f"store{chunk_rows}", shard_rows, chunk_rows)
        n_rows = ActivationStore(store).n_rows()
        train(replace(config, store=store, out=tmp_path / f"run{chunk_rows}", batch=n_rows, tokens=8 * n_rows))
        weights.append(load_run(tmp_path / f"run{chunk_rows}")[0].state_dict())
    for other in weights[1:]:
        for name, tensor in weights[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-3 * float(tensor.abs().max()))


@pytest.mark.parametrize("batch", [20, 50, 300, 700, 2160], ids=lambda n: f"batch{n}")
def test_a_batch_may_be_smaller_or_larger_than_a_chunk_a_shard_or_a_round_and_as_large_as_the_store(
    config: TrainConfig, tmp_path: Path, batch: int
) -> None:
    """Chunks of 32, shards of 256, rounds of nine chunks, 2,160 rows."""
    found = train(replace(config, out=tmp_path / "run", batch=batch, tokens=3 * batch + 7))
    assert found["rows_seen"] == 3 * batch
    assert metrics_of(tmp_path / "run")[-1]["rows"] == found["rows_seen"]


def test_epochs_count_the_training_rows_and_tokens_win_over_them(config: TrainConfig, tmp_path: Path) -> None:
    n_rows = len(train_rows(config.store))
    two = train(replace(config, out=tmp_path / "two", tokens=0, epochs=2.0, batch=100))
    assert two["rows_seen"] == 2 * n_rows // 100 * 100
    assert train(replace(config, out=tmp_path / "one", tokens=1000, epochs=2.0, batch=100))["rows_seen"] == 1000


def test_heldout_rows_are_never_trained_on(config: TrainConfig, tmp_path: Path, steps: list[tuple[Tensor, Codes]]) -> None:
    store = ActivationStore(config.store)
    assert all((store.read(shard, f"acts/{SITE}")[:, -1] == MARK).all() for shard in store.shards("heldout"))
    found = train(replace(config, out=tmp_path / "run", tokens=0, epochs=2.0))
    seen = torch.cat([x for x, _ in steps])
    assert float(seen[:, -1].abs().max()) == 0
    assert len(torch.unique(seen, dim=0)) == len(train_rows(config.store))
    assert float(sample_rows(store, SITE, 10**9, 0)[:, -1].max()) == 0
    variance = train_rows(config.store).astype(np.float64).var(axis=0).mean()
    assert found["input_scale"] == pytest.approx(variance**-0.5, rel=1e-9)


# Fit


def test_the_loss_falls_and_the_explained_variance_rises(config: TrainConfig, trained: dict[str, Any]) -> None:
    first, *_, last = metrics_of(config.out)
    assert last["loss"] < 0.5 * first["loss"]
    assert last["fve"] > max(0.85, first["fve"])
    assert last["mse"] == pytest.approx(1 - last["fve"], rel=0.2)
    assert last["l0"] <= config.k


def test_an_l1_coefficient_lowers_the_mean_code(config: TrainConfig, tmp_path: Path) -> None:
    rows = torch.from_numpy(train_rows(config.store))
    means = []
    for l1 in (0.0, 10.0, 100.0):
        train(replace(config, out=tmp_path / f"l1-{l1}", l1=l1, tokens=3000))
        means.append(float(load_run(tmp_path / f"l1-{l1}")[0].encode(rows)[0].mean()))
    assert means[0] > 1.1 * means[1] > 1.1 * means[2]


def test_the_saved_weights_read_and_give_raw_rows(config: TrainConfig, trained: dict[str, Any]) -> None:
    sae, record = load_run(config.out)
    rows = train_rows(config.store)
    assert record.input_scale < 0.1
    reconstruction, values, _ = sae(torch.from_numpy(rows))
    assert fve(rows, reconstruction.numpy()) == pytest.approx(record.metrics["fve"], abs=0.01)
    assert float((values > 0).sum(dim=1).float().mean()) == pytest.approx(record.metrics["l0"], abs=0.2)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(config.features))


def test_the_dead_features_are_those_an_independent_count_finds(
    config: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    steps: list[tuple[Tensor, Codes]],
) -> None:
    monkeypatch.setattr(trainee, "DEAD_AFTER_ROWS", 600)
    monkeypatch.setattr(trainee, "FIRINGS_EXPECTED", 1)
    found = train(replace(config, out=tmp_path / "run", features=400, auxk=0.0, tokens=6000))["metrics"]
    fired, ever = (
        {int(feature) for _, codes in some for feature in codes.active.features[codes.values > 0]}
        for some in (steps[-600 // config.batch :], steps)
    )
    assert found["dead_features"] == 400 - len(fired)
    assert found["dead_window_rows"] == 600
    assert found["dead"] == pytest.approx(1 - len(fired) / 400)
    assert 0 < len(fired) < len(ever)


def test_rows_that_do_not_vary_are_refused(tmp_path: Path) -> None:
    table = token_table([[2] * 30] * 10, 1)
    rows = np.ones((400, 4), np.float32)
    write_table_store(tmp_path / "store", activations_manifest(4), table, lambda index: activations(rows[index]))
    with pytest.raises(InputError, match=r"the rows of resid_post\.0 are all the same; there is nothing to train on"):
        train(TrainConfig(store=tmp_path / "store", out=tmp_path / "run", features=8, k=2, batch=16))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "asked",
    [
        {"k": 0},
        {"k": 65},
        {"batch": 0},
        {"batch": 1 << 60},
        {"epochs": 0.0},
        {"epochs": 1e300},
        {"epochs": float("nan")},
        {"epochs": float("inf")},
        {"epochs": -1.0},
        {"tokens": 1 << 60},
        {"tokens": -1},
        {"lr": -1.0},
        {"l1": -0.1},
        {"auxk": -1.0},
        {"recipe": "x"},
        {"kernel": "x"},
    ],
)
def test_values_that_make_no_training_are_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(asked))):
        TrainConfig(**{"store": Path("s"), "out": Path("o"), "features": 64, "k": 4, **asked})


def test_a_batch_of_more_rows_than_an_epoch_has_is_refused(rows_store: Path, tmp_path: Path) -> None:
    """It was one step on repeated rows, or as many as `tokens` asked for."""
    for more in ({}, {"epochs": 10.0}, {"tokens": 10_000}):
        asked = TrainConfig(store=rows_store, out=tmp_path / "run", features=8, k=2, device="cpu", **more)  # type: ignore[arg-type]
        with pytest.raises(InputError, match=r"^batch 4,096: .* has 2,160 rows to train on, .* choose --batch 2160 or less"):
            train(asked)
    assert not (tmp_path / "run").exists()


def test_less_than_one_batch_of_an_epoch_is_refused(rows_store: Path, tmp_path: Path) -> None:
    asked = TrainConfig(store=rows_store, out=tmp_path / "run", features=8, k=2, batch=1000, epochs=0.25, device="cpu")
    with pytest.raises(InputError, match=r"^epochs 0\.25: 540 of .*2,160 rows, .* one batch of 1,000; choose --batch 540"):
        train(asked)
    assert not (tmp_path / "run").exists()


# The run on disk


def test_fewer_tokens_than_a_batch_are_refused_with_both_numbers() -> None:
    with pytest.raises(InputError, match=r"tokens 1,000: less than one batch of 4,096; choose --batch 1000 or less"):
        TrainConfig(store=Path("s"), out=Path("o"), tokens=1000)


def test_the_log_is_one_json_object_a_line(config: TrainConfig, trained: dict[str, Any]) -> None:
    lines = metrics_of(config.out)
    assert [line["rows"] for line in lines] == [3000, 6000, 9000, 9600]
    assert all(line.keys() >= {"rows", "loss", "mse", "fve", "l0", "dead", "lr"} for line in lines)


def test_tensorboard_is_told_what_the_log_is_told(config: TrainConfig, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own dependencies warn when they are loaded
        event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        train(replace(config, out=tmp_path / "run", tokens=6000, tensorboard=True))
    logged = [json.loads(line) for line in (tmp_path / "run" / METRICS).read_text().splitlines()]
    board = event_accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    assert set(board.Tags()["scalars"]) == set(logged[0])
    for name in ("fve", "l0"):
        assert [(e.step, e.value) for e in board.Scalars(name)] == [
            (line["rows"], pytest.approx(line[name], rel=1e-6)) for line in logged
        ]


def test_a_run_reads_back_as_it_was_written(config: TrainConfig, trained: dict[str, Any], tmp_path: Path) -> None:
    sae, record = load_run(config.out)
    assert record == RunRecord(**{name: trained[name] for name in RunRecord.__dataclass_fields__})
    assert (record.run_id, record.store_id) == (trained["run_id"], ActivationStore(config.store).store_id)
    save_run(tmp_path / "copy", sae, record)
    assert {file.name for file in (tmp_path / "copy").iterdir()} == {RECORD, WEIGHTS}
    for name in (RECORD, WEIGHTS):
        assert (tmp_path / "copy" / name).read_bytes() == (config.out / name).read_bytes()
    assert not any(parameter.requires_grad for parameter in sae.parameters())


@pytest.mark.parametrize(
    "edit",
    [{"k": 3}, {"site": "resid_post.1"}, {"extra": 1}, {"config": {}}, {"run_id": None}, {"version": 1}, {"format": ""}],
    ids=str,
)
def test_an_edited_record_is_refused(
    config: TrainConfig, trained: dict[str, Any], tmp_path: Path, edit: dict[str, Any]
) -> None:
    save_run(tmp_path / "run", *load_run(config.out))
    value = json.loads((tmp_path / "run" / RECORD).read_text())
    (tmp_path / "run" / RECORD).write_text(json.dumps(value | edit))
    with pytest.raises(NotAStore, match=r"was changed after it was written|not a run of format version"):
        load_run(tmp_path / "run")


@pytest.mark.parametrize("damage", ["missing", "truncated", "another run's"])
def test_a_run_without_its_weights_is_refused(
    config: TrainConfig, trained: dict[str, Any], tmp_path: Path, damage: str
) -> None:
    save_run(tmp_path / "run", *load_run(config.out))
    weights = tmp_path / "run" / WEIGHTS
    if damage == "another run's":
        save_run(tmp_path / "other", TopKSae(D_MODEL, 8, 4), load_run(config.out)[1])
        weights.write_bytes((tmp_path / "other" / WEIGHTS).read_bytes())
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-8])
    else:
        weights.unlink()
    with pytest.raises(NotAStore, match="not this run's weights"):
        load_run(tmp_path / "run")


def test_an_interrupted_training_leaves_no_run_and_can_be_started_again(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = replace(config, tokens=1200)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for module, name in ((Trainee, "metrics"), (run_record, "publish_json")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, interrupt)
            with pytest.raises(KeyboardInterrupt):
                train(replace(short, out=tmp_path / "run"))
        with pytest.raises(NotAStore, match="not a finished run"):
            load_run(tmp_path / "run")
    for name in ("run", "undisturbed"):
        train(replace(short, out=tmp_path / name))
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (tmp_path / "undisturbed" / WEIGHTS).read_bytes()


def test_an_output_that_exists_is_not_touched(config: TrainConfig, trained: dict[str, Any]) -> None:
    before = {file.name: file.read_bytes() for file in config.out.iterdir()}
    with pytest.raises(OutputExists, match="exists; choose another --out"):
        train(config)
    assert {file.name: file.read_bytes() for file in config.out.iterdir()} == before
