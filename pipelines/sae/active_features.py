"""Which features are active: the k largest pre-activations of each row, the n·k largest of a batch, or all above a floor.

The encoder's product and the search through it are most of a training step. With `fast`, both run on bfloat16
operands, a block of rows at a time so that what the product writes is still in cache when it is searched, for half as
many candidates again as are wanted; the candidates are scored again in full precision, and the choice is made among
those. A feature is missed only where bfloat16's rounding moves it behind k / 2 others.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pipelines.compute.cpu_products import product
from pipelines.sae.sparse_operators import Active, sampled_product

BLOCK_ROWS = 512
"""Of a bfloat16 product; of float32, half as many, which are as many bytes."""
SPARE = 2
"""Candidates beyond k, as a share: k / SPARE."""
ROUNDING = 2.0**-7
"""How far below a floor a bfloat16 pre-activation may lie and be a candidate, relative to what is added up."""
ROW_SHARE = 4
"""Candidates of a row, in k, where a batch shares its n·k codes."""
GROUP = 8
"""Features whose maximum stands for all of them in the search."""


@torch.no_grad()
def top_k(x: Tensor, weight: Tensor, bias: Tensor, k: int, *, fast: bool) -> tuple[Active, Tensor]:
    """The k largest of x · weightᵀ + bias of each row: where, and the values (n · k,). x (n, d), weight (F, d)."""
    n_features = len(weight)
    if not fast:
        values, indices = row_search(x, weight, bias, k, fast=False)
        indices, order = indices.sort(dim=1)
        return Active.of_k(indices, n_features), values.gather(1, order).flatten()
    width = min(n_features, k + k // SPARE)
    indices = torch.cat([_strongest(block, width) for block in _preactivations(x, weight, bias, fast=True)])
    indices = indices.sort(dim=1).values
    candidates = Active.of_k(indices, n_features)
    scores = (sampled_product(x, weight, candidates) + bias[candidates.features]).view(len(x), -1)
    chosen = torch.topk(scores, k, dim=1, sorted=False).indices.sort(dim=1).values  # candidates rise, and so do these
    return Active.of_k(indices.gather(1, chosen), n_features), scores.gather(1, chosen).flatten()


@torch.no_grad()
def batch_top_k(x: Tensor, weight: Tensor, bias: Tensor, k: int, *, fast: bool) -> tuple[Active, Tensor]:
    """The n·k largest of x · weightᵀ + bias over all rows together: where, and the values (n · k,).

    Each row is searched for its ROW_SHARE · k largest. Where all of those are among the batch's largest there may be
    more, and that row is searched again for twice as many.
    """
    (n, n_features), total = (len(x), len(weight)), len(x) * k
    wanted = min(n * n_features, total + total // SPARE) if fast else total
    width = min(n_features, ROW_SHARE * k)
    values, places = _with_places(
        *row_search(x, weight, bias, width, fast=fast), torch.arange(n, device=x.device), n_features
    )
    while True:
        chosen = torch.topk(values.float() if fast else values, wanted, sorted=False).indices
        full = torch.bincount(places[chosen] // n_features, minlength=n) == width
        if width == n_features or not bool(full.any()):
            break
        width, again = min(n_features, 2 * width), full.nonzero()[:, 0]
        kept = ~full[places // n_features]
        more = _with_places(*row_search(x[again], weight, bias, width, fast=fast), again, n_features)
        values, places = torch.cat([values[kept], more[0]]), torch.cat([places[kept], more[1]])
    places, order = places[chosen].sort()
    active = Active.of_places(places, n, n_features)
    if not fast:
        return active, values[chosen][order]
    scores = sampled_product(x, weight, active) + bias[active.features]
    best = torch.topk(scores, total, sorted=False).indices.sort().values
    return Active.of_places(places[best], n, n_features), scores[best]


@torch.no_grad()
def above(x: Tensor, weight: Tensor, bias: Tensor, floor: Tensor, *, fast: bool) -> tuple[Active, Tensor]:
    """Where x · weightᵀ + bias exceeds `floor`, (F,) or one for all, and the values (nnz,)."""
    lowest = floor - ROUNDING * (floor.abs() + bias.abs()) if fast else floor
    parts, values = [], []
    for block in _preactivations(x, weight, bias, fast=fast):
        mask = block > lowest
        parts.append(Active.of_mask(mask))
        if not fast:
            values.append(block[mask])
    active = Active.of_blocks(parts)
    if not fast:
        return active, torch.cat(values)
    scores = sampled_product(x, weight, active) + bias[active.features]
    over = scores > floor.expand_as(bias)[active.features]
    return active.keep(over), scores[over]


def row_search(x: Tensor, weight: Tensor, bias: Tensor, k: int, *, fast: bool) -> tuple[Tensor, Tensor]:
    """(n, k) the largest x · weightᵀ + bias of each row and their features, in no order; with `fast` in bfloat16."""
    values, features = [], []
    for block in _preactivations(x, weight, bias, fast=fast):
        features.append(_strongest(block, k))
        values.append(block.gather(1, features[-1]))
    return torch.cat(values), torch.cat(features)


def _preactivations(x: Tensor, weight: Tensor, bias: Tensor, *, fast: bool) -> Iterator[Tensor]:
    """x · weightᵀ + bias, a block of rows at a time; in bfloat16, each in the place of the one before."""
    if not fast:
        yield from (product(block, weight, bias) for block in x.split(BLOCK_ROWS // 2))
        return
    joined = x.device.type == "cpu"
    if joined:  # the bias as one more input that is always 1: added on its own, it takes 6 % of the product's time
        x, weight = _joined(x, torch.ones(len(x), 1)), _joined(weight, bias[:, None])
    else:
        x, weight, bias = x.bfloat16(), weight.bfloat16(), bias.bfloat16()
    pre = x.new_empty(min(BLOCK_ROWS, len(x)), len(weight))
    for block in x.split(BLOCK_ROWS):
        out = pre[: len(block)]
        yield torch.mm(block, weight.T, out=out) if joined else torch.addmm(bias, block, weight.T, out=out)


def _joined(left: Tensor, right: Tensor) -> Tensor:
    """Columns side by side, in bfloat16."""
    both = torch.empty(len(left), left.shape[1] + right.shape[1], dtype=torch.bfloat16)
    both[:, : left.shape[1]] = left
    both[:, left.shape[1] :] = right
    return both


def _strongest(block: Tensor, k: int) -> Tensor:
    """(n, k) the features of the k largest pre-activations (n, F) of each row, in no order."""
    # Among numbers above zero, the order of bfloat16s is that of their bits as integers, which compare twice as fast.
    # Those below zero come last, in another order: all of them make a code of zero.
    return _grouped_top(block.view(torch.int16) if block.dtype == torch.bfloat16 else block, k)


def _with_places(values: Tensor, features: Tensor, rows: Tensor, n_features: int) -> tuple[Tensor, Tensor]:
    """Values and features (n, width) of the rows -> both flat, the features as places in the whole (n, F) matrix."""
    return values.flatten(), (features + rows[:, None] * n_features).flatten()


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
