"""One SAE in training: its optimiser, schedule and counts, and its state as plain tensors and numbers.

A step depends only on this state and the batch, not on a global generator or on other SAEs in training.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from actstore.checked_json import Count
from pipelines.sae.base import EPSILON, Losses, Objective, Sae
from pipelines.sae.tensor_file import Form, forms_of

RECIPES = ("standard", "textbook")
AUXK = 1 / 32
DEAD_AFTER_ROWS = 10_000_000
REPORTED_SHARE, REVIVED_SHARE = 10, 100
"""A silent feature is reported dead after 1/10 of the run's rows; its revival starts after 1/100."""
FIRINGS_EXPECTED = 50


@dataclass(frozen=True)
class Recipe:
    """How an SAE is trained, apart from its shape and its data. `clip` 0 means no gradient clipping."""

    lr: float
    n_steps: int
    objective: Objective
    clip: float = 0.0
    warm_up: int = 1
    decay: int = 1
    dead_after_rows: int = DEAD_AFTER_ROWS
    revive_after_rows: int = DEAD_AFTER_ROWS
    fast_biases: bool = True
    project: bool = True
    pooled_fve: bool = False

    @classmethod
    def standard(cls, lr: float, n_steps: int, batch_rows: int, firing_rate: float, objective: Objective) -> Recipe:
        """The recipe of Gao et al. 2024, with shorter times in short runs.

        Warm-up takes 1,000 steps, at most 5 % of the run; the rate decays linearly to zero over the last fifth. A feature is
        dead after 10 million rows without firing, or a tenth of a shorter run's rows; its revival starts after 10 million
        rows, or a hundredth. Both times last at least as many rows as hold fifty firings of a feature that fires at
        `firing_rate`, the average rate.
        """
        least_rows = math.ceil(FIRINGS_EXPECTED / firing_rate)
        n_rows = n_steps * batch_rows
        return cls(
            lr,
            n_steps,
            objective,
            warm_up=min(1000, max(1, n_steps // 20)),
            decay=max(1, n_steps // 5),
            dead_after_rows=max(min(DEAD_AFTER_ROWS, n_rows // REPORTED_SHARE), least_rows),
            revive_after_rows=max(min(DEAD_AFTER_ROWS, n_rows // REVIVED_SHARE), least_rows),
        )

    @classmethod
    def textbook(cls, lr: float, n_steps: int, objective: Objective) -> Recipe:
        """Constant rate, gradient norm clipped at 1, no auxk, the same rate for biases, decoder gradient not projected."""
        objective = replace(objective, auxk=0.0)
        return cls(lr, n_steps, objective, clip=1.0, fast_biases=False, project=False, pooled_fve=True)

    def lr_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0.

        >>> recipe = Recipe(1.0, 100, Objective(), warm_up=4, decay=20)
        >>> [recipe.lr_at(step) for step in (0, 3, 50, 90, 99)]
        [0.25, 1.0, 1.0, 0.5, 0.05]
        """
        return self.lr * min(1.0, (step + 1) / self.warm_up, (self.n_steps - step) / self.decay)


def _paced(sae: Sae, fast_biases: bool) -> list[dict[str, Any]]:
    """Parameter groups by pace: the step of Adam, in learning rates.

    One step of Adam moves each of a feature's d_model weights by about one learning rate. A pre-activation then moves by
    about √d_model learning rates, for a row whose channels have variance 1. A fast bias moves as far.
    """
    fast = set(sae.feature_biases) if fast_biases else set()
    groups: list[dict[str, Any]] = [
        {"pace": 1.0, "params": [p for name, p in sae.named_parameters() if name not in fast]},
        {"pace": math.sqrt(sae.d_model), "params": [p for name, p in sae.named_parameters() if name in fast]},
    ]
    return [group for group in groups if group["params"]]


@dataclass(frozen=True)
class Counts:
    """How far a training is."""

    n_steps: Count
    rows_seen: Count


class Trainee:
    """An SAE that is trained on `scale` times the given rows, and its Adam.

    Where several processes train one SAE, `average` replaces the gradients after each backward pass by their mean over all
    ranks, and `any_of` combines the ranks' (F,) masks of features that fired.
    """

    def __init__(
        self,
        sae: Sae,
        recipe: Recipe,
        scale: float,
        *,
        average: Callable[[list[Tensor]], None] | None = None,
        any_of: Callable[[Tensor], None] | None = None,
    ):
        self.sae, self.recipe, self.scale = sae, recipe, scale
        self.average, self.any_of = average, any_of
        self.optimiser = torch.optim.Adam(_paced(sae, recipe.fast_biases), lr=recipe.lr, fused=True)
        self.n_steps = 0
        self.rows_seen = 0
        self.last_fired = torch.zeros(sae.n_features, dtype=torch.int64, device=sae.W_dec.device)

    def step(self, rows: Tensor, global_rows: int | None = None) -> tuple[Tensor, Losses]:
        """One step on raw rows (n, d_model). Returns the scaled rows and their losses.

        `global_rows` is the number of rows that the step sees over all ranks.
        """
        sae, recipe = self.sae, self.recipe
        self.optimiser.zero_grad(set_to_none=True)  # first, so that the step reuses the memory of the gradients
        x = rows * self.scale if self.scale != 1 else rows
        dead = self.silent(recipe.revive_after_rows) if recipe.objective.auxk else None
        losses = sae.losses(x, recipe.objective, dead)
        losses.total.backward()
        if self.average is not None:
            self.average([parameter.grad for parameter in sae.parameters() if parameter.grad is not None])
        if recipe.project:
            sae.project_decoder_gradient()
        if recipe.clip:
            torch.nn.utils.clip_grad_norm_(sae.parameters(), recipe.clip)
        for group in self.optimiser.param_groups:
            group["lr"] = group["pace"] * recipe.lr_at(self.n_steps)
        self.optimiser.step()
        sae.normalise_decoder()
        sae.after_step(losses.codes)
        self.n_steps += 1
        self.rows_seen += len(rows) if global_rows is None else global_rows
        self._count(losses)
        return x, losses

    def _count(self, losses: Losses) -> None:
        codes = losses.codes
        fired = codes.active.features[codes.values.detach() > 0]
        if self.any_of is None:
            self.last_fired[fired] = self.rows_seen
            return
        mask = torch.zeros_like(self.last_fired, dtype=torch.uint8)
        mask[fired] = 1
        self.any_of(mask)
        self.last_fired[mask.bool()] = self.rows_seen

    def silent(self, n_rows: int) -> Tensor:
        """(F,) mask of the features that have not fired in the last `n_rows` rows; none before `n_rows` rows were seen."""
        return self.last_fired <= self.rows_seen - n_rows

    @property
    def dead(self) -> Tensor:
        """(F,) mask of the features that have not fired in the last `dead_after_rows` rows, or in all rows if fewer."""
        return self.silent(min(self.rows_seen, self.recipe.dead_after_rows))

    @torch.no_grad()
    def metrics(self, x: Tensor, losses: Losses) -> dict[str, float]:
        """The log line of the last step. Its FVE is 1 − E‖x − x̂‖² / E‖x − mean x‖² over the step's batch."""
        error = losses.reconstruction - x
        figures = {
            "rows": self.rows_seen,
            "loss": float(losses.total.detach()),
            **{name: float(term.detach()) for name, term in losses.terms.items()},
            "fve": 1.0 - float(error.square().sum() / (x - x.mean(dim=0)).square().sum().clamp_min(EPSILON)),
            "l0": float((losses.codes.values > 0).sum()) / len(x),
            "dead": float(self.dead.float().mean()),
            "lr": self.recipe.lr_at(self.n_steps - 1),
        }
        if self.recipe.pooled_fve:
            figures["fve_pooled"] = 1.0 - float(error.var() / x.var().clamp_min(EPSILON))
        return figures

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that a resumed training needs, by name; `load` reads them."""
        tensors = {f"sae/{name}": tensor for name, tensor in self.sae.state_dict().items()}
        for name, parameter in self.sae.named_parameters():
            for key, value in self.optimiser.state[parameter].items():
                tensors[f"adam/{name}/{key}"] = value
        tensors["last_fired"] = self.last_fired
        return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def forms(self) -> dict[str, Form]:
        """The form of each tensor that `tensors` gives once a step was taken."""
        forms = {f"sae/{name}": form for name, form in forms_of(self.sae.state_dict()).items()}
        for name, form in forms_of(dict(self.sae.named_parameters())).items():
            of_adam = {"step": ("float32", ()), "exp_avg": form, "exp_avg_sq": form}
            forms |= {f"adam/{name}/{key}": of_key for key, of_key in of_adam.items()}
        return forms | {"last_fired": ("int64", (self.sae.n_features,))}

    def counts(self) -> Counts:
        return Counts(self.n_steps, self.rows_seen)

    def load(self, tensors: dict[str, Tensor], counts: Counts) -> None:
        """Restore the state that `tensors` and `counts` gave; training resumes exactly."""
        device = self.sae.W_dec.device
        self.sae.load_state_dict({name.removeprefix("sae/"): t for name, t in tensors.items() if name.startswith("sae/")})
        for name, parameter in self.sae.named_parameters():
            prefix = f"adam/{name}/"
            self.optimiser.state[parameter] = {
                key.removeprefix(prefix): tensor.to(device) for key, tensor in tensors.items() if key.startswith(prefix)
            }
        self.last_fired = tensors["last_fired"].to(device)
        self.n_steps, self.rows_seen = counts.n_steps, counts.rows_seen
