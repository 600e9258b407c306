"""Attention's keys and values, noted in one run and given to the next, in the place where transformers has a cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
"""A block's keys and values, each (text, n_heads, position, d_head)."""


class KeyValues:
    """Keys and values by block: with none given, those of a run are noted; else the given ones are put before the run's own.

    One text that is given stands before every text of a run; several stand each before the text of its number.
    """

    def __init__(self, given: dict[int, Pair] | None = None):
        self.noted: dict[int, Pair] = {}
        self.given = given

    def __len__(self) -> int:
        """Positions that come before a run's own."""
        return next(iter(self.given.values()))[0].shape[2] if self.given else 0

    def until(self, position: int | None = None) -> KeyValues:
        """What was noted, to be given: all positions, or those before one."""
        return KeyValues({layer: (k[:, :, :position], v[:, :, :position]) for layer, (k, v) in self.noted.items()})

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> Pair:
        """What attention reads, from its own (text, n_heads, position, d_head); called by the block."""
        if self.given is None:
            self.noted[layer] = keys, values
            return keys, values
        first = (earlier.expand(len(keys), -1, -1, -1) for earlier in self.given[layer])
        k, v = (torch.cat(both, dim=2) for both in zip(first, (keys, values), strict=True))
        return k, v
