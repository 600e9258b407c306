"""The sparse half of a TopK step, exact, in PyTorch's own operators.

Only k of the F codes of a row are non-zero, so everything but the encoder's forward product can be sparse: decoding
is an `embedding_bag`, the gradient of the codes a sampled product, and both weight gradients are a feature-major CSR
matrix times a dense one. Gradients equal autograd's of the dense form to fp32 rounding.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def select_top_k(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row of (n, F), by rising index: (values (n, k), indices (n, k))."""
    indices = torch.topk(pre, k, dim=1, sorted=False).indices.sort(dim=1).values
    return pre.gather(1, indices), indices


class SparseEncode(Function):
    """relu of the k largest of (x - b_dec) W_encᵀ + b_enc, with a gradient that touches only those k.

    x (n, d), W_enc (F, d), b_enc (F,), b_dec (d,) -> values (n, k) >= 0, indices (n, k). x gets no gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w_enc: Tensor, b_enc: Tensor, b_dec: Tensor, k: int) -> tuple[Tensor, Tensor]:
        centred = x - b_dec
        values, indices = select_top_k(torch.addmm(b_enc, centred, w_enc.T), k)
        values = values.relu()
        ctx.save_for_backward(centred, w_enc, values, indices)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, Tensor, Tensor, None]:
        centred, w_enc, values, indices = ctx.saved_tensors
        active = gradients[0] * (values > 0)
        d_w_enc = feature_major(indices, active, len(w_enc)) @ centred
        d_b_enc = torch.bincount(indices.flatten(), active.flatten(), len(w_enc)).to(active.dtype)
        return None, d_w_enc, d_b_enc, -(d_b_enc @ w_enc), None


class SparseDecode(Function):
    """Sum of k decoder rows a row: values (n, k), indices (n, k), W_dec (F, d) -> (n, d)."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, w_dec: Tensor) -> Tensor:
        ctx.save_for_backward(values, indices, w_dec)
        return torch.nn.functional.embedding_bag(indices, w_dec, per_sample_weights=values, mode="sum")

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor]:
        values, indices, w_dec = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        n, k = indices.shape
        starts = torch.arange(0, n * k + 1, k, device=indices.device)
        pattern = _csr(
            starts, indices.flatten(), torch.zeros(n * k, dtype=gradient.dtype, device=gradient.device), (n, len(w_dec))
        )
        d_values = torch.sparse.sampled_addmm(pattern, gradient, w_dec.T).values().view(n, k)
        return d_values, None, feature_major(indices, values, len(w_dec)) @ gradient


def feature_major(indices: Tensor, values: Tensor, n_features: int) -> Tensor:
    """Codes (n, k) as a CSR matrix (F, n): row f holds feature f's value at each row it is active in."""
    n, k = indices.shape
    features, order = indices.flatten().sort(stable=True)
    starts = torch.zeros(n_features + 1, dtype=torch.int64, device=indices.device)
    torch.cumsum(torch.bincount(features, minlength=n_features), 0, out=starts[1:])
    return _csr(starts, order // k, values.flatten()[order], (n_features, n))


def _csr(starts: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False)
