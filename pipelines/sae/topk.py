"""The TopK sparse autoencoder (Gao et al. 2024, "Scaling and evaluating sparse autoencoders")."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from actstore.errors import InputError
from pipelines.sae.kernels import SparseDecode, SparseEncode

EPSILON = 1e-12


class TopKSae(nn.Module):
    """x ≈ b_dec + Σ_j value_j · W_dec[index_j] over the k largest codes of (x − b_dec) W_encᵀ + b_enc.

    Both weights are kept feature-major, (n_features, d_model). Decoder rows are unit vectors; the encoder starts
    as their copy (tied init). Raises InputError when k is not in 1..n_features.
    """

    def __init__(self, d_model: int, n_features: int, k: int, *, seed: int = 0):
        super().__init__()
        if not 1 <= k <= n_features:
            raise InputError(f"k {k}: the SAE has {n_features} features; choose --k between 1 and {n_features}.")
        self.d_model, self.n_features, self.k = d_model, n_features, k
        directions = torch.randn(n_features, d_model, generator=torch.Generator().manual_seed(seed))
        directions /= directions.norm(dim=1, keepdim=True)
        self.W_dec = nn.Parameter(directions)
        self.W_enc = nn.Parameter(directions.clone())
        self.b_enc = nn.Parameter(torch.zeros(n_features))
        self.b_dec = nn.Parameter(torch.zeros(d_model))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(n, d_model) rows -> codes: values (n, k) >= 0 and feature indices (n, k), by rising index."""
        values, indices = SparseEncode.apply(x, self.W_enc, self.b_enc, self.b_dec, self.k)
        return values, indices

    def decode(self, values: Tensor, indices: Tensor) -> Tensor:
        """Codes (n, k) -> reconstruction (n, d_model)."""
        reconstruction: Tensor = SparseDecode.apply(values, indices, self.W_dec) + self.b_dec
        return reconstruction

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(reconstruction, values, indices) of rows (n, d_model)."""
        values, indices = self.encode(x)
        return self.decode(values, indices), values, indices

    @torch.no_grad()
    def project_decoder_gradient(self) -> None:
        """Take out of each decoder row's gradient what points along the row: the renormalisation would undo it."""
        if self.W_dec.grad is not None:
            along = (self.W_dec.grad * self.W_dec).sum(dim=1, keepdim=True)
            self.W_dec.grad.addcmul_(along, self.W_dec, value=-1)

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Make every decoder row a unit vector again."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min(EPSILON))

    @torch.no_grad()
    def fold_input_scale(self, scale: float) -> None:
        """Turn an SAE of `scale` times x into the same SAE of x: TopK commutes with scaling, so only biases change."""
        self.b_enc.div_(scale)
        self.b_dec.div_(scale)


def geometric_median(rows: Tensor, *, iterations: int = 100, tolerance: float = 1e-7) -> Tensor:
    """The point with the least sum of distances to (n, d) rows, by Weiszfeld's algorithm in float64.

    Unlike the mean it is hardly moved by the few rows with huge norms that residual streams have.
    """
    points = rows.double()
    median = points.mean(dim=0)
    for _ in range(iterations):
        distance = (points - median).norm(dim=1)
        weights = torch.where(distance > 0, 1.0 / distance, 0.0)
        step = weights @ points / weights.sum().clamp_min(EPSILON) - median
        # A point that the estimate lies on would hold it there: it only pulls with its own count (Vardi, Zhang 2000).
        pull = weights.sum() * step.norm()
        step *= (1.0 - (distance == 0).sum() / pull.clamp_min(EPSILON)).clamp_min(0.0)
        median = median + step
        if step.norm() <= tolerance * distance.mean():
            break
    return median.to(rows.dtype)
