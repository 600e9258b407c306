"""Dense float32 products on a CPU, by oneDNN.

PyTorch gives them to MKL, which on AMD's processors reaches half of what they can do: in one run on an EPYC with AVX-512,
GPT-2 small's layers took 1.9 to 2.8 times as long as by oneDNN, which PyTorch has too, and uses for bfloat16. Both round
alike (relative difference 4e-7), and oneDNN's bits do not depend on the number of threads either.
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
    """Whether PyTorch's own float32 products are another library's: on ARM they are oneDNN's already."""
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return is_x86 and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., out) x · weightᵀ + bias, of x (..., in) and weight (out, in).

    What is differentiated, is not float32 or does not lie in a CPU's memory is left to PyTorch.
    """
    is_plain = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu" and x.numel() > 0
    if not is_plain or torch.is_grad_enabled() or not has_onednn():
        return linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def speed_up(model: nn.Module) -> None:
    """Let the dense layers of a transformers model use `product`. Their names, weights and hooks stay as they are."""
    from transformers.pytorch_utils import Conv1D

    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = partial(_linear, module)  # type: ignore[method-assign]
        elif type(module) is Conv1D:
            module.forward = partial(_conv1d, module)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return product(x, layer.weight, layer.bias)


def _conv1d(layer: Any, x: Tensor) -> Tensor:
    """GPT-2's layers keep their weights as (in, out)."""
    return product(x, layer.weight.T, layer.bias)
