"""How far one prediction of the next token is from another, and how probable a token is: from logits, in nats.

`kl` and `log_probability` are float64 and serve single predictions, of which small differences count. `summed_kl` and
`summed_cross_entropy` serve whole texts: they take log-probabilities in float32, of which a vocabulary of 50,257 leaves
room for few copies, and only their sums are float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 256
"""Predictions that are compared at a time: of a vocabulary of 50,257 a few copies in float64 are 0.4 GB."""


def log_probabilities(logits: Tensor) -> Tensor:
    """(…, vocabulary) float64 log-probabilities of logits (…, vocabulary), with gradients."""
    return torch.log_softmax(logits.double(), dim=-1)


def probabilities(logits: Tensor) -> Tensor:
    """(…, vocabulary) float64 probabilities of logits (…, vocabulary), with gradients."""
    return torch.softmax(logits.double(), dim=-1)


def log_probability(logits: Tensor, targets: Tensor) -> Tensor:
    """(n,) float64 log-probability of each one's target (n,) under logits (n, vocabulary); minus the cross-entropy."""
    return log_probabilities(logits).gather(1, targets[:, None])[:, 0]


def kl(normal: Tensor, other: Tensor) -> Tensor:
    """(n,) KL(normal ‖ other) in nats, float64, of logits (n, vocabulary); never negative, and finite for finite logits."""
    parts = zip(normal.split(ROWS), other.split(ROWS), strict=True)
    return torch.cat([divergence(*map(log_probabilities, part)) for part in parts])


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(…) KL(p ‖ q) in nats of log-probabilities (…, vocabulary) in float64, with gradients; exactly 0 where p is q.

    With d = log q − log p, Σ p (e^d − 1 − d): as Σ p e^d = Σ q = 1 = Σ p this is Σ p log(p / q), and no term of the sum
    is negative, so that rounding cannot make the sum negative. Where d is large, p e^d is written as q.
    """
    p, change = log_p.exp(), log_q - log_p
    near = p * (torch.expm1(change.clamp_max(1.0)) - change)
    far = log_q.exp() - p * (1 + change)
    return torch.where(change < 1.0, near, far).clamp_min_(0).sum(dim=-1)


def summed_kl(log_p: Tensor, log_q: Tensor) -> float:
    """Σ KL(p ‖ q) in nats over log-probabilities (n, vocabulary), as Σ p (log p − log q), `ROWS` at a time.

    A prediction's divergence has the precision of the log-probabilities, and may be below 0 by their rounding.
    """
    parts = zip(log_p.split(ROWS), log_q.split(ROWS), strict=True)
    return float(sum((p.exp() * (p - q)).sum(dim=1).double().sum() for p, q in parts))


def summed_cross_entropy(log_p: Tensor, targets: Tensor) -> float:
    """Σ −log p(target) in nats over log-probabilities (n, vocabulary) and targets (n,)."""
    return float(-log_p.gather(1, targets[:, None]).double().sum())
