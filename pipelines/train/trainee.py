"""One SAE in training: its optimiser, its schedule, what it counts, and all of that as plain tensors and numbers.

A step depends on nothing but this state and the batch: no global generator, no other SAE trained beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pipelines.sae.base import Losses, Objective, Sae

RECIPES = ("standard", "textbook")
AUXK = 1 / 32
DEAD_AFTER_ROWS = 10_000_000
REPORTED_SHARE, REVIVED_SHARE = 10, 100
"""A silent feature is reported dead after 1/10 of the run's rows; its revival starts after 1/100."""
FIRINGS_EXPECTED = 50


@dataclass(frozen=True)
class Recipe:
    """How an SAE is trained, apart from its shape and its data. `clip` 0: gradients are not clipped."""

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
        """The recipe of Gao et al. 2024, its times cut for short runs.

        Warm-up over 1,000 steps, at most 5 % of the run; linear decay to zero over the last fifth. A feature that has
        not fired in 10 million rows is dead. In shorter runs that is a tenth of them, and the loss that revives
        features begins after a hundredth; but no less than hold fifty firings of a feature of average rate `firing_rate`.
        """
        turn = math.ceil(FIRINGS_EXPECTED / firing_rate)
        n_rows = n_steps * batch_rows
        return cls(
            lr,
            n_steps,
            objective,
            warm_up=min(1000, max(1, n_steps // 20)),
            decay=max(1, n_steps // 5),
            dead_after_rows=max(min(DEAD_AFTER_ROWS, n_rows // REPORTED_SHARE), turn),
            revive_after_rows=max(min(DEAD_AFTER_ROWS, n_rows // REVIVED_SHARE), turn),
        )

    @classmethod
    def textbook(cls, lr: float, n_steps: int, objective: Objective) -> Recipe:
        """Constant rate, gradient norm clipped at 1, no help for dead features, one pace, decoder gradient as it is."""
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
    """Parameters by how far a step of Adam takes them, in learning rates.

    A step of one learning rate in each of d_model weights moves a pre-activation by about √d_model of them for a row
    whose channels have variance 1; a bias that is to keep up is moved as far.
    """
    fast = set(sae.feature_biases) if fast_biases else set()
    groups: list[dict[str, Any]] = [
        {"pace": 1.0, "params": [p for name, p in sae.named_parameters() if name not in fast]},
        {"pace": math.sqrt(sae.d_model), "params": [p for name, p in sae.named_parameters() if name in fast]},
    ]
    return [group for group in groups if group["params"]]


class Trainee:
    """An SAE of `scale` times the rows it is given, and its Adam.

    `average` is given the gradients after each backward pass, and `any_of` the (F,) mask of features that fired: where
    several processes train one SAE, they make them those of all ranks.
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
        """One step on raw rows (n, d_model); gives the scaled rows and what came of them.

        `global_rows`: how many rows the step sees over all ranks.
        """
        sae, recipe = self.sae, self.recipe
        self.optimiser.zero_grad(set_to_none=True)  # first: what is computed lies where they were
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
        """(F,) features that have not fired in the last `n_rows` rows; none before there have been so many."""
        return self.last_fired <= self.rows_seen - n_rows

    @property
    def dead(self) -> Tensor:
        """(F,) features that have not fired in the last `dead_after_rows` rows, or in none where there were fewer."""
        return self.silent(min(self.rows_seen, self.recipe.dead_after_rows))

    @torch.no_grad()
    def metrics(self, x: Tensor, losses: Losses) -> dict[str, float]:
        """One line of the log, of the step just made; FVE is of its batch, 1 − E‖x−x̂‖² / E‖x−mean x‖²."""
        error = losses.reconstruction - x
        figures = {
            "rows": self.rows_seen,
            "loss": float(losses.total.detach()),
            **{name: float(term.detach()) for name, term in losses.terms.items()},
            "fve": 1.0 - float(error.square().sum() / (x - x.mean(dim=0)).square().sum()),
            "l0": float((losses.codes.values > 0).sum()) / len(x),
            "dead": float(self.dead.float().mean()),
            "lr": self.recipe.lr_at(self.n_steps - 1),
        }
        if self.recipe.pooled_fve:
            figures["fve_pooled"] = 1.0 - float(error.var() / x.var())
        return figures

    def tensors(self) -> dict[str, Tensor]:
        """All that a continued training needs, as named tensors; `load` takes them back."""
        tensors = {f"sae/{name}": tensor for name, tensor in self.sae.state_dict().items()}
        for name, parameter in self.sae.named_parameters():
            for key, value in self.optimiser.state[parameter].items():
                tensors[f"adam/{name}/{key}"] = value
        tensors["last_fired"] = self.last_fired
        return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def counts(self) -> dict[str, int]:
        return {"n_steps": self.n_steps, "rows_seen": self.rows_seen}

    def load(self, tensors: dict[str, Tensor], counts: dict[str, Any]) -> None:
        """Continue exactly where `tensors` and `counts` were taken."""
        device = self.sae.W_dec.device
        self.sae.load_state_dict({name.removeprefix("sae/"): t for name, t in tensors.items() if name.startswith("sae/")})
        for name, parameter in self.sae.named_parameters():
            prefix = f"adam/{name}/"
            self.optimiser.state[parameter] = {
                key.removeprefix(prefix): tensor.to(device) for key, tensor in tensors.items() if key.startswith(prefix)
            }
        self.last_fired = tensors["last_fired"].to(device)
        self.n_steps, self.rows_seen = counts["n_steps"], counts["rows_seen"]
