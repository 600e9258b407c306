"""KL divergence of next-token predictions and log-probability of tokens, from logits, in nats.

`kl` and `log_probability` serve single predictions, where small differences count; they are float64. `summed_kl` and
`summed_cross_entropy` serve whole texts. They take log-probabilities in float32, because memory has room for few copies at a
vocabulary of 50,257; only their sums are float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 256
"""Predictions that are compared at a time: at a vocabulary of 50,257, a few copies in float64 take 0.4 GB."""


def log_probabilities(logits: Tensor) -> Tensor:
    """(…, vocabulary) float64 log-probabilities of logits (…, vocabulary), with gradients."""
    return torch.log_softmax(logits.double(), dim=-1)


def probabilities(logits: Tensor) -> Tensor:
    """(…, vocabulary) float64 probabilities of logits (…, vocabulary), with gradients."""
    return torch.softmax(logits.double(), dim=-1)


def log_probability(logits: Tensor, targets: Tensor) -> Tensor:
    """(n,) float64 log-probability of each target (n,) under logits (n, vocabulary); minus the cross-entropy."""
    return log_probabilities(logits).gather(1, targets[:, None])[:, 0]


def kl(normal: Tensor, other: Tensor) -> Tensor:
    """(n,) float64 KL(normal ‖ other) in nats of logits (n, vocabulary). Never negative; finite for finite logits."""
    parts = zip(normal.split(ROWS), other.split(ROWS), strict=True)
    return torch.cat([divergence(*map(log_probabilities, part)) for part in parts])


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(…) KL(p ‖ q) in nats of float64 log-probabilities (…, vocabulary), with gradients; exactly 0 where p equals q.

    The sum is Σ p (e^d − 1 − d) with d = log q − log p. It equals Σ p log(p / q), since Σ p e^d = Σ q = 1 = Σ p. No term is
    negative, so rounding cannot make the sum negative. Where d is large, p e^d is computed as q.
    """
    p, change = log_p.exp(), log_q - log_p
    near = p * (torch.expm1(change.clamp_max(1.0)) - change)
    far = log_q.exp() - p * (1 + change)
    return torch.where(change < 1.0, near, far).clamp_min_(0).sum(dim=-1)


def summed_kl(log_p: Tensor, log_q: Tensor) -> float:
    """Σ KL(p ‖ q) in nats over log-probabilities (n, vocabulary), as Σ p (log p − log q), `ROWS` at a time.

    Each prediction's divergence has the precision of the log-probabilities, whose rounding can make it negative.
    """
    parts = zip(log_p.split(ROWS), log_q.split(ROWS), strict=True)
    return float(sum((p.exp() * (p - q)).sum(dim=1).double().sum() for p, q in parts))


def summed_cross_entropy(log_p: Tensor, targets: Tensor) -> float:
    """Σ −log p(target) in nats over log-probabilities (n, vocabulary) and targets (n,)."""
    return float(-log_p.gather(1, targets[:, None]).double().sum())
