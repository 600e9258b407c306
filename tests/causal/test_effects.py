"""Effects over the corpus: a planted feature is found, a killed measurement goes on, intervals are the bootstrap's."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from daskkit import until
from forkkit import PROCESSES
from modelkit import build_model
from safetensors.torch import load_file, save_file
from storekit import files_of

from actstore import paths
from actstore.errors import IdentityMismatch, InputError, NoSpace, OutputExists
from actstore.files import RESERVE_BYTES, read_json
from benchmarks.roles import benjamini_hochberg, wilson
from pipelines.causal.ablate.feature_edits import Edit, ablate, read_prompt
from pipelines.causal.ablate.stage import drawn_value
from pipelines.causal.effects import measure as stage
from pipelines.causal.effects.stage import EffectsConfig, effects
from pipelines.causal.effects.table import document_interval, effects_lines, feature_table, read_table, summary
from pipelines.causal.engine.drawn_firings import PART, draw_firings, window_ids
from pipelines.causal.engine.language_model import Prompt, open_spliced
from pipelines.codes.code_store import CodeStore, read_codes
from pipelines.codes.stage import EncodeConfig, encode
from pipelines.collect.config import CollectConfig
from pipelines.collect.stage import collect
from pipelines.sae.architectures.topk import TopKSae
from pipelines.sae.checkpoint import load_run, save_run
from pipelines.text.split import document_halves
from pipelines.text.tokenizer_files import load_tokenizer

PLANTED, CHANNEL = 7, 5
CUE, ANSWER = " wood", " mole"


@pytest.fixture(scope="module")
def planted(texts: Path, run: Path, client: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(run, codes): a model that answers every cue by way of one channel, and an SAE with one feature of that channel."""
    folder = tmp_path_factory.mktemp("planted")
    model = build_model(folder / "model", texts, outliers=False)
    codec, _ = load_tokenizer(str(model))
    (cue,), (answer,) = codec.ids([CUE, ANSWER])
    weights = load_file(model / "model.safetensors")
    for token, value in ((cue, 2.0), (answer, 8.0)):
        weights["transformer.wte.weight"][token, CHANNEL] = value
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    collect(
        CollectConfig(
            out=folder / "store", model=str(model), corpus=str(texts), layer=(1,), context=32, encoding="fp32", tokens=3000
        )
    )
    sae = TopKSae(32, 64, 6, seed=3)
    directions = sae.W_dec.detach().clone()
    directions[:, CHANNEL] = 0
    directions[PLANTED] = torch.eye(32)[CHANNEL]
    directions /= directions.norm(dim=1, keepdim=True)
    encoder, bias = directions.clone(), torch.zeros(64)
    encoder[PLANTED, CHANNEL], bias[PLANTED] = 2.0, -2.0  # fires above 1, and at a cue's 2 its code is all of the channel
    sae.load_state_dict({**sae.state_dict(), "W_dec": directions, "W_enc": encoder, "b_enc": bias})
    from actstore.reader import ActivationStore

    store = ActivationStore(folder / "store")
    _, record = load_run(run)
    save_run(
        folder / "run",
        sae,
        replace(
            record,
            n_features=64,
            k=6,
            code_width=6,
            site="resid_post.1",
            store_id=store.store_id,
            snapshot=store.snapshot,
            weights_sha256=store.manifest.model.weights_sha256,
            model=str(model),
            config={**record.config, "store": str(folder / "store")},
        ),
    )
    encode(EncodeConfig(store=folder / "store", run=folder / "run", out=folder / "codes"), client)
    return folder / "run", folder / "codes"


def config(pair: tuple[Path, Path], out: Path, **options: Any) -> EffectsConfig:
    return EffectsConfig(**{"run": pair[0], "codes": pair[1], "out": out, "firings": 40, "device": "cpu", **options})


