"""SAEs trained in one pass are those that are trained alone, and are compared."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from storekit import StoreSpec, write_store

from actstore.errors import InputError, OutputExists
from pipelines.sae.checkpoint import RECORD, WEIGHTS
from pipelines.train import session
from pipelines.train.config import TrainConfig
from pipelines.train.log import METRICS
from pipelines.train.stage import train, train_together
from pipelines.train.sweep import FRONTIER, SUMMARY, comparison_lines, grid, sweep

SPEC = StoreSpec(
    n_documents=200,
    sites=(("resid_post.0", "fp16"), ("resid_post.1", "bf16")),
    d_model=16,
    shard_rows=512,
    chunk_rows=64,
)


@pytest.fixture(scope="module")
def rows_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("rows") / "store", SPEC)


@pytest.fixture(scope="module")
def options(rows_store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Eight SAEs that differ in everything that can differ, but the architecture."""
    out = tmp_path_factory.mktemp("swept") / "sweep"
    return {
        **{"store": rows_store, "out": out, "layer": (0, 1), "site": ("resid_post",), "features": (64, 96), "k": (4,)},
        **{"seed": (0, 7), "tokens": 6000, "batch": 200, "device": "cpu"},
    }


@pytest.fixture(scope="module")
def swept(options: dict[str, Any]) -> dict[str, Any]:
    return sweep(options)


def test_each_sae_of_a_sweep_is_bit_identical_to_the_one_trained_alone(
    options: dict[str, Any], swept: dict[str, Any], tmp_path: Path
) -> None:
    configs = grid(options)
    assert len(configs) == 8
    for config in configs:
        train(replace(config, out=tmp_path / config.out.name))
        for name in (WEIGHTS, METRICS, RECORD):
            assert (tmp_path / config.out.name / name).read_bytes() == (config.out / name).read_bytes()
    assert len({(config.out / WEIGHTS).read_bytes() for config in configs}) == 8


def test_the_comparison_is_of_the_runs_best_first(options: dict[str, Any], swept: dict[str, Any]) -> None:
    out = options["out"]
    summary = json.loads((out / SUMMARY).read_text())
    assert summary["runs"] == swept["runs"]
    assert {row["run"] for row in swept["runs"]} == {path.parent.name for path in out.glob(f"*/{RECORD}")}
    scores = [row["fve"] for row in swept["runs"]]
    assert scores == sorted(scores, reverse=True)
    lines = comparison_lines(swept)
    assert [line.split()[0] for line in lines[1:-1]] == [row["run"] for row in swept["runs"]]
    drawing = ElementTree.parse(out / FRONTIER).getroot()
    assert drawing.tag.endswith("svg")
    assert {path.name for path in out.iterdir()} == {row["run"] for row in swept["runs"]} | {SUMMARY, FRONTIER}


def test_runs_are_named_by_what_they_differ_in(options: dict[str, Any]) -> None:
    assert grid(options)[0].out.name == "layer0-features64-seed0"
    assert [config.out.name for config in grid({**options, "layer": (0,), "seed": (0,), "lr": (0.01, 1e-4)})][:2] == [
        "features64-lr0.01",
        "features64-lr0.0001",
    ]


def test_one_combination_is_a_run_and_no_sweep(options: dict[str, Any], tmp_path: Path) -> None:
    one = {**options, "out": tmp_path / "run", "layer": (0,), "features": (64,), "seed": (0,)}
    assert sweep(one)["run"] == str(tmp_path / "run")
    assert not (tmp_path / "run" / SUMMARY).exists()


def test_a_finished_sweep_is_not_touched(options: dict[str, Any], swept: dict[str, Any]) -> None:
    with pytest.raises(OutputExists, match=r"exists; choose another --out|holds a finished sweep"):
        sweep(options)


