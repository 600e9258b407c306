"""TopK: exactly k features are active in a row (Gao et al. 2024, "Scaling and evaluating sparse autoencoders")."""

from __future__ import annotations

import torch
from torch import Tensor

from pipelines.sae import active_features
from pipelines.sae.base import Codes, Sae
from pipelines.sae.sparse_operators import Active, Preactivation


class TopKSae(Sae):
    """A row's codes are its k largest pre-activations (x − b_dec) · W_enc + b_enc; those below zero are set to zero."""

    architecture = "topk"

    @property
    def code_width(self) -> int | None:
        return self.k

    def codes(self, x: Tensor, kernel: str = "sparse-fp32") -> Codes:
        return self.training_codes(x, kernel)

    def search(self, centred: Tensor, *, fast: bool) -> tuple[Active, Tensor]:
        """The active features of rows x − b_dec (n, d), and their pre-activations (nnz,), without gradients."""
        return active_features.top_k(centred, self.W_enc, self.b_enc, self.k, fast=fast)

    def largest(self, pre: Tensor) -> Active:
        """The active features, given all pre-activations (n, F)."""
        return Active.of_k(torch.topk(pre, self.k, dim=1, sorted=False).indices.sort(dim=1).values, self.n_features)

    def training_codes(self, x: Tensor, kernel: str) -> Codes:
        if kernel == "dense":
            pre = torch.addmm(self.b_enc, x - self.b_dec, self.W_enc.T)
            active = self.largest(pre.detach())
            return Codes(pre[active.rows, active.features].relu(), active)
        with torch.no_grad():
            centred = x - self.b_dec
            active, pre = self.search(centred, fast=kernel == "sparse")
        return Codes(Preactivation.apply(pre, centred, self.W_enc, self.b_enc, self.b_dec, active).relu(), active)
