"""The forward pass of a decoder in pieces, so that an intervention runs only what comes after it.

Each function takes the model as transformers made it. The pieces one after another are the model's own forward pass, bit
for bit at equal shapes: `logits(model, run_blocks(model, embed(model, ids)))`.
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
    """(batch, position) token ids -> (batch, position, d_model), what the first block gets."""
    return family_of(model).embed(model, ids)


def run_blocks(
    model: nn.Module, hidden: Tensor, first: int = 0, stop: int | None = None, keys: KeyValues | None = None
) -> Tensor:
    """Blocks first, first + 1, … before `stop` (by default all the rest) on `hidden` (batch, position, d_model).

    With `keys` given, `hidden` is of the positions after those that the keys are of.
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
    """(…, d_model) after the last block -> (…, vocabulary). Pass only the positions that are wanted: this is costly."""
    return family_of(model).logits(model, hidden)


def _mask_after(hidden: Tensor, n_before: int) -> Tensor:
    """(1, 1, position, n_before + position) what is added to attention's scores: -inf for what comes later."""
    n = hidden.shape[1]
    return hidden.new_full((n, n_before + n), -torch.inf).triu(n_before + 1)[None, None]
