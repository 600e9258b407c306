"""Which features are active: the k largest pre-activations of each row, or the n·k largest of a batch.

The encoder's product and the search through it are most of a training step. With `fast`, both run on bfloat16
operands, a block of rows at a time so that what the product writes is still in cache when it is searched, for half as
many candidates again as are wanted; the candidates are scored again in full precision, and the choice is made among
those. A feature is missed only where bfloat16's rounding moves it behind k / 2 others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipelines.sae.sparse import Active, sampled_product

BLOCK_ROWS = 512
SPARE = 2
"""Candidates beyond k, as a share: k / SPARE."""
GROUP = 8
"""Features whose maximum stands for all of them in the search."""


def top_k(x: Tensor, weight: Tensor, bias: Tensor, k: int, *, fast: bool) -> tuple[Active, Tensor]:
    """The k largest of x · weightᵀ + bias of each row: where, and the values (n · k,). x (n, d), weight (F, d)."""
    n_features = len(weight)
    if not fast:
        found = [_top(torch.addmm(bias, block, weight.T), k) for block in x.split(BLOCK_ROWS)]
        values, indices = (torch.cat(parts) for parts in zip(*found, strict=True))
        indices, order = indices.sort(dim=1)
        return Active.of_k(indices, n_features), values.gather(1, order).flatten()
    candidates = Active.of_k(nearly_top(x, weight, bias, min(n_features, k + k // SPARE)), n_features)
    scores = (sampled_product(x, weight, candidates) + bias[candidates.features]).view(len(x), -1)
    chosen = torch.topk(scores, k, dim=1, sorted=False).indices.sort(dim=1).values  # candidates rise, and so do these
    indices = candidates.features.view(len(x), -1).gather(1, chosen)
    return Active.of_k(indices, n_features), scores.gather(1, chosen).flatten()


def nearly_top(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> Tensor:
    """(n, k) the features, rising, whose pre-activation is largest by a bfloat16 product."""
    low, low_bias = weight.bfloat16(), bias.bfloat16()
    pre = torch.empty(min(BLOCK_ROWS, len(x)), len(weight), dtype=torch.bfloat16, device=x.device)
    found = []
    for block in x.bfloat16().split(BLOCK_ROWS):
        product = torch.mm(block, low.T, out=pre[: len(block)])
        product += low_bias
        found.append(_grouped_top(product, k))
    return torch.cat(found).sort(dim=1).values


def _grouped_top(values: Tensor, k: int) -> Tensor:
    """(n, k) places of the k largest of each row, in no order: they lie in the k groups with the largest maxima."""
    n, width = values.shape
    n_groups = width // GROUP
    if n_groups < 4 * k or width % GROUP or values.device.type != "cpu":  # nothing to be saved
        return torch.topk(values, k, dim=1, sorted=False).indices
    groups = _grouped_top(values.view(n, GROUP, n_groups).amax(dim=1), k)
    members = torch.arange(0, width, n_groups, device=values.device)
    places = (groups[:, None, :] + members[None, :, None]).view(n, -1)
    return places.gather(1, torch.topk(values.gather(1, places), k, dim=1, sorted=False).indices)


def _top(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    top = torch.topk(values, k, dim=1, sorted=False)
    return top.values, top.indices
