"""BatchTopK: k features are active in a row on average (Bussmann, Leask and Nanda 2024, "BatchTopK Sparse Autoencoders")."""

from __future__ import annotations

import torch
from torch import Tensor

from pipelines.sae import active_features
from pipelines.sae.architectures.topk import TopKSae
from pipelines.sae.base import Codes
from pipelines.sae.sparse_operators import Active

MEMORY = 0.95
"""The share of the old threshold that each batch keeps: the threshold averages about the last twenty batches."""


class BatchTopKSae(TopKSae):
    """In training the n·k largest pre-activations of a batch of n rows are active; afterwards, all above a threshold.

    The threshold is a moving average of each batch's smallest active value. The average is exponential and corrected for its
    start: after t batches the newest has the weight (1 − m) / (1 − mᵗ), with m = MEMORY. After training, a row's codes
    depend on no other row.
    """

    architecture = "batchtopk"
    in_units_of_x = (*TopKSae.in_units_of_x, "threshold")

    threshold: Tensor
    n_batches: Tensor

    def __init__(self, d_model: int, n_features: int, k: int, *, seed: int = 0):
        super().__init__(d_model, n_features, k, seed=seed)
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("n_batches", torch.zeros((), dtype=torch.int64))

    @property
    def code_width(self) -> int | None:
        return None

    def codes(self, x: Tensor, kernel: str = "sparse-fp32") -> Codes:
        return Codes(*self.preactivations_above(x, self.b_enc, self.threshold, kernel))

    def search(self, centred: Tensor, *, fast: bool) -> tuple[Active, Tensor]:
        return active_features.batch_top_k(centred, self.W_enc, self.b_enc, self.k, fast=fast)

    def largest(self, pre: Tensor) -> Active:
        top = torch.topk(pre.flatten(), self.k * len(pre), sorted=False).indices
        return Active.of_places(top.sort().values, len(pre), self.n_features)

    @torch.no_grad()
    def after_step(self, codes: Codes) -> None:
        smallest = torch.where(codes.values > 0, codes.values, torch.inf).min().double()
        if bool(smallest.isfinite()):  # a batch without codes does not change the threshold
            self.n_batches += 1
            newest = (1 - MEMORY) / (1 - MEMORY ** self.n_batches.double())
            self.threshold.copy_(torch.lerp(self.threshold.double(), smallest, newest))