@pytest.fixture(scope="module")
def found(planted: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return effects(config(planted, tmp_path_factory.mktemp("effects") / "out"))


def test_a_planted_feature_that_carries_the_answer_is_found(found: dict[str, Any]) -> None:
    strongest = found["strongest"]
    assert strongest[0]["feature"] == PLANTED
    assert strongest[0]["promoted"][0] == ANSWER
    assert strongest[0]["kl_low"] > strongest[1]["kl_high"]
    assert strongest[0]["kl"] > 100 * found["median_kl"]


def by_hand(spliced: Any, ids: torch.Tensor, place: int, feature: int) -> torch.Tensor:
    """(position, vocabulary) logits of the whole model with a feature taken out of one row after block 1, by a hook."""

    def edit(_: Any, __: Any, output: Any) -> Any:
        x = (output[0] if isinstance(output, tuple) else output).clone()
        values, indices = spliced.sae.encode(x[0, place][None])
        x[0, place] -= values[0][indices[0] == feature].sum() * spliced.sae.W_dec[feature]
        return (x, *output[1:]) if isinstance(output, tuple) else x

    handle = spliced.lm.model.transformer.h[1].register_forward_hook(edit)
    try:
        with torch.no_grad():
            found: torch.Tensor = spliced.lm.model(input_ids=ids[None], use_cache=False).logits[0]
            return found
    finally:
        handle.remove()


def test_an_effect_is_what_ablating_that_row_alone_does(planted: tuple[Path, Path]) -> None:
    """And with `later`, the mean over that position and the later ones that have a next token in the window."""
    spliced, codes = open_spliced(planted[0], device="cpu"), CodeStore(planted[1])
    firings = draw_firings(codes, np.array([PLANTED, 3, 11]), 4, 0)
    vocabulary = int(spliced.lm.model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    measured = {}
    for how in ("firing", "later"):
        kept = stage.Measured.empty(len(firings), len(set(firings.feature.tolist())), vocabulary)
        assert sum(stage.measure(spliced, codes, firings, kept, how)) == len(firings)
        measured[how] = kept
    policy = codes.manifest.policy
    shift = np.zeros((3, vocabulary))
    assert firings.weight.max() > 1
    for i in range(len(firings)):
        n_real = int(firings.n_real[i])
        ids = torch.from_numpy(window_ids(codes, int(firings.segment[i]), firings.window[[i]])[0][:n_real])
        kept_rows = ids != policy.separator_token_id
        kept_rows[0] = False
        read = read_prompt(spliced, Prompt(ids, kept_rows, ("",) * n_real), [int(firings.feature[i])])
        place = int(firings.position[i])
        by_position = ablate(read, [Edit.of(int(firings.feature[i]), [place])]).normal_ablated[0]
        assert measured["firing"].kl[i] == pytest.approx(float(by_position[place]), rel=1e-3, abs=1e-8)
        assert measured["later"].kl[i] == pytest.approx(float(by_position[place : n_real - 1].mean()), rel=1e-3, abs=1e-8)
        assert int(ids[place + 1]) == firings.next_token[i]
        without = by_hand(spliced, ids, place, int(firings.feature[i]))
        with torch.no_grad():
            normal = spliced.lm.model(input_ids=ids[None], use_cache=False).logits[0]
        rises = [float(x.log_softmax(1)[place, ids[place + 1]]) for x in (normal, without)]
        assert measured["firing"].loss[i] == pytest.approx(rises[0] - rises[1], abs=2e-5)
        targets = ids[place + 1 :, None]
        both = [x.log_softmax(1)[place : n_real - 1].gather(1, targets).mean() for x in (normal, without)]
        assert measured["later"].loss[i] == pytest.approx(float(both[0] - both[1]), abs=2e-5)
        change = (without - normal)[place]
        shift[sorted({PLANTED, 3, 11}).index(int(firings.feature[i]))] += (
            firings.weight[i] * (change - change.mean()).numpy()
        )
    np.testing.assert_allclose(measured["firing"].shift, shift, atol=1e-3)
    assert float(np.abs(shift).max()) > 1


def test_a_measurement_that_was_stopped_goes_on_and_ends_the_same(
    planted: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = config(planted, tmp_path / "out", features=(PLANTED, 3, 4, 5), resamples=50)
    monkeypatch.setattr(stage, "BLOCK_FIRINGS", 20)
    monkeypatch.setattr(stage, "BATCH_POSITIONS", 128)
    whole = effects(replace(asked, out=tmp_path / "whole"))
    saves = []
    real = stage.Measured.save

    def save(self: stage.Measured, path: Path, plan_id: str) -> None:
        real(self, path, plan_id)
        saves.append(self.done)
        if len(saves) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(stage.Measured, "save", save)
    with pytest.raises(KeyboardInterrupt):
        effects(asked)
    assert not (asked.out / "effects.json").exists()
    assert 0 < saves[-1] < whole["n_firings"]
    again = effects(asked)
    assert saves[2] > saves[1]
    assert again["strongest"] == whole["strongest"]
    assert (asked.out / "effects.parquet").read_bytes() == (tmp_path / "whole" / "effects.parquet").read_bytes()


def measure_in_small_blocks(asked: EffectsConfig) -> None:
    """`effects` in a process of its own that publishes after about 5 firings, and takes its time with each block."""
    torch.set_num_threads(1)
    stage.BLOCK_FIRINGS, stage.BATCH_POSITIONS = 5, 64
    real = stage.Measured.save

    def save(self: stage.Measured, path: Path, plan_id: str) -> None:
        real(self, path, plan_id)
        time.sleep(0.01)

    stage.Measured.save = save  # type: ignore[method-assign]
    effects(asked)


def test_killed_three_times_and_started_again_it_ends_with_the_same_bytes(
    planted: tuple[Path, Path], tmp_path: Path
) -> None:
    asked = config(planted, tmp_path / "out", features=(PLANTED, 3, 4, 5), resamples=50)
    moments, done = random.Random(0), [0]
    part = asked.out / "parts" / "0000.npz"
    for _ in range(3):
        before = part.stat().st_mtime_ns if part.exists() else 0
        process = PROCESSES.Process(target=measure_in_small_blocks, args=(asked,))
        process.start()
        assert process.pid is not None
        until(lambda before=before: (part.exists() and part.stat().st_mtime_ns > before) or None)
        time.sleep(moments.uniform(0, 0.1))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not (asked.out / "effects.json").exists()
        with np.load(part) as kept:
            done.append(int(kept["done"]))
    assert done == sorted(set(done)), "each start went on from the last one"
    for own in (asked, replace(asked, out=tmp_path / "whole")):
        process = PROCESSES.Process(target=measure_in_small_blocks, args=(own,))
        process.start()
        process.join()
        assert process.exitcode == 0
    assert files_of(asked.out) == files_of(tmp_path / "whole")
    assert {path.name for path in asked.out.iterdir()} == {
        "plan.json",
        "effects.json",
        "effects.parquet",
        "seal.json",
        "lock",
    }


def test_a_finished_measurement_is_not_made_again_and_is_joined_to_another_analysis(
    run: Path, codes: Path, analysis: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = EffectsConfig(run, codes, tmp_path / "out", top=5, firings=20, resamples=20, device="cpu")
    effects(asked)
    plain = files_of(asked.out)
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.causal.effects.stage.measure", None)
        effects(asked)
        assert files_of(asked.out) == plain
        effects(replace(asked, analysis=analysis))
        joined = files_of(asked.out)
        assert "band" in read_table((asked.out / "effects.parquet").read_bytes())[0]
        effects(asked)
    assert files_of(asked.out) == plain
    effects(replace(asked, out=tmp_path / "anew", analysis=analysis))
    assert files_of(tmp_path / "anew") == joined


def test_what_the_disk_cannot_hold_is_refused_before_anything_is_written(
    planted: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = config(planted, tmp_path / "out", features=(PLANTED, 3))
    monkeypatch.setattr("actstore.files.free_bytes", lambda path: RESERVE_BYTES + 1000)
    with pytest.raises(NoSpace, match="what is measured of each feature"):
        effects(asked)
    assert not asked.out.exists()


def test_the_space_asked_for_is_what_a_part_takes(tmp_path: Path) -> None:
    stage.Measured.empty(5000, 30, 400).save(tmp_path / "part.npz", "plan")
    assert (tmp_path / "part.npz").stat().st_size <= stage.measured_bytes(5000, 30, 400) <= 1.1 * (16 * 5000 + 4 * 30 * 400)


def test_means_are_weighted_by_the_firings_that_each_stands_for(planted: tuple[Path, Path]) -> None:
    spliced, codes = open_spliced(planted[0], device="cpu"), CodeStore(planted[1])
    firings = draw_firings(codes, np.array([PLANTED, 3]), 6, 0)
    firings = replace(firings, weight=np.arange(1, len(firings) + 1))
    rng = np.random.Generator(np.random.PCG64(1))
    measured = stage.Measured(rng.random(len(firings)), rng.random(len(firings)), rng.random((2, 300), np.float32))
    rows = feature_table(firings, np.array([3, PLANTED]), measured, spliced.lm.codec, 10, 0)
    for i, row in enumerate(rows):
        mine = firings.feature == row["feature"]
        weight = firings.weight[mine]
        assert row["kl"] == pytest.approx(np.average(measured.kl[mine], weights=weight))
        assert row["loss"] == pytest.approx(np.average(measured.loss[mine], weights=weight))
        assert row["value"] == pytest.approx(np.average(firings.value[mine], weights=weight))
        lowest = np.sort(measured.shift[i])[:5] / weight.sum()
        np.testing.assert_allclose(row["promoted_weight"], -lowest, rtol=1e-6)
        assert row["promoted"][0] == spliced.lm.codec.text([int(measured.shift[i].argmin())])


def test_a_drawn_value_is_of_each_firing_as_often_as_it_stands_for(codes: Path) -> None:
    firings = draw_firings(CodeStore(codes), None, 50, 0)
    feature = int(firings.feature[np.argmax(firings.weight)])
    own = firings.take(firings.feature == feature)
    assert own.weight.max() > 1
    drawn = [drawn_value(own, (i + 0.5) / own.weight.sum()) for i in range(own.weight.sum())]
    np.testing.assert_array_equal(drawn, np.repeat(own.value, own.weight))


def test_the_table_has_a_row_for_each_feature_that_fires(found: dict[str, Any], planted: tuple[Path, Path]) -> None:
    rows = read_table((Path(found["out"]) / "effects.parquet").read_bytes())
    codes = CodeStore(planted[1])
    fires = np.zeros(64, np.int64)
    for shard in codes.shards(PART):
        indices, values = read_codes(codes, shard)
        np.add.at(fires, indices[values > 0], 1)
    assert [row["feature"] for row in rows] == np.flatnonzero(fires).tolist()
    assert all(0 < row["fires"] <= fires[row["feature"]] for row in rows)
    assert all(row["kl"] >= 0 and np.isfinite(row["loss"]) for row in rows)
    assert all(row["kl_low"] <= row["kl"] <= row["kl_high"] for row in rows if row["documents"] > 3)
    assert read_json(Path(found["out"]) / "effects.json")["median_kl"] == found["median_kl"]
    lines = effects_lines(found)
    assert f"{len(rows)} features" in lines[0]
    assert any(line.strip().startswith(f"{PLANTED} ") for line in lines)


def test_firings_are_one_a_window_in_one_order_of_windows_for_all_features(codes: Path) -> None:
    opened = CodeStore(codes)
    drawn = draw_firings(opened, None, 5, 0)
    pairs = Counter(zip(drawn.feature.tolist(), drawn.window.tolist(), strict=True))
    windows = Counter(window for shard in opened.shards(PART) for window in set(opened.read(shard, paths.WINDOW).tolist()))
    assert all(n <= windows[window] for (_, window), n in pairs.items()), "a window that a shard's bound cuts counts as two"
    assert np.bincount(drawn.feature).max() == 5
    common = [set(drawn.window[drawn.feature == f].tolist()) for f in np.argsort(-drawn.total)[:4]]
    assert len(set.union(*common)) < sum(map(len, common))
    everything = draw_firings(opened, None, 10**6, 0)
    np.testing.assert_array_equal(np.bincount(everything.feature, everything.weight, 64), everything.total)
    again = draw_firings(opened, np.array([1, 2]), 5, 0)
    mine = drawn.take(np.isin(drawn.feature, [1, 2]))
    if set(again.feature.tolist()) == set(mine.feature.tolist()):
        np.testing.assert_array_equal(again.window, mine.window)
    assert not np.array_equal(draw_firings(opened, None, 5, 1).window, drawn.window)


def test_a_half_of_the_documents_keeps_to_it(codes: Path) -> None:
    opened = CodeStore(codes)
    halves = document_halves(opened.document_keys(0))
    totals = []
    for half in (0, 1):
        drawn = draw_firings(opened, None, 50, 0, half=half)
        assert len(drawn) > 0
        assert (halves[drawn.document] == half).all()
        totals.append(drawn.total)
    np.testing.assert_array_equal(totals[0] + totals[1], draw_firings(opened, None, 1, 0).total)


def test_the_interval_is_the_bootstrap_over_documents() -> None:
    rng = np.random.Generator(np.random.PCG64(0))
    document = np.repeat(np.arange(12), 4)
    values = (rng.normal(size=12)[document] + 0.1 * rng.normal(size=48))[:, None]
    weight = rng.integers(1, 5, 48).astype(float)
    low, high = document_interval(values, weight, document, 4000, rng)
    means = []
    for _ in range(4000):
        rows = np.concatenate([np.flatnonzero(document == d) for d in rng.integers(0, 12, 12)])
        means.append(np.average(values[rows, 0], weights=weight[rows]))
    np.testing.assert_allclose([low[0], high[0]], np.percentile(means, [2.5, 97.5]), atol=0.06)
    assert high[0] - low[0] > 4 * values.std() / np.sqrt(48)  # that of rows taken as independent is narrower
    assert np.isnan(document_interval(values, weight, np.zeros(48, int), 10, rng)[0]).all()


def test_the_lists_are_of_the_quarters_and_beyond_the_median() -> None:
    rows = [
        {"feature": f, "frequency": f / 100, "kl": k, "kl_low": k * 0.9, "kl_high": k * 1.1, "loss": 0.0, "measured": 50}
        | {"documents": 9}
        for f, k in enumerate([5.0, 0.1, 1.0, 1.0, 1.0, 1.0, 3.0, 0.01])
    ]
    listed = summary([*rows, {**rows[0], "feature": 8, "measured": 3, "kl": 99.0}])
    assert [row["feature"] for row in listed["rare_but_decisive"]] == [0]
    assert [row["feature"] for row in listed["frequent_but_inert"]] == [7]
    assert listed["strongest"][0]["feature"] == 0


def test_another_configuration_another_run_or_a_folder_in_use_is_refused(
    found: dict[str, Any], planted: tuple[Path, Path], codes: Path, run: Path, analysis: Path, tmp_path: Path
) -> None:
    with pytest.raises(OutputExists, match=r"holds other effects \(firings 40 there, 9 now\)"):
        effects(config(planted, Path(found["out"]), firings=9))
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(OutputExists, match="not empty"):
        effects(config(planted, tmp_path / "used"))
    with pytest.raises(IdentityMismatch, match="pass the codes of this run"):
        effects(config((planted[0], codes), tmp_path / "a"))
    with pytest.raises(IdentityMismatch, match="pass its analysis"):
        effects(config(planted, tmp_path / "b", analysis=analysis))
    with pytest.raises(InputError, match="feature 64: the SAE has 64 features"):
        effects(config(planted, tmp_path / "c", features=(64,)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["used"]


def test_joined_to_an_analysis_it_says_what_features_fire_on(run: Path, codes: Path, analysis: Path, tmp_path: Path) -> None:
    found = effects(
        EffectsConfig(run, codes, tmp_path / "out", top=6, firings=30, analysis=analysis, resamples=50, device="cpu")
    )
    assert found["n_features"] == 6
    row = read_table((tmp_path / "out" / "effects.parquet").read_bytes())[0]
    assert {"band", "tokens", "density", "peak"} <= set(row)
    assert "fires on" in "\n".join(effects_lines(found))
    json.dumps(found)
    shutil.rmtree(tmp_path / "out")


def test_benjamini_hochberg_and_wilson_by_their_definitions() -> None:
    p = np.array([0.001, 0.2, 0.012, 0.03, 0.04])
    rejected = benjamini_hochberg(p, 0.05)
    ranked = np.sort(p)
    bound = max(ranked[i] for i in range(5) if ranked[i] <= 0.05 * (i + 1) / 5)
    np.testing.assert_array_equal(rejected, p <= bound)
    low, high = wilson(8, 10)
    assert (round(low, 3), round(high, 3)) == (0.490, 0.943)


def test_that_no_feature_can_be_listed_is_said_before_anything_is_measured(
    planted: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipelines.causal.effects.stage.measure", stopped)
    said = {}
    for firings in (16, 20):
        with pytest.raises(KeyboardInterrupt):
            effects(config(planted, tmp_path / str(firings), firings=firings, top=16))
        said[firings] = [line for line in capsys.readouterr().err.splitlines() if "no list is made" in line]
    assert said == {
        16: [
            "effects: no feature has 20 of its 16 firings at most in two documents, so that no list is made, only "
            "effects.parquet; for lists, stop, and take another --out and more --firings."
        ],
        20: [],
    }
