"""The base of every sparse autoencoder: two weight matrices, two biases, and rows decoded from a few active features.

An architecture is one file with a subclass, which defines the codes in training and afterwards, and the loss. Everything
else (initialisation, unit decoder rows, decoding, scaling) is here.
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
"""`levels` uses at most this many rows of its sample."""
CACHED_ROWS = 1024
"""Matrix rows per block where a matrix is read twice: the second read hits the cache (24,576 x 768: 9 ms, not 12)."""


@dataclass(frozen=True)
class Objective:
    """The terms of the loss besides the reconstruction error, and the kernel that computes it.

    `l1`: coefficient of the mean absolute code over all rows and features. `auxk`: weight of `dead_loss`, in which dead
    features reconstruct the error. `kernel`: one of `pipelines.sae.kernels.KERNELS`.
    """

    l1: float = 0.0
    auxk: float = 0.0
    kernel: str = "sparse"


class Codes(NamedTuple):
    """The codes of n rows: values (nnz,) >= 0 of the features in `active`."""

    values: Tensor
    active: Active

    @property
    def longest(self) -> int:
        """The largest number of codes in a row."""
        return int(self.active.counts.max()) if self.active.n_rows else 0

    def padded(self, width: int) -> tuple[Tensor, Tensor]:
        """(n, width) values and features, by rising feature.

        Rows with fewer codes end in zeros of feature 0; rows with more keep their largest.
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
            largest = torch.topk(values, width, dim=1, sorted=False).indices.sort(dim=1).values
            values, features = values.gather(1, largest), features.gather(1, largest)
        return values, features


class Losses(NamedTuple):
    """One batch's loss to differentiate, its terms for the log, its reconstruction and its codes."""

    total: Tensor
    terms: dict[str, Tensor]
    reconstruction: Tensor
    codes: Codes


class Sae(nn.Module, ABC):
    """x ≈ b_dec + Σ value · W_dec[feature] over the active features of x (n, d_model).

    Both weights are kept feature-major, (n_features, d_model). Decoder rows are unit vectors; the encoder starts as their
    copy (tied init). `k` is the number of active features per row, exactly or on average, as the architecture defines.
    Raises InputError when k is not in 1..n_features.
    """

    architecture: ClassVar[str]
    in_units_of_x: ClassVar[tuple[str, ...]] = ("b_enc", "b_dec")
    """Parameters and buffers in units of x: all but the weights."""
    feature_biases: ClassVar[tuple[str, ...]] = ("b_enc",)
    """Parameters (F,) added to a feature's product with a row: one number per feature, where weights have d_model."""
    needs_scaled_rows: ClassVar[bool] = False
    """Whether training needs `start` and rows whose variance is 1 on average; the textbook recipe has neither."""

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

    def extra_repr(self) -> str:
        """What PyTorch shows of the SAE."""
        return f"{self.architecture}, {self.d_model:,} -> {self.n_features:,} features, k {self.k}"

    @abstractmethod
    def codes(self, x: Tensor, kernel: str = "sparse-fp32") -> Codes:
        """The codes of rows (n, d_model) by the trained SAE.

        The default kernel is exact. The kernel `sparse` may choose another feature where two are nearly equally strong.
        """

    @abstractmethod
    def training_codes(self, x: Tensor, kernel: str) -> Codes:
        """The codes of a training batch, with gradients; `kernel` is one of `KERNELS`."""

    def losses(self, x: Tensor, objective: Objective, dead: Tensor | None = None) -> Losses:
        """The training loss of rows (n, d_model); `dead` (F,) marks features that have not fired for long.

        The loss is the mean squared error over all elements plus the objective's terms. The mean squared error is 1 − FVE
        for rows whose variance is 1 on average.
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
        """The losses of a batch: the terms given, and those of the objective."""
        if objective.l1 and "l1" not in terms:
            terms["l1"] = objective.l1 * codes.values.sum() / (len(x) * self.n_features)
        if objective.auxk and dead is not None and bool(dead.any()):
            residual = (x - reconstruction).detach()
            terms["auxk"] = objective.auxk * dead_loss(self, x - self.b_dec, residual, dead)
        return Losses(torch.stack(list(terms.values())).sum(), terms, reconstruction.detach(), codes)

    @property
    def default_l1(self) -> float:
        """The `l1` that aims at about k codes a row, for architectures that limit the codes by L1 alone; else 0."""
        return 0.0

    @torch.no_grad()
    def start(self, sample: Tensor) -> None:
        """Set the architecture's own parameters from rows (n, d_model), scaled as in training; `b_dec` is set before."""

    @property
    def gate_bias(self) -> Tensor:
        """(F,) the bias that decides whether a feature is active: it is added to the feature's product with a row."""
        return self.b_enc

    @property
    def code_width(self) -> int | None:
        """The largest number of codes in any row; None where the architecture sets no limit."""
        return None

    def preactivations_above(self, x: Tensor, bias: Tensor, floor: Tensor, kernel: str) -> tuple[Tensor, Active]:
        """The values of (x − b_dec) · W_enc + bias above `floor`, (F,) or a scalar, with gradients, and their features."""
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

        The default `width` is `code_width`, or else the largest number of codes in a row. Rows with more codes than `width`
        keep their largest.
        """
        codes = self.codes(x)
        if width is None:
            width = self.code_width or max(1, codes.longest)
        return codes.padded(width)

    def decode(self, values: Tensor, indices: Tensor) -> Tensor:
        """Codes (n, width) -> reconstruction (n, d_model)."""
        return self.reconstruct(Codes(values.flatten(), Active.of_k(indices, self.n_features)))

    def reconstruct(self, codes: Codes, kernel: str = "sparse") -> Tensor:
        """(n, d_model) from codes, with gradients; `kernel` is one of `KERNELS`."""
        return decoded(codes, self.W_dec, kernel) + self.b_dec

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(reconstruction, values, indices) of rows (n, d_model); no code is left out."""
        values, indices = self.encode(x)
        return self.decode(values, indices), values, indices

    @torch.no_grad()
    def project_decoder_gradient(self) -> None:
        """Remove from each decoder row's gradient the component along the row, which renormalisation would undo."""
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
        """Update state that has no gradient, such as a running threshold, from the codes of a training batch."""

    @torch.no_grad()
    def fold_input_scale(self, scale: float) -> None:
        """Turn an SAE of `scale` · x into the same SAE of x: divide `in_units_of_x` by `scale`; weights stay."""
        for name in self.in_units_of_x:
            getattr(self, name).div_(scale)

    @torch.no_grad()
    def initialise_as_linear(self, seed: int) -> None:
        """Draw weights and encoder bias as torch's Linear layers do, then make the decoder's directions unit vectors."""
        generator = torch.Generator().manual_seed(seed)
        bounds = {"W_enc": self.d_model, "b_enc": self.d_model, "W_dec": self.n_features}
        for name, fan_in in bounds.items():
            getattr(self, name).uniform_(-1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in), generator=generator)
        self.b_dec.zero_()
        self.normalise_decoder()


