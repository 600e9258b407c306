"""How many bits a causal language model needs for documents, measured with a sliding window.

Each document is scored on its own and begins with `<|endoftext|>`, which is given and not scored. Every other token is
scored exactly once. The left context of a token is at least `context - stride + 1` tokens (129 for a context of 256 and a
stride of 128), or all tokens before it where the document has fewer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

CONTEXT_TOKENS = 256
STRIDE_TOKENS = 128


@dataclass(frozen=True)
class Window:
    """Inputs [start, stop) of a document; the targets [first_target, stop] are scored."""

    document: int
    start: int
    stop: int
    first_target: int


def sliding_windows(
    n_tokens: int, document: int = 0, context: int = CONTEXT_TOKENS, stride: int = STRIDE_TOKENS
) -> list[Window]:
    """The windows that score targets `1 .. n_tokens - 1` of a document exactly once each.

    Each input predicts the token after it, so a document of `n_tokens` has `n_tokens - 1` targets. The last window ends at
    the last target.
    """
    windows = []
    first_target, start = 1, 0
    while first_target < n_tokens:
        stop = min(start + context, n_tokens - 1)
        windows.append(Window(document, start, stop, first_target))
        first_target, start = stop + 1, start + stride
    return windows


@torch.no_grad()
def document_bits(
    model: nn.Module,
    documents: Sequence[np.ndarray],
    batch_windows: int = 32,
    context: int = CONTEXT_TOKENS,
    stride: int = STRIDE_TOKENS,
) -> np.ndarray:
    """Bits of each document under `model`, float64 (n_documents,).

    `documents` are token ids, int64 (n_tokens,), beginning with the start-of-text token. Windows are padded on the right to
    the longest of their batch; a causal model's scored positions do not see the padding.
    """
    windows = [w for i, ids in enumerate(documents) for w in sliding_windows(len(ids), i, context, stride)]
    windows.sort(key=lambda window: window.stop - window.start)
    bits = np.zeros(len(documents))
    was_training = model.training
    model.eval()
    for begin in range(0, len(windows), batch_windows):
        batch = windows[begin : begin + batch_windows]
        longest = max(window.stop - window.start for window in batch)
        inputs = torch.zeros(len(batch), longest, dtype=torch.long)
        for row, window in enumerate(batch):
            ids = torch.from_numpy(documents[window.document][window.start : window.stop])
            inputs[row, : len(ids)] = ids
        logits: Tensor = model(input_ids=inputs, use_cache=False).logits
        for row, window in enumerate(batch):
            targets = torch.from_numpy(documents[window.document][window.first_target : window.stop + 1])
            first = window.first_target - 1 - window.start
            scored = logits[row, first : first + len(targets)].float()
            nats = nn.functional.cross_entropy(scored, targets, reduction="sum")
            bits[window.document] += float(nats) / math.log(2)
    model.train(was_training)
    return bits
