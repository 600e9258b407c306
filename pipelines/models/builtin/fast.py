"""Three training operations that are faster on a CPU than PyTorch's own, with the same results.

Measured on two Zen 5 cores for 16 windows of 256 tokens in bfloat16: causal attention forward and backward takes 11 ms in
place of 28 ms, dropout's random bits 0.5 ms in place of 4 ms. The loss never holds more than 512 rows of logits. Only
training uses these operations; the saved model is a plain GPT-2.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

ATTENTION_NAME = "actstore_causal_windows"
ATTENTION_WINDOWS = 4
LOSS_ROWS = 512


class CausalAttention(torch.autograd.Function):
    """Causal softmax attention over a few windows at a time, so that the scores stay in the cache.

    Inputs are (batch, n_heads, n_tokens, d_head). The probabilities are kept for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, n_tokens, size = query.shape
        out = torch.empty(batch, n_tokens, heads, size, dtype=query.dtype).transpose(1, 2)
        probabilities = torch.empty(batch * heads, n_tokens, n_tokens, dtype=query.dtype)
        bias = torch.full((n_tokens, n_tokens), float("-inf"), dtype=query.dtype).triu_(1)
        for start in range(0, batch, ATTENTION_WINDOWS):
            rows = slice(start, start + ATTENTION_WINDOWS)
            q, k, v = (x[rows].reshape(-1, n_tokens, size) for x in (query, key, value))
            scores = torch.baddbmm(bias, q * size**-0.5, k.transpose(1, 2))
            p = torch.softmax(scores, -1)
            probabilities[start * heads : start * heads + len(p)] = p
            out[rows] = torch.bmm(p, v).view(-1, heads, n_tokens, size)
        ctx.save_for_backward(query, key, value, probabilities)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, probabilities = ctx.saved_tensors
        batch, heads, n_tokens, size = query.shape
        grads = tuple(torch.empty(batch, n_tokens, heads, size, dtype=query.dtype).transpose(1, 2) for _ in range(3))
        shape = (-1, heads, n_tokens, size)
        for start in range(0, batch, ATTENTION_WINDOWS):
            rows = slice(start, start + ATTENTION_WINDOWS)
            q, k, v, g = (x[rows].reshape(-1, n_tokens, size) for x in (query, key, value, grad_outputs[0]))
            p = probabilities[start * heads : start * heads + len(q)]
            grads[2][rows] = torch.bmm(p.transpose(1, 2), g).view(shape)
            grad_p = torch.bmm(g, v.transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_p, p, -1, p.dtype)
            grads[0][rows] = (torch.bmm(grad_scores, k) * size**-0.5).view(shape)
            grads[1][rows] = (torch.bmm(grad_scores.transpose(1, 2), q) * size**-0.5).view(shape)
        return grads[0], grads[1], grads[2]


def attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any
) -> tuple[Tensor, None]:
    """`CausalAttention` with the signature of transformers' attention registry (no padding mask)."""
    return CausalAttention.apply(query, key, value).transpose(1, 2), None


class CheapDropout(nn.Module):
    """Dropout whose mask comes from the bytes of a NumPy generator; the rate is rounded to 1/256.

    `generator` is replaced at every step, so that a resumed run draws the same masks.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.n_dropped_of_256 = round(rate * 256)
        self.generator: np.random.Generator | None = None

    def forward(self, x: Tensor) -> Tensor:
        """In training, `x` with some elements zeroed and the others scaled up; in evaluation, `x` itself."""
        if not self.training or self.n_dropped_of_256 == 0 or self.generator is None:
            return x
        draws = np.frombuffer(bytearray(self.generator.bytes(x.numel())), dtype=np.uint8)
        keep = torch.from_numpy(draws >= self.n_dropped_of_256).view(x.shape)
        return x * (keep.to(x.dtype) * (256 / (256 - self.n_dropped_of_256)))


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy in nats of `hidden @ weight.T` against `targets`, computed by blocks of rows.

    `hidden` is (n_tokens, n_embd), `weight` (n_vocab, n_embd), `targets` (n_tokens,).
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        n_tokens = len(hidden)
        low_weight = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight)
        total_nats = torch.zeros(())
        for start in range(0, n_tokens, LOSS_ROWS):
            rows = slice(start, start + LOSS_ROWS)
            block, target = hidden[rows], targets[rows, None]
            log_p = torch.log_softmax((block @ low_weight.t()).float(), -1)
            total_nats -= log_p.gather(1, target).sum()
            grad_logits = log_p.exp_()
            grad_logits.scatter_add_(1, target, torch.full(target.shape, -1.0))
            low_grad = grad_logits.to(hidden.dtype)
            grad_hidden[rows] = low_grad @ low_weight
            grad_weight += low_grad.t() @ block
        ctx.save_for_backward(grad_hidden.div_(n_tokens), grad_weight.div_(n_tokens))
        return total_nats / n_tokens

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_outputs[0].to(grad_hidden.dtype), grad_weight * grad_outputs[0], None
