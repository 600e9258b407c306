"""What every sparse autoencoder is: two weight matrices, two biases, and rows decoded from the few codes that are active.

An architecture is one file with a subclass that says which codes are active, in training and afterwards, and what is
minimised. Everything else (initialisation, unit decoder rows, decoding, scaling) is here.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from actstore.errors import InputError
from pipelines.sae import active_features
from pipelines.sae.sparse_operators import Active, Decode, Preactivation

EPSILON = 1e-12
LEVEL_ROWS = 8192
"""Rows that starting levels are taken from."""
CACHED_ROWS = 1024
"""Of a matrix gone through twice: the second time they are still in the cache (24,576 x 768: 9 ms in place of 12)."""


@dataclass(frozen=True)
class Objective:
    """What is minimised beside the error, and how it is computed.

    `l1`: coefficient of the mean absolute code, over all rows and features. `auxk`: weight of what dead features could
    explain of the error. `kernel`: one of `pipelines.sae.kernels.KERNELS`.
    """

    l1: float = 0.0
    auxk: float = 0.0
    kernel: str = "sparse"


class Codes(NamedTuple):
    """What is active in n rows: values (nnz,) >= 0 of the features in `active`."""

    values: Tensor
    active: Active

    @property
    def longest(self) -> int:
        """How many codes the row with the most has."""
        return int(self.active.counts.max()) if self.active.n_rows else 0

    def padded(self, width: int) -> tuple[Tensor, Tensor]:
        """(n, width) values and features, by rising feature.

        Rows with fewer end in zeros of feature 0; rows with more keep their largest.
        """
        active, counts, longest = self.active, self.active.counts, self.longest
        if len(active.features) == width * active.n_rows and longest == width:
            return self.values.view(-1, width), active.features.view(-1, width)
        column = torch.arange(len(active.features), device=counts.device) - active.starts[active.rows]
        shape = (active.n_rows, max(longest, width))
        values = self.values.new_zeros(shape).index_put((active.rows, column), self.values)
        features = torch.zeros(shape, dtype=torch.int64, device=counts.device)
        features[active.rows, column] = active.features
        if longest > width:
            kept = torch.topk(values, width, dim=1, sorted=False).indices.sort(dim=1).values
            values, features = values.gather(1, kept), features.gather(1, kept)
        return values, features


class Losses(NamedTuple):
    """Of one batch: the loss to differentiate, its terms for the log, and what came out."""

    total: Tensor
    terms: dict[str, Tensor]
    reconstruction: Tensor
    codes: Codes


class Sae(nn.Module, ABC):
    """x ≈ b_dec + Σ value · W_dec[feature] over the active features of x (n, d_model).

    Both weights are kept feature-major, (n_features, d_model). Decoder rows are unit vectors; the encoder starts as their
    copy (tied init). `k` is how many features are active in a row, exactly or on average, as the architecture says.
    Raises InputError when k is not in 1..n_features.
    """

    architecture: ClassVar[str]
    in_units_of_x: ClassVar[tuple[str, ...]] = ("b_enc", "b_dec")
    """Parameters and buffers that scale with x: all but weights."""
    feature_biases: ClassVar[tuple[str, ...]] = ("b_enc",)
    """Parameters (F,) that are added to a feature's product with a row: one number each, where weights have d_model."""
    needs_scaled_rows: ClassVar[bool] = False
    """Whether training needs rows whose variance is 1 on average, and `start`; the textbook recipe has neither."""

    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor

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

    @abstractmethod
    def codes(self, x: Tensor, kernel: str = "sparse-fp32") -> Codes:
        """The codes of rows (n, d_model), as they are used once the SAE is trained.

        Exact, unless another of `KERNELS` is asked for: `sparse` may choose otherwise where two features are as strong.
        """

    @abstractmethod
    def training_codes(self, x: Tensor, kernel: str) -> Codes:
        """The codes of a training batch, with gradients, in one of `KERNELS`."""

    def losses(self, x: Tensor, objective: Objective, dead: Tensor | None = None) -> Losses:
        """What training minimises for rows (n, d_model); `dead` (F,) marks features that have not fired for long.

        The mean squared error over all elements, which is 1 − FVE for rows whose variance is 1 on average, and the
        objective's terms.
        """
        codes = self.training_codes(x, objective.kernel)
        reconstruction = self.reconstruct(codes, objective.kernel)
        return self.completed({"mse": (reconstruction - x).square().mean()}, x, reconstruction, codes, objective, dead)

    def completed(
        self,
        terms: dict[str, Tensor],
        x: Tensor,
        reconstruction: Tensor,
        codes: Codes,
        objective: Objective,
        dead: Tensor | None,
    ) -> Losses:
        """The losses of a batch: an architecture's own terms and those of the objective."""
        if objective.l1 and "l1" not in terms:
            terms["l1"] = objective.l1 * codes.values.sum() / (len(x) * self.n_features)
        if objective.auxk and dead is not None and bool(dead.any()):
            residual = (x - reconstruction).detach()
            terms["auxk"] = objective.auxk * dead_loss(self, x - self.b_dec, residual, dead)
        return Losses(torch.stack(list(terms.values())).sum(), terms, reconstruction.detach(), codes)

    @property
    def default_l1(self) -> float:
        """The objective's `l1` that brings about k codes a row, where the architecture has no other means to."""
        return 0.0

    @torch.no_grad()
    def start(self, sample: Tensor) -> None:
        """What an architecture sets from rows (n, d_model), scaled as in training, once `b_dec` is set."""

    @property
    def gate_bias(self) -> Tensor:
        """(F,) what is added to a feature's product with a row before it is decided whether the feature is active."""
        return self.b_enc

    @property
    def code_width(self) -> int | None:
        """How many codes any row has at most, where the architecture fixes that."""
        return None

    def preactivations_above(self, x: Tensor, bias: Tensor, floor: Tensor, kernel: str) -> tuple[Tensor, Active]:
        """Which of (x − b_dec) · W_enc + bias exceed `floor`, (F,) or one for all, with gradients, and where."""
        if kernel == "dense":
            dense = torch.addmm(bias, x - self.b_dec, self.W_enc.T)
            active = Active.of_mask(dense.detach() > floor)
            return dense[active.rows, active.features], active
        with torch.no_grad():
            centred = x - self.b_dec
            active, pre = active_features.above(centred, self.W_enc, bias, floor, fast=kernel == "sparse")
        return Preactivation.apply(pre, centred, self.W_enc, bias, self.b_dec, active), active

    def encode(self, x: Tensor, width: int | None = None) -> tuple[Tensor, Tensor]:
        """(n, d_model) rows -> values (n, width) >= 0 and feature indices (n, width), by rising index.

        Without `width`, as wide as the row with the most codes. With it, rows with more keep their largest.
        """
        codes = self.codes(x)
        if width is None:
            width = self.code_width or max(1, codes.longest)
        return codes.padded(width)

    def decode(self, values: Tensor, indices: Tensor) -> Tensor:
        """Codes (n, width) -> reconstruction (n, d_model)."""
        return self.reconstruct(Codes(values.flatten(), Active.of_k(indices, self.n_features)))

    def reconstruct(self, codes: Codes, kernel: str = "sparse") -> Tensor:
        """(n, d_model) from codes, with gradients, in one of `KERNELS`."""
        return decoded(codes, self.W_dec, kernel) + self.b_dec

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(reconstruction, values, indices) of rows (n, d_model); no code is left out."""
        values, indices = self.encode(x)
        return self.decode(values, indices), values, indices

    @torch.no_grad()
    def project_decoder_gradient(self) -> None:
        """Take out of each decoder row's gradient what points along the row: the renormalisation would undo it."""
        if self.W_dec.grad is not None:
            for gradient, row in zip(self.W_dec.grad.split(CACHED_ROWS), self.W_dec.split(CACHED_ROWS), strict=True):
                along = torch.einsum("fd,fd->f", gradient, row)[:, None]
                gradient.addcmul_(along, row, value=-1)

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Make every decoder row a unit vector again."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min(EPSILON))

    @torch.no_grad()
    def after_step(self, codes: Codes) -> None:
        """What an architecture keeps track of beside its gradients. Called with the codes of each training batch."""

    @torch.no_grad()
    def fold_input_scale(self, scale: float) -> None:
        """Turn an SAE of `scale` times x into the same SAE of x: encoder and decoder stay, what is in units of x shrinks."""
        for name in self.in_units_of_x:
            getattr(self, name).div_(scale)

    @torch.no_grad()
    def initialise_as_linear(self, seed: int) -> None:
        """Weights and encoder bias as torch's Linear layers start, the decoder's directions then made unit vectors."""
        generator = torch.Generator().manual_seed(seed)
        bounds = {"W_enc": self.d_model, "b_enc": self.d_model, "W_dec": self.n_features}
        for name, fan_in in bounds.items():
            getattr(self, name).uniform_(-1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in), generator=generator)
        self.b_dec.zero_()
        self.normalise_decoder()


