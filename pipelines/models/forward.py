"""The forward pass of a decoder in pieces: an intervention runs only the blocks after its site.

Each function takes a model of transformers. Run one after another, the pieces equal the model's own forward pass, bit for
bit at equal shapes: `logits(model, run_blocks(model, embed(model, ids)))`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipelines.models.families.registry import family_of
from pipelines.models.key_values import KeyValues


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks of a model of a known family."""
    return family_of(model).blocks(model)


def embed(model: nn.Module, ids: Tensor) -> Tensor:
    """(batch, position) token ids -> (batch, position, d_model), the input of the first block."""
    return family_of(model).embed(model, ids)


def run_blocks(
    model: nn.Module, hidden: Tensor, first: int = 0, stop: int | None = None, keys: KeyValues | None = None
) -> Tensor:
    """Run the blocks from `first` up to but not including `stop` (default: to the end) on (batch, position, d_model).

    With `keys`, `hidden` holds the positions after those of the keys.
    """
    family, n_before = family_of(model), len(keys) if keys is not None else 0
    mask = _mask_after(hidden, n_before) if n_before else family.causal_mask(model, hidden)
    place = torch.arange(n_before, n_before + hidden.shape[1], device=hidden.device)[None]
    for layer in range(len(family.blocks(model)))[first:stop]:
        hidden = family.run_block(model, layer, hidden, mask, place, keys)
    return hidden


def unembedding(model: nn.Module) -> Tensor:
    """(vocabulary, d_model) W_U: logits are the final norm's output times its transpose, plus the head's bias."""
    return family_of(model).unembedding(model)


def logits(model: nn.Module, hidden: Tensor) -> Tensor:
    """(…, d_model) after the last block -> (…, vocabulary). Costly: pass only the positions that are wanted."""
    return family_of(model).logits(model, hidden)


def _mask_after(hidden: Tensor, n_before: int) -> Tensor:
    """(1, 1, position, n_before + position) the term added to attention's scores: -inf for later positions."""
    n = hidden.shape[1]
    return hidden.new_full((n, n_before + n), -torch.inf).triu(n_before + 1)[None, None]
