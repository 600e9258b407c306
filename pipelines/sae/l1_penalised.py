"""The base of architectures that limit the active features by an L1 term alone."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from pipelines.sae.base import Codes, Sae, levels

START = 4.0
"""Training begins with START · k active features in a row."""


class PenalisedSae(Sae):
    """An SAE with an L1 term. `k` sets only the default coefficient, which aims at about k codes a row."""

    l1_share: ClassVar[float]
    """The default coefficient, as a share of F / √(d · k)."""

    @property
    def default_l1(self) -> float:
        return self.l1_share * self.n_features / math.sqrt(self.d_model * self.k)

    @torch.no_grad()
    def starting_bias(self, sample: Tensor) -> Tensor:
        """(F,) the biases with which every feature is active in the same share of the sample, START · k in a row."""
        return -levels(self, sample, START * self.k)

    def codes(self, x: Tensor, kernel: str = "sparse-fp32") -> Codes:
        return self.training_codes(x, kernel)
