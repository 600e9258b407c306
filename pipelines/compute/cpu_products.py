"""Dense float32 products on a CPU, by oneDNN.

PyTorch computes these products with MKL, which reaches half the speed of AMD's processors. In one run on an EPYC with
AVX-512, GPT-2 small's layers took 1.9 to 2.8 times as long with MKL as with oneDNN, which PyTorch includes and uses for
bfloat16. Both round alike (relative difference 4e-7), and oneDNN's bits, like MKL's, do not depend on the number of
threads.
"""

from __future__ import annotations

import platform
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


@cache
def has_onednn() -> bool:
    """Whether float32 products are given to oneDNN: on x86 only. On ARM, PyTorch's own products use oneDNN already."""
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return is_x86 and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., out) x · weightᵀ + bias, of x (..., in) and weight (out, in).

    PyTorch computes the product where a gradient is needed, a tensor is not float32, or a tensor is not on a CPU.
    """
    is_plain = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu" and x.numel() > 0
    if not is_plain or torch.is_grad_enabled() or not has_onednn():
        return linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def speed_up(model: nn.Module) -> None:
    """Make the dense layers of a transformers model use `product`. Their names, weights and hooks do not change."""
    from transformers.pytorch_utils import Conv1D

    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = partial(_linear, module)  # type: ignore[method-assign]
        elif type(module) is Conv1D:
            module.forward = partial(_conv1d, module)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return product(x, layer.weight, layer.bias)


def _conv1d(layer: Any, x: Tensor) -> Tensor:
    """Conv1D, the dense layer of GPT-2, keeps its weight as (in, out)."""
    return product(x, layer.weight.T, layer.bias)