def decoded(codes: Codes, w_dec: Tensor, kernel: str) -> Tensor:
    """(n, d) the sums of value · w_dec_f (F, d), with gradients, in one of `KERNELS`."""
    if kernel != "dense":
        rows: Tensor = Decode.apply(codes.values, w_dec, codes.active)
        return rows
    dense = codes.values.new_zeros(codes.active.n_rows, len(w_dec))
    return dense.index_put((codes.active.rows, codes.active.features), codes.values) @ w_dec


@torch.no_grad()
def levels(sae: Sae, sample: Tensor, k: float) -> Tensor:
    """(F,) what each feature's product with rows exceeds in a share k / F of a sample of them (n, d)."""
    centred = sample[:LEVEL_ROWS] - sae.b_dec
    rank = min(len(centred), max(1, round(len(centred) * k / sae.n_features)))
    products = (torch.mm(block, centred.T) for block in sae.W_enc.split(LEVEL_ROWS // 8))
    return torch.cat([torch.topk(product, rank, dim=1, sorted=False).values.amin(dim=1) for product in products])


def dead_loss(sae: Sae, centred: Tensor, residual: Tensor, dead: Tensor) -> Tensor:
    """‖e − ê‖² / ‖e − mean e‖²: what the d/2 strongest dead features leave of the residual e (n, d) of each row.

    Gao et al. 2024, appendix A.2: without decoder bias; e and the encoder's input are held fixed.
    """
    which = dead.nonzero()[:, 0]
    pre = torch.addmm(sae.gate_bias[which], centred.detach(), sae.W_enc[which].T).relu()
    k = max(1, sae.d_model // 2)
    if k < len(which):
        top = torch.topk(pre, k, dim=1, sorted=False)
        pre = torch.zeros_like(pre).scatter(1, top.indices, top.values)
    unexplained = (residual - pre @ sae.W_dec[which]).square().sum()
    return unexplained / (residual - residual.mean(dim=0)).square().sum().clamp_min(EPSILON)