@pytest.mark.parametrize("first", [True, False])
def test_an_sae_that_diverges_is_left_out_and_the_others_end_as_ever(
    first: bool, options: dict[str, Any], swept: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    good, bad = grid(options)[0], 1e30
    own = {"layer": (0,), "features": (64,), "seed": (0,), "lr": (bad, good.lr) if first else (good.lr, bad)}
    found = sweep({**options, **own, "out": tmp_path / "sweep"})
    (run,), (diverged,) = found["runs"], found["diverged"]
    assert (diverged["run"], diverged["diverged_within"]) == ("lr1e+30", 5000)
    assert "lr1e+30: training diverged within 5,000 rows; choose an --lr below 1e+30; the other" in capfd.readouterr().err
    assert (tmp_path / "sweep" / run["run"] / WEIGHTS).read_bytes() == (good.out / WEIGHTS).read_bytes()
    assert not (tmp_path / "sweep" / "lr1e+30" / RECORD).exists()
    assert "lr1e+30  diverged within 5,000 rows" in comparison_lines(found)


def test_a_sweep_goes_on_from_its_saved_state_without_the_sae_that_diverged(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {**options, "layer": (0,), "features": (64,), "seed": (0,), "lr": (1e30, 1e-3), "out": tmp_path / "sweep"}
    whole = sweep({**asked, "out": tmp_path / "whole"})
    monkeypatch.setattr(session, "LOG_EVERY_STEPS", 2)
    save = session.save_state

    def saved_then_cut_off(*arguments: Any) -> None:
        save(*arguments)
        if arguments[2].diverged:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(session, "save_state", saved_then_cut_off)
        with pytest.raises(KeyboardInterrupt):
            sweep({**asked, "checkpoint_minutes": 1e-9})
    found = sweep({**asked, "resume": True})
    assert [row["run"] for row in found["diverged"]] == ["lr1e+30"]
    assert found["diverged"][0]["diverged_within"] < 1000
    weights = [tmp_path / name / "lr0.001" / WEIGHTS for name in ("sweep", "whole")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert found["runs"][0]["fve"] == whole["runs"][0]["fve"]


def test_when_every_sae_diverges_that_is_an_error(options: dict[str, Any], tmp_path: Path) -> None:
    own = {"layer": (0,), "features": (64,), "seed": (0,)}
    message = r"diverged within 5,000 rows; choose an --lr below .e\+30, and another --out"
    with pytest.raises(InputError, match=message):
        sweep({**options, **own, "lr": (1e30,), "out": tmp_path / "one"})
    with pytest.raises(InputError, match=message):
        sweep({**options, **own, "lr": (1e30, 2e30), "out": tmp_path / "two"})


def test_a_last_step_that_breaks_the_weights_publishes_nothing(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"layer": (0,), "features": (64,), "seed": (0,), "out": tmp_path / "run"}
    step = session.Trainee.step

    def breaking(self: session.Trainee, *arguments: Any) -> Any:
        found = step(self, *arguments)
        if self.n_steps == 30:
            self.sae.W_enc.data[0, 0] = float("nan")
        return found

    monkeypatch.setattr(session.Trainee, "step", breaking)
    with pytest.raises(InputError, match="diverged within 6,000 rows"):
        sweep({**options, **own})
    assert not (tmp_path / "run" / RECORD).exists()


def test_a_value_given_twice_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="k 4, 4: a value is given twice"):
        grid({**options, "k": (4, 4)})


def test_saes_of_other_stores_or_batches_are_not_trained_together(options: dict[str, Any], tmp_path: Path) -> None:
    first, second, *_ = grid({**options, "out": tmp_path})
    with pytest.raises(InputError, match="may differ in layer, site, architecture, features, k, lr, l1, seed, out only"):
        train_together([first, replace(second, batch=100)], tmp_path)
    with pytest.raises(InputError, match="each needs a place of its own"):
        train_together([first, replace(second, out=first.out)], tmp_path)


def test_an_interrupted_sweep_is_resumed_to_the_same_bits(
    options: dict[str, Any], swept: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = {**options, "out": tmp_path / "sweep"}
    save = session.save_state

    def saved_then_cut_off(*arguments: Any) -> None:
        save(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(session, "save_state", saved_then_cut_off)
        with pytest.raises(KeyboardInterrupt):
            sweep({**again, "checkpoint_minutes": 1e-9})
    sweep({**again, "resume": True})
    for config in grid(options):
        for name in (WEIGHTS, METRICS, RECORD):
            assert (tmp_path / "sweep" / config.out.name / name).read_bytes() == (config.out / name).read_bytes()
    assert isinstance(config, TrainConfig)


@pytest.mark.parametrize("moment", ["publishing", "comparing"])
def test_a_sweep_cut_off_after_its_training_is_finished_by_resume(
    moment: str, options: dict[str, Any], swept: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = {**options, "out": tmp_path / "sweep"}
    save, n_saved = session.save_run, [0]

    def second_fails(*arguments: Any) -> Any:
        n_saved[0] += 1
        if n_saved[0] == 2:
            raise KeyboardInterrupt
        return save(*arguments)

    def never(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if moment == "publishing":
            patch.setattr(session, "save_run", second_fails)
        else:
            patch.setattr("pipelines.train.sweep.draw_frontier", never)
        with pytest.raises(KeyboardInterrupt):
            sweep(again)
    found = sweep({**again, "resume": True})
    assert [row["fve"] for row in found["runs"]] == [row["fve"] for row in swept["runs"]]
    for config in grid(options):
        for name in (WEIGHTS, METRICS, RECORD):
            assert (tmp_path / "sweep" / config.out.name / name).read_bytes() == (config.out / name).read_bytes()
    assert {path.name for path in (tmp_path / "sweep").iterdir()} == {path.name for path in options["out"].iterdir()}


def test_large_numbers_make_names_of_their_own(options: dict[str, Any]) -> None:
    names = [config.out.name for config in grid({**options, "layer": (0,), "features": (64,), "seed": (1234567, 1234568)})]
    assert names == ["seed1234567", "seed1234568"]
