"""The next tokens that come first in a prediction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipelines.metrics.divergence import probabilities
from pipelines.text.tokens import TextCodec


@dataclass(frozen=True)
class Candidate:
    """A next token and how probable it is."""

    token: int
    text: str
    probability: float


def top_candidates(logits: Tensor, codec: TextCodec, n: int) -> list[Candidate]:
    """The n most probable next tokens of logits (vocabulary,)."""
    probability = probabilities(logits)
    first = torch.topk(probability, min(n, len(probability)))
    return [
        Candidate(token, codec.token_text(token), value)
        for token, value in zip(first.indices.tolist(), first.values.tolist(), strict=True)
    ]
