"""Steering and the lens: what they say is what the model does, and strength 0 does nothing."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

from actstore.errors import IdentityMismatch, InputError
from actstore.reader import ActivationStore
from pipelines.analysis.reader import Analysis
from pipelines.causal.engine.language_model import Spliced, open_spliced
from pipelines.causal.lens.stage import (
    DIRECT,
    LensConfig,
    lens,
    lens_lines,
    logit_weights,
    mean_scale,
    shape_of,
    train_batches,
)
from pipelines.causal.steer.stage import SteerConfig, Steering, generate, steer, steer_lines, steered
from pipelines.models.families.registry import family_of
from pipelines.models.forward import unembedding
from pipelines.sae.checkpoint import load_run, save_run

TEXT = "The fox went"
FEATURE = 5


@pytest.fixture(scope="module")
def spliced(run: Path) -> Spliced:
    return open_spliced(run, device="cpu")


def written(run: Path, **options: Any) -> list[str]:
    found = steer(SteerConfig(**{"run": run, "feature": FEATURE, "text": TEXT, "tokens": 12, "device": "cpu", **options}))
    return [own["text"] for own in found["texts"]]


def test_strength_0_is_what_the_model_writes_by_itself(run: Path, spliced: Spliced) -> None:
    ids = spliced.lm.prompt(TEXT).ids[None]
    with torch.no_grad():
        for _ in range(12):
            ids = torch.cat([ids, spliced.lm.model(input_ids=ids).logits[:, -1:].argmax(dim=2)], dim=1)
    expected = spliced.lm.codec.text(ids[0, len(spliced.lm.prompt(TEXT)) :].tolist())
    assert written(run, strength=(0.0, 1.0))[0] == expected
    assert written(run, strength=(1.0, 3.0), mode="scale")[0] == expected


@pytest.mark.parametrize("mode", ["add", "clamp", "scale"])
@pytest.mark.parametrize("at", ["all", "prompt", "last", "generated"])
def test_with_and_without_a_cache_the_text_is_the_same(run: Path, mode: str, at: str) -> None:
    options = {"mode": mode, "at": at, "unit": "raw", "strength": (0.0, 40.0), "temperature": 0.8, "seed": 3}
    assert written(run, **options) == written(run, **options, cache=False)


def test_a_strength_writes_the_same_alone_and_beside_others(run: Path) -> None:
    together = written(run, strength=(0.0, 1.0, 2.0), temperature=0.01, seed=4)
    assert together == [written(run, strength=(s,), temperature=0.01, seed=4)[0] for s in (0.0, 1.0, 2.0)]
    assert len(set(together)) > 1


def test_sampled_text_is_reproduced_by_its_seed(run: Path) -> None:
    first = written(run, temperature=1.0, seed=1)
    assert first == written(run, temperature=1.0, seed=1)
    assert first != written(run, temperature=1.0, seed=2)


@pytest.mark.parametrize(("named", "there"), [("old/store", "data/store"), ("data/store", "data/store"), ("store", "store")])
def test_a_run_finds_its_store_near_it(
    run: Path, store: Path, named: str, there: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moved together with it, or named by a path that was relative to another working folder."""
    shutil.copytree(store, tmp_path / there)
    moved = tmp_path / "data/sweep/a"
    sae, record = load_run(run)
    save_run(moved, sae, replace(record, config=record.config | {"store": named}))
    assert written(moved) == written(run)
    monkeypatch.chdir(moved)
    assert written(Path()) == written(run)
    shutil.move(tmp_path / there, tmp_path / "other")
    (tmp_path / there).mkdir()
    with pytest.raises(InputError, match=rf"its store is not at {named} .*; name it with --store"):
        written(moved)
    assert written(moved, store=str(tmp_path / "other")) == written(run)


def test_a_store_of_that_name_near_the_run_that_is_another_one_is_not_taken(
    run: Path, small_store: Path, tmp_path: Path
) -> None:
    shutil.copytree(small_store, tmp_path / "store")
    sae, record = load_run(run)
    save_run(tmp_path / "run", sae, replace(record, config=record.config | {"store": "old/store"}))
    with pytest.raises(InputError, match=r"its store is not at old/store"):
        written(tmp_path / "run")


@pytest.mark.parametrize(("mode", "expected"), [("add", 3.0), ("clamp", None), ("scale", None)])
def test_a_row_moves_along_the_decoder_direction_by_what_is_asked(
    spliced: Spliced, mode: str, expected: float | None
) -> None:
    prompt = spliced.lm.prompt(TEXT)
    ids, sae = prompt.ids[None], spliced.sae
    from pipelines.causal.engine.cut import cut_at

    rows = cut_at(spliced.lm.model, spliced.site, ids).x
    feature = int(sae.codes(rows[0, prompt.kept]).active.features[0])
    steering = Steering(feature, torch.tensor([1.5]), mode, 2.0 if mode != "scale" else 1.0, "all")
    moved = steered(spliced, steering, prompt, lambda: ids, lambda: ids.shape[1])(rows) - rows
    values, indices = sae.encode(rows[0, 1:])
    code = torch.where(indices == feature, values, 0.0).sum(dim=1)
    change = {"add": torch.full_like(code, 3.0), "clamp": 3.0 - code, "scale": 0.5 * code}[mode]
    torch.testing.assert_close(moved[0, 1:], change[:, None] * sae.W_dec[feature], rtol=1e-4, atol=1e-4)
    assert float(moved[0, 0].abs().max()) == 0  # the start token passes through
    assert expected is None or float(change[0]) == expected


