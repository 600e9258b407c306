"""The forward pass of a decoder in pieces, so that an intervention runs only what comes after it.

Each function takes the model as transformers made it. The pieces one after another are the model's own forward pass, bit
for bit at equal shapes: `logits(model, run_blocks(model, embed(model, ids)))`.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.compute.cpu_products import product
from pipelines.models.sites import blocks_of, family_of


def embed(model: nn.Module, ids: Tensor) -> Tensor:
    """(batch, position) token ids -> (batch, position, d_model), what the first block gets."""
    tokens, positions = token_and_position(model, ids)
    return tokens + positions


def token_and_position(model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The two parts of `embed`: (batch, position, d_model) of the tokens, (1, position, d_model) of the positions."""
    family = family_of(model)
    place = torch.arange(ids.shape[1], device=ids.device)[None]
    return attrgetter(family.tokens)(model)(ids), attrgetter(family.positions)(model)(place)


class Keys:
    """Attention's keys and values by block, each (n_heads, position, d_head): noted in one run, given to the next.

    Stands where transformers has a cache: with none to begin with it notes those of a run of one text; else it puts them
    before a run's own, whose positions then follow.
    """

    def __init__(self, earlier: list[tuple[Tensor, Tensor]] | None = None):
        self.noted: list[tuple[Tensor, Tensor]] = []
        self.earlier = earlier

    def __len__(self) -> int:
        """Positions that come before a run's own."""
        return self.earlier[0][0].shape[1] if self.earlier else 0

    def until(self, position: int) -> Keys:
        """Those noted of the positions before one, to be given."""
        return Keys([(keys[:, :position], values[:, :position]) for keys, values in self.noted])

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any) -> tuple[Tensor, Tensor]:
        """What attention reads, from its own (batch, n_heads, position, d_head); called by the block."""
        if self.earlier is None:
            self.noted.append((keys[0], values[0]))
            return keys, values
        before = (found.expand(len(keys), -1, -1, -1) for found in self.earlier[layer])
        joined = [torch.cat([first, own], dim=2) for first, own in zip(before, (keys, values), strict=True)]
        return joined[0], joined[1]


def run_blocks(
    model: nn.Module, hidden: Tensor, first: int = 0, stop: int | None = None, keys: Keys | None = None
) -> Tensor:
    """Blocks first, first + 1, … before `stop` (by default all the rest) on `hidden` (batch, position, d_model).

    With `keys`, `hidden` is of the positions after those that the keys are of.
    """
    mask = _mask_after(hidden, len(keys)) if keys else _causal_mask(model, hidden)
    place = torch.arange(hidden.shape[1], device=hidden.device)[None]
    for block in list(blocks_of(model))[first:stop]:
        found: Any = block(hidden, attention_mask=mask, use_cache=False, position_ids=place, past_key_values=keys)
        hidden = found[0] if isinstance(found, tuple) else found
    return hidden


def heads_together(model: nn.Module, layer: int) -> nn.Module:
    """W_O and b_O: (…, n_heads · d_head), the heads' outputs side by side, to the attention's output (…, d_model)."""
    found: nn.Module = attrgetter(family_of(model).head_outputs)(blocks_of(model)[layer])
    return found


def neurons_together(model: nn.Module, layer: int) -> nn.Module:
    """The MLP's neurons after their non-linearity (…, n_neurons) to what the MLP writes (…, d_model)."""
    found: nn.Module = attrgetter(family_of(model).mlp_down)(blocks_of(model)[layer])
    return found


def head_weights(model: nn.Module, layer: int) -> tuple[Tensor, Tensor]:
    """W_O (n_heads, d_head, d_model) and b_O (d_model,) of a block: its attention writes Σ z_h W_O,h + b_O."""
    joined: Any = heads_together(model, layer)
    n_heads = model.config.num_attention_heads  # type: ignore[union-attr]
    return joined.weight.reshape(n_heads, -1, joined.weight.shape[1]), joined.bias  # type: ignore[arg-type]


def run_mlp(model: nn.Module, layer: int, middle: Tensor) -> Tensor:
    """What leaves a block (…, d_model), given the stream between its attention and its MLP."""
    family, block = family_of(model), blocks_of(model)[layer]
    written: Tensor = attrgetter(family.mlp)(block)(attrgetter(family.mlp_norm)(block)(middle))
    return middle + written


def final_norm(model: nn.Module) -> nn.LayerNorm:
    """The LayerNorm before the unembedding."""
    norm: nn.LayerNorm = attrgetter(family_of(model).final_norm)(model)
    return norm


def unembedding(model: nn.Module) -> Tensor:
    """(vocabulary, d_model) W_U: logits are the final norm's output times its transpose."""
    weight: Tensor = attrgetter(family_of(model).unembedding)(model).weight
    return weight


def logits(model: nn.Module, hidden: Tensor) -> Tensor:
    """(…, d_model) after the last block -> (…, vocabulary). Pass only the positions that are wanted: this is costly."""
    return product(final_norm(model)(hidden), unembedding(model))


def _mask_after(hidden: Tensor, n_before: int) -> Tensor:
    """(1, 1, position, n_before + position) what is added to attention's scores: -inf for what comes later."""
    n = hidden.shape[1]
    return hidden.new_full((n, n_before + n), -torch.inf).triu(n_before + 1)[None, None]


def _causal_mask(model: nn.Module, hidden: Tensor) -> Tensor | None:
    """What the model's attention gets as its mask: None where its kernel knows that it is causal."""
    from transformers.masking_utils import create_causal_mask

    place = torch.arange(hidden.shape[1], device=hidden.device)[None]
    mask: Tensor | None = create_causal_mask(
        config=model.config,  # type: ignore[arg-type]
        inputs_embeds=hidden,
        attention_mask=None,
        past_key_values=None,
        position_ids=place,
    )
    return mask