def decoded(codes: Codes, w_dec: Tensor, kernel: str) -> Tensor:
    """(n, d) the sums of value · w_dec_f, with w_dec (F, d), with gradients; `kernel` is one of `KERNELS`."""
    if kernel != "dense":
        rows: Tensor = Decode.apply(codes.values, w_dec, codes.active)
        return rows
    dense = codes.values.new_zeros(codes.active.n_rows, len(w_dec))
    return dense.index_put((codes.active.rows, codes.active.features), codes.values) @ w_dec


@torch.no_grad()
def levels(sae: Sae, sample: Tensor, k: float) -> Tensor:
    """(F,) for each feature, the level that its product with a row exceeds in a share k / F of sample rows (n, d)."""
    centred = sample[:LEVEL_ROWS] - sae.b_dec
    rank = min(len(centred), max(1, round(len(centred) * k / sae.n_features)))
    products = (torch.mm(block, centred.T) for block in sae.W_enc.split(LEVEL_ROWS // 8))
    return torch.cat([torch.topk(product, rank, dim=1, sorted=False).values.amin(dim=1) for product in products])


def dead_loss(sae: Sae, centred: Tensor, residual: Tensor, dead: Tensor) -> Tensor:
    """‖e − ê‖² / ‖e − mean e‖²: the share of the residual e (n, d) that each row's d/2 strongest dead features leave.

    Gao et al. 2024, appendix A.2: ê has no decoder bias; e and the encoder's input get no gradient.
    """
    which = dead.nonzero()[:, 0]
    pre = torch.addmm(sae.gate_bias[which], centred.detach(), sae.W_enc[which].T).relu()
    k = max(1, sae.d_model // 2)
    if k < len(which):
        top = torch.topk(pre, k, dim=1, sorted=False)
        pre = torch.zeros_like(pre).scatter(1, top.indices, top.values)
    unexplained = (residual - pre @ sae.W_dec[which]).square().sum()
    return unexplained / (residual - residual.mean(dim=0)).square().sum().clamp_min(EPSILON)
