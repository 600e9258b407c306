"""The recipe of training: how far a step takes what, when a feature is helped, and that the help is of use."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from actstore.errors import DamagedStore
from pipelines.sae.architectures.registry import architectures, make
from pipelines.sae.base import Objective, dead_loss
from pipelines.stores.made.recovery import cosine_matrix, recall
from pipelines.stores.made.synthetic import Superposition
from pipelines.train import saved_state
from pipelines.train.trainee import AUXK, Counts, Recipe, Trainee

D, F, K, LR = 16, 48, 6, 1e-3
FAST: dict[str, tuple[str, ...]] = dict.fromkeys(("topk", "batchtopk", "matryoshka", "relu"), ("b_enc",)) | {
    "gated": ("b_enc", "b_gate"),
    "jumprelu": (),
}


def rows(n: int) -> torch.Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("architecture", sorted(architectures()))
@pytest.mark.parametrize("fast", [True, False])
def test_a_step_takes_the_biases_of_features_root_d_times_as_far_as_weights(architecture: str, fast: bool) -> None:
    """Adam's first step is one learning rate for every element that has a gradient."""
    sae = make(architecture, D, F, K, seed=0)
    recipe = replace(Recipe.standard(LR, 10, 64, K / F, Objective(l1=1.0)), warm_up=1, fast_biases=fast)
    before = {name: parameter.detach().clone() for name, parameter in sae.named_parameters()}
    Trainee(sae, recipe, 1.0).step(rows(64))
    moved = {name: float((parameter.detach() - before[name]).abs().max()) for name, parameter in sae.named_parameters()}
    far = [name for name, distance in moved.items() if distance == pytest.approx(LR * math.sqrt(D), rel=1e-3)]
    near = [name for name, distance in moved.items() if distance == pytest.approx(LR, rel=1e-3)]
    assert sorted(far) == sorted(FAST[architecture] if fast else ())
    assert set(moved) - set(far) - set(near) <= {"W_dec"}, "its rows are made unit vectors after the step"


def test_revival_begins_after_a_hundredth_of_the_run_and_death_is_told_after_a_tenth() -> None:
    recipe = Recipe.standard(LR, 1000, 1000, 0.5, Objective())
    assert (recipe.revive_after_rows, recipe.dead_after_rows) == (10_000, 100_000)
    rare = Recipe.standard(LR, 1000, 1000, 1e-3, Objective())
    assert (rare.revive_after_rows, rare.dead_after_rows) == (50_000, 100_000), "fifty firings of an average feature"
    endless = Recipe.standard(LR, 10**9, 1000, 0.5, Objective())
    assert (endless.revive_after_rows, endless.dead_after_rows) == (10_000_000, 10_000_000)


@pytest.mark.parametrize("architecture", ["topk", "gated"])
def test_the_loss_of_dead_features_is_what_they_leave_of_the_residual(architecture: str) -> None:
    sae = make(architecture, D, F, K, seed=1)
    generator = torch.Generator().manual_seed(4)
    bias = sae.b_gate if architecture == "gated" else sae.b_enc
    bias.data = torch.randn(F, generator=generator)
    sae.requires_grad_(False)
    x, residual, dead = rows(32), torch.randn(32, D, generator=generator), torch.arange(F) % 2 == 0
    found = dead_loss(sae, x, residual, dead)
    left = 0.0
    for row, missing in zip(x, residual, strict=True):
        pre = {f: float(sae.W_enc[f] @ row + bias[f]) for f in range(0, F, 2)}
        best = sorted(pre, key=lambda f: pre[f], reverse=True)[: D // 2]
        explained = sum((max(0.0, pre[f]) * sae.W_dec[f] for f in best), torch.zeros(D))
        left += float((missing - explained).square().sum())
    assert float(found) == pytest.approx(left / float((residual - residual.mean(dim=0)).square().sum()), rel=1e-4)


def test_features_that_died_are_led_to_true_features_that_were_missing() -> None:
    truth = Superposition(d_model=32, n_features=64, k=3, zipf=0.5)
    x = torch.from_numpy(truth.rows(0, 200_000))
    scale = 1 / float(x.var(dim=0).mean().sqrt())
    found = {}
    for auxk in (0.0, AUXK):
        sae = make("topk", 32, 64, 3, seed=0)
        sae.b_enc.data[:16] = -2.0
        trainee = Trainee(sae, Recipe.standard(3e-3, 1500, 128, 3 / 64, Objective(auxk=auxk)), scale)
        for step in range(1500):
            trainee.step(x[step * 128 : (step + 1) * 128])
        found[auxk] = recall(cosine_matrix(sae.W_dec.detach().numpy(), np.asarray(truth.directions)))
    assert found[AUXK] > found[0.0] + 0.1


FACTS = saved_state.Facts("0" * 16, 0, {}, [{}], [saved_state.Counts(0, 0)], [{}], [0], [[0, 1]])


def test_a_training_saved_by_another_recipe_is_not_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [{"sae/b_dec": torch.zeros(D)}]
    facts = saved_state.Facts("0" * 16, 0, {}, [{}], [Counts(0, 0)], [{}], [0], [[0, 1]])
    with monkeypatch.context() as earlier:
        earlier.setattr(saved_state, "STATE_VERSION", 2)
        saved_state.save_state(tmp_path, tensors, facts)
    with pytest.raises(DamagedStore, match=r"version 2, this actstore trains by version 4\); move it away"):
        saved_state.load_state(tmp_path)
    saved_state.save_state(tmp_path, tensors, facts)
    assert saved_state.load_state(tmp_path) is not None
