"""Matryoshka BatchTopK: nested dictionaries (Bussmann et al. 2025, "Learning Multi-Level Features with Matryoshka SAEs")."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from pipelines.sae.architectures.batchtopk import BatchTopKSae
from pipelines.sae.base import Codes, Losses, Objective, decoded
from pipelines.sae.sparse_operators import Active


class MatryoshkaSae(BatchTopKSae):
    """BatchTopK whose first features must explain rows by themselves, so that general features come first.

    The loss is the mean over the prefixes of a mean squared error: that of the reconstruction from the prefix's codes only.
    """

    architecture = "matryoshka"
    shares: ClassVar[tuple[float, ...]] = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)
    """The prefixes, as shares of all features."""

    @property
    def prefixes(self) -> list[int]:
        """How many features each nested dictionary has.

        >>> MatryoshkaSae(4, 64, 2).prefixes
        [4, 8, 16, 32, 64]
        """
        return sorted({math.ceil(share * self.n_features) for share in self.shares})

    def losses(self, x: Tensor, objective: Objective, dead: Tensor | None = None) -> Losses:
        codes = self.training_codes(x, objective.kernel)
        ends = self.prefixes
        starts = [0, *ends[:-1]]
        reconstruction = self.b_dec
        errors = []
        # One split writes one (F, d) gradient; separate slices would write an (F, d) gradient each.
        parts = self.W_dec.split([end - start for start, end in zip(starts, ends, strict=True)])
        for start, part in zip(starts, parts, strict=True):
            reconstruction = reconstruction + decoded(between(codes, start, start + len(part)), part, objective.kernel)
            errors.append((reconstruction - x).square().mean())
        return self.completed({"mse": torch.stack(errors).mean()}, x, reconstruction, codes, objective, dead)


def between(codes: Codes, start: int, end: int) -> Codes:
    """The codes of the features from `start` up to but not including `end`, renumbered from 0."""
    chosen = (codes.active.features >= start) & (codes.active.features < end)
    part = codes.active.keep(chosen)
    return Codes(codes.values[chosen], Active(part.features - start, part.starts, end - start))
