"""The sparse autoencoder as textbooks write it: two Linear layers and dense codes. The same function as `TopKSae`.

This form is for reading, and for training loops of one's own. The project trains, stores and analyses the form that `to_sae`
gives: the same weights, feature-major, and sparse codes.
"""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from actstore.errors import InputError
from pipelines.sae.architectures.topk import TopKSae
from pipelines.sae.base import Sae


class SparseAutoencoder(nn.Module):
    """x ≈ b_pre + decoder(features), where features are the k largest of encoder(x − b_pre), those below zero set to zero.

    `encoder` is a Linear layer of d_model to n_features with bias, `decoder` one of n_features to d_model without bias. Both
    start as Linear layers do, from `seed`; the decoder's columns are then made unit vectors (`normalize_decoder`). `b_pre`
    (d_model,) starts at zero. Raises InputError when k is not in 1..n_features.

    >>> sae = SparseAutoencoder(8, 32, k=4)
    >>> reconstruction, features, indices = sae(torch.ones(2, 5, 8))
    >>> tuple(reconstruction.shape), tuple(features.shape), tuple(indices.shape)
    ((2, 5, 8), (2, 5, 32), (2, 5, 4))
    """

    def __init__(self, d_model: int, n_features: int, k: int = 32, *, seed: int = 0):
        super().__init__()
        if d_model < 1 or not 1 <= k <= n_features:
            raise InputError(
                f"d_model {d_model}, n_features {n_features}, k {k}: need d_model >= 1 and 1 <= k <= n_features."
            )
        self.d_model, self.n_features, self.k = d_model, n_features, k
        self.encoder: nn.Linear = skip_init(nn.Linear, d_model, n_features)
        self.decoder: nn.Linear = skip_init(nn.Linear, n_features, d_model, bias=False)
        self.b_pre = nn.Parameter(torch.zeros(d_model))
        self.trained: dict[str, float] = {}
        """The options with which `train_sae` trained this SAE, by their names in `TrainConfig`; empty before."""
        start = TopKSae(d_model, n_features, k)
        start.initialise_as_linear(seed)
        self._take(start)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(…, d_model) rows -> features (…, n_features), at most k of a row above zero, and indices (…, k), largest first.

        The k indices may include some whose pre-activation is below zero; the features there are 0.
        """
        pre = self.encoder(x - self.b_pre)
        top = torch.topk(pre, self.k, dim=-1)
        return torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu()), top.indices

    def decode(self, features: Tensor) -> Tensor:
        """(…, n_features) -> (…, d_model)."""
        rows: Tensor = self.decoder(features) + self.b_pre
        return rows

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(…, d_model) rows -> reconstruction (…, d_model), features (…, n_features), indices (…, k)."""
        features, indices = self.encode(x)
        return self.decode(features), features, indices

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Make every decoder column a unit vector again; call this after each step of an optimiser."""
        self.decoder.weight.div_(self.decoder.weight.norm(dim=0, keepdim=True).clamp_min(1e-12))

    def to_sae(self) -> TopKSae:
        """A `TopKSae` with a copy of these weights: the same codes and reconstructions."""
        sae = TopKSae(self.d_model, self.n_features, self.k).to(self.b_pre)
        with torch.no_grad():
            for here, there in self._pairs(sae):
                there.copy_(here)
        return sae

    @classmethod
    def from_sae(cls, sae: Sae) -> Self:
        """The textbook form with a copy of a `TopKSae`'s weights. Raises InputError for another architecture."""
        if not isinstance(sae, TopKSae):
            raise InputError(f"architecture {sae.architecture}: the textbook's is topk; use the SAE as it is.")
        textbook = cls(sae.d_model, sae.n_features, sae.k).to(sae.b_dec)
        textbook._take(sae)
        return textbook

    @torch.no_grad()
    def _take(self, sae: TopKSae) -> None:
        for here, there in self._pairs(sae):
            here.copy_(there)

    def _pairs(self, sae: TopKSae) -> list[tuple[Tensor, Tensor]]:
        """Every parameter here, paired with the tensor of a `TopKSae` that holds the same numbers."""
        return [
            (self.encoder.weight, sae.W_enc),
            (self.encoder.bias, sae.b_enc),
            (self.decoder.weight, sae.W_dec.T),
            (self.b_pre, sae.b_dec),
        ]


class SaeLoss(NamedTuple):
    """`total`, to differentiate, and its two parts; `sparsity` is the mean absolute code without its coefficient."""

    total: Tensor
    reconstruction: Tensor
    sparsity: Tensor


def sae_loss(x: Tensor, x_reconstructed: Tensor, features: Tensor, sparsity_coeff: float = 1e-3) -> SaeLoss:
    """Mean squared error over all elements + `sparsity_coeff` · mean absolute code, over all rows and features.

    x and x_reconstructed (…, d_model), features (…, n_features). This is the textbook's loss. The first part scales with the
    square of the rows; the second is small because most features are zero in most rows.

    >>> loss = sae_loss(torch.tensor([1.0, 3.0]), torch.zeros(2), torch.tensor([2.0, 0.0]), sparsity_coeff=0.5)
    >>> [part.item() for part in loss]
    [5.5, 5.0, 1.0]
    """
    reconstruction = (x_reconstructed - x).square().mean()
    sparsity = features.abs().mean()
    return SaeLoss(reconstruction + sparsity_coeff * sparsity, reconstruction, sparsity)