@pytest.mark.parametrize(("at", "places"), [("all", [1, 2, 3]), ("prompt", [1, 2]), ("last", [2]), ("generated", [3])])
def test_only_the_positions_asked_for_are_steered(spliced: Spliced, at: str, places: list[int]) -> None:
    prompt = spliced.lm.prompt_of_ids([5, 6])
    ids = torch.cat([prompt.ids, torch.tensor([7])])[None]
    rows = torch.zeros(1, 4, 32)
    edit = steered(spliced, Steering(FEATURE, torch.tensor([1.0]), "add", 1.0, at), prompt, lambda: ids, lambda: 4)
    assert edit(rows).abs().sum(dim=2)[0].nonzero()[:, 0].tolist() == places


def test_the_unit_is_the_mean_norm_of_rows_or_the_peak(run: Path, store: Path, analysis: Path) -> None:
    asked = SteerConfig(run, FEATURE, TEXT, tokens=2, device="cpu")
    assert steer(asked)["unit"] == ActivationStore(store).statistics("resid_post.2").mean_norm
    from dataclasses import replace

    found = steer(replace(asked, unit="peak", mode="clamp", analysis=analysis))
    assert found["unit"] == pytest.approx(float(Analysis(analysis).peak[FEATURE]))
    lines = steer_lines(found)
    assert "the feature's peak" in lines[0]
    assert [part.strip() for part in lines[2].split("  ") if part.strip()] == ["0", "0.5", "1"]


def test_no_hook_is_left_behind(spliced: Spliced) -> None:
    prompt = spliced.lm.prompt(TEXT)
    with pytest.raises(RuntimeError):
        generate(spliced, prompt, Steering(FEATURE, torch.zeros(2, 2), "add", 1.0, "all"), 2)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in spliced.lm.model.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature": 64}, "feature 64: the SAE has 64 features"),
        ({"text": ""}, "has no token"),
        ({"tokens": 63}, r"more than the model's 64 positions; ask for fewer"),
        ({"mode": "push"}, "mode 'push': choose one of add, clamp, scale"),
        ({"unit": "peak"}, "name it with --analysis"),
        ({"strength": ()}, "need at least one token and one strength"),
        ({"temperature": -1.0}, "no negative temperature"),
    ],
)
def test_what_cannot_be_steered_is_refused(run: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        written(run, **options)


def test_a_store_of_another_layer_is_refused(run: Path, small_store: Path) -> None:
    with pytest.raises((InputError, IdentityMismatch), match=r"the SAE reads resid_post\.2"):
        written(run, store=str(small_store))


def test_the_lens_is_the_direct_path_through_the_final_layer_norm(run: Path, store: Path, spliced: Spliced) -> None:
    """Against plain numpy, and against the change of logits when the scale is held."""
    model, d = spliced.lm.model, spliced.sae.W_dec[FEATURE].double().numpy()
    gamma, w_u = family_of(model).final_norm(model).weight.double().numpy(), unembedding(model).double().numpy()
    sigma = mean_scale(spliced.lm, train_batches(ActivationStore(store), 8))
    expected = w_u @ (gamma * (d - d.mean())) / sigma
    expected -= expected.mean()
    found = logit_weights(spliced.lm, spliced.sae.W_dec[[FEATURE]], sigma)[0].numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    card = lens(LensConfig(run, FEATURE, top=4, windows=8, device="cpu"))
    assert card["path"] == DIRECT
    assert [t["token"] for t in card["promoted"]] == np.argsort(-expected)[:4].tolist()
    assert [t["token"] for t in card["suppressed"]] == np.argsort(expected)[:4].tolist()
    assert card["mean_scale"] == pytest.approx(sigma)
    assert DIRECT in lens_lines(card)[0]


def test_the_mean_scale_is_that_of_the_final_layer_norm_over_rows(store: Path, spliced: Spliced) -> None:
    """What the module itself divides by, read from its input by a hook."""
    model, seen = spliced.lm.model, []
    batches = train_batches(ActivationStore(store), 5)
    handle = family_of(model).final_norm(model).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    scales = []
    try:
        for windows, chosen in batches:
            inputs, kept = windows.batch(chosen)
            model(input_ids=torch.from_numpy(inputs))
            rows = seen.pop()[torch.from_numpy(kept)].double().numpy()
            scales.append(np.sqrt(rows.var(axis=1) + family_of(model).final_norm(model).eps))
    finally:
        handle.remove()
    assert mean_scale(spliced.lm, batches) == pytest.approx(np.concatenate(scales).mean(), rel=1e-5)


def test_skew_and_kurtosis_are_scipys_and_sort_the_table(run: Path, spliced: Spliced) -> None:
    weights = torch.randn(6, 500, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) ** 3
    skew, kurtosis = shape_of(weights)
    np.testing.assert_allclose(skew.numpy(), scipy.stats.skew(weights.numpy(), axis=1), rtol=1e-9)
    np.testing.assert_allclose(kurtosis.numpy(), scipy.stats.kurtosis(weights.numpy(), axis=1), rtol=1e-9)
    table = lens(LensConfig(run, top=64, windows=4, device="cpu"))
    found = [row["kurtosis"] for row in table["features"]]
    assert found == sorted(found, reverse=True)
    assert len(found) == 64
    assert len(lens_lines(table)) == 66
    with pytest.raises(InputError, match="sort 'size': choose one of kurtosis"):
        LensConfig(run, sort="size")
    with pytest.raises(InputError, match="feature 99: the SAE has 64 features"):
        lens(LensConfig(run, 99, device="cpu"))
