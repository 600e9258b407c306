"""ReLU: every positive pre-activation is a code, an L1 term keeps them few (Bricken et al. 2023; Cunningham et al. 2023)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pipelines.sae.base import Codes, Sae, levels

L1 = 0.6
"""Of the default coefficient. Measured (d = 192, F = 1024, 400 steps): L0 12 for k = 8, 23 to 37 for 32, 65 for 64."""
START = 4.0
"""How many times k features are active in a row when training begins."""


class ReluSae(Sae):
    """The codes are relu((x − b_dec) · W_enc + b_enc). The loss is the mean squared error over all elements plus
    `Objective.l1` times the mean code over all elements; decoder rows are unit vectors, or the codes could shrink for
    nothing. `k` is what the default of that coefficient aims at, no more.
    """

    architecture = "relu"

    @property
    def default_l1(self) -> float:
        return L1 * self.n_features / math.sqrt(self.d_model * self.k)

    @torch.no_grad()
    def start(self, sample: Tensor) -> None:
        """Biases with which every feature is active in the same share of rows."""
        self.b_enc.copy_(-levels(self, sample, START * self.k))

    def codes(self, x: Tensor) -> Codes:
        return self.training_codes(x, "sparse-fp32")

    def training_codes(self, x: Tensor, kernel: str) -> Codes:
        pre, active = self.preactivations_above(x, self.b_enc, torch.zeros_like(self.b_enc), kernel)
        return Codes(pre.relu(), active)
