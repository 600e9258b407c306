"""Attention's keys and values, noted in one forward pass and given to the next, in place of transformers' cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
"""A block's keys and values, each (text, n_heads, position, d_head)."""


class KeyValues:
    """Keys and values by block.

    With none given, those of the forward pass are noted. Given ones are put before those of the forward pass: those of one
    text before every text of the batch, those of several texts each before the text with the same number.
    """

    def __init__(self, given: dict[int, Pair] | None = None):
        self.noted: dict[int, Pair] = {}
        self.given = given

    def __len__(self) -> int:
        """Positions that come before those of the forward pass."""
        return next(iter(self.given.values()))[0].shape[2] if self.given else 0

    def until(self, position: int | None = None) -> KeyValues:
        """The noted keys and values as given ones: all positions, or those before `position`."""
        return KeyValues({layer: (k[:, :, :position], v[:, :, :position]) for layer, (k, v) in self.noted.items()})

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> Pair:
        """The keys and values that attention reads, given its own (text, n_heads, position, d_head); called by the block."""
        if self.given is None:
            self.noted[layer] = keys, values
            return keys, values
        first = (earlier.expand(len(keys), -1, -1, -1) for earlier in self.given[layer])
        k, v = (torch.cat(both, dim=2) for both in zip(first, (keys, values), strict=True))
        return k, v
