"""TopK: exactly k features are active in a row (Gao et al. 2024, "Scaling and evaluating sparse autoencoders")."""

from __future__ import annotations

import torch
from torch import Tensor

from pipelines.sae import select
from pipelines.sae.base import Codes, Losses, Objective, Sae, dead_loss
from pipelines.sae.sparse import Active, EncodeActive


class TopKSae(Sae):
    """The codes of a row are its k largest pre-activations (x − b_dec) · W_enc + b_enc, those below zero set to zero.

    The loss is the mean squared error over all elements, which is 1 − FVE for rows whose variance is 1 on average, plus
    the L1 and dead-feature terms of the objective.
    """

    architecture = "topk"

    @property
    def code_width(self) -> int | None:
        return self.k

    def codes(self, x: Tensor) -> Codes:
        return self.training_codes(x, "sparse-fp32")

    def search(self, centred: Tensor, *, fast: bool) -> tuple[Active, Tensor]:
        """Which features are active in rows x − b_dec (n, d), and their pre-activations (nnz,), without gradients."""
        return select.top_k(centred, self.W_enc, self.b_enc, self.k, fast=fast)

    def largest(self, pre: Tensor) -> Active:
        """Which of all pre-activations (n, F) are active."""
        return Active.of_k(torch.topk(pre, self.k, dim=1, sorted=False).indices.sort(dim=1).values, self.n_features)

    def training_codes(self, x: Tensor, kernel: str) -> Codes:
        """The codes of a training batch, with gradients, in one of `KERNELS`."""
        if kernel == "dense":
            pre = torch.addmm(self.b_enc, x - self.b_dec, self.W_enc.T)
            active = self.largest(pre.detach())
            return Codes(pre[active.rows, active.features].relu(), active)
        with torch.no_grad():
            centred = x - self.b_dec
            active, pre = self.search(centred, fast=kernel == "sparse")
        return Codes(EncodeActive.apply(pre, centred, self.W_enc, self.b_enc, self.b_dec, active), active)

    def training_reconstruction(self, codes: Codes, kernel: str) -> Tensor:
        """(n, d_model) with gradients, in one of `KERNELS`."""
        if kernel != "dense":
            return self.reconstruct(codes)
        dense = codes.values.new_zeros(codes.active.n_rows, self.n_features)
        return dense.index_put((codes.active.rows, codes.active.features), codes.values) @ self.W_dec + self.b_dec

    def losses(self, x: Tensor, objective: Objective, dead: Tensor | None = None) -> Losses:
        codes = self.training_codes(x, objective.kernel)
        reconstruction = self.training_reconstruction(codes, objective.kernel)
        terms = {"mse": (reconstruction - x).square().mean()}
        if objective.l1:
            terms["l1"] = objective.l1 * codes.values.sum() / (len(x) * self.n_features)
        if objective.auxk and dead is not None and bool(dead.any()):
            residual = (x - reconstruction).detach()
            terms["auxk"] = objective.auxk * dead_loss(self, x - self.b_dec, residual, dead)
        return Losses(sum_of(terms), terms, reconstruction.detach(), codes)


def sum_of(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(terms.values())).sum()
