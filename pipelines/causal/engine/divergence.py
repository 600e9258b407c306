"""How far one prediction of the next token is from another: divergence in nats, and the tokens that come first."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipelines.text.tokens import TextCodec

ROWS = 256
"""Predictions that are compared at a time: of a vocabulary of 50,257 a few copies in float64 are 0.4 GB."""


@dataclass(frozen=True)
class Candidate:
    """A next token and how probable it is."""

    token: int
    text: str
    probability: float


def kl(normal: Tensor, other: Tensor) -> Tensor:
    """(n,) KL(normal ‖ other) in nats, float64, of logits (n, vocabulary); never negative, and finite for finite logits."""
    parts = zip(normal.split(ROWS), other.split(ROWS), strict=True)
    return torch.cat([divergence(*(torch.log_softmax(logits.double(), dim=-1) for logits in part)) for part in parts])


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(…) KL(p ‖ q) in nats of log-probabilities (…, vocabulary) in float64, with gradients; exactly 0 where p is q.

    With d = log q − log p, Σ p (e^d − 1 − d): as Σ p e^d = Σ q = 1 = Σ p this is Σ p log(p / q), and no term of it is
    negative, so that rounding cannot make the sum so. Where d is large, p e^d is written as q.
    """
    p, change = log_p.exp(), log_q - log_p
    near = p * (torch.expm1(change.clamp_max(1.0)) - change)
    far = log_q.exp() - p * (1 + change)
    return torch.where(change < 1.0, near, far).clamp_min_(0).sum(dim=-1)


def top_candidates(logits: Tensor, codec: TextCodec, n: int) -> list[Candidate]:
    """The n most probable next tokens of logits (vocabulary,)."""
    probability = torch.softmax(logits.double(), dim=-1)
    found = torch.topk(probability, min(n, len(probability)))
    return [
        Candidate(token, codec.text([token]), value)
        for token, value in zip(found.indices.tolist(), found.values.tolist(), strict=True)
    ]
