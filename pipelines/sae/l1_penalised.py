"""What architectures share whose features are kept few by an L1 term alone."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from pipelines.sae.base import Codes, Sae, levels

START = 4.0
"""How many times k features are active in a row when training begins."""


class PenalisedSae(Sae):
    """`k` is what the default of the coefficient aims at, no more."""

    l1_share: ClassVar[float]
    """The default coefficient, as a share of F / √(d · k)."""

    @property
    def default_l1(self) -> float:
        return self.l1_share * self.n_features / math.sqrt(self.d_model * self.k)

    @torch.no_grad()
    def starting_bias(self, sample: Tensor) -> Tensor:
        """(F,) with which every feature is active in the same share of rows."""
        return -levels(self, sample, START * self.k)

    def codes(self, x: Tensor, kernel: str = "sparse-fp32") -> Codes:
        return self.training_codes(x, kernel)
