"""Which features are active: the k largest pre-activations of each row, the n·k largest of a batch, or all above a floor.

The encoder's product and the search through it take most of a training step. With `fast`, both run on bfloat16 operands, a
block of rows at a time, so that a block's product is still in cache when it is searched. The search finds 1.5 times as many
candidates as are wanted; these are scored again in full precision, and the largest are chosen. A feature is missed only
where bfloat16's rounding moves it behind k / 2 others.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pipelines.compute.cpu_products import product
from pipelines.sae.sparse_operators import Active, sampled_product

BLOCK_ROWS = 512
"""Rows per block of a bfloat16 product. A float32 product has half as many, which take as many bytes."""
SPARE = 2
"""The fast search finds k / SPARE candidates more than k."""
ROUNDING = 2.0**-7
"""A bfloat16 pre-activation is a candidate down to ROUNDING · (|floor| + |bias|) below its floor."""
ROW_SHARE = 4
"""Where a batch shares its n·k codes, each row is first searched for ROW_SHARE · k candidates."""
GROUP = 8
"""Features per group; the search first compares the groups' maxima."""


@torch.no_grad()
def top_k(x: Tensor, weight: Tensor, bias: Tensor, k: int, *, fast: bool) -> tuple[Active, Tensor]:
    """The k largest of x · weightᵀ + bias of each row: their features, and values (n · k,). x (n, d), weight (F, d)."""
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
    chosen = torch.topk(scores, k, dim=1, sorted=False).indices.sort(dim=1).values  # rising, as the candidates are
    return Active.of_k(indices.gather(1, chosen), n_features), scores.gather(1, chosen).flatten()


@torch.no_grad()
def batch_top_k(x: Tensor, weight: Tensor, bias: Tensor, k: int, *, fast: bool) -> tuple[Active, Tensor]:
    """The n·k largest of x · weightᵀ + bias over all rows together: their features, and values (n · k,).

    Each row is searched for its ROW_SHARE · k largest. If all of these are among the batch's largest, the row may have more:
    it is searched again for twice as many.
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
        of_other_rows = ~full[places // n_features]
        more = _with_places(*row_search(x[again], weight, bias, width, fast=fast), again, n_features)
        values, places = torch.cat([values[of_other_rows], more[0]]), torch.cat([places[of_other_rows], more[1]])
    places, order = places[chosen].sort()
    active = Active.of_places(places, n, n_features)
    if not fast:
        return active, values[chosen][order]
    scores = sampled_product(x, weight, active) + bias[active.features]
    best = torch.topk(scores, total, sorted=False).indices.sort().values
    return Active.of_places(places[best], n, n_features), scores[best]


@torch.no_grad()
def above(x: Tensor, weight: Tensor, bias: Tensor, floor: Tensor, *, fast: bool) -> tuple[Active, Tensor]:
    """The features where x · weightᵀ + bias exceeds `floor`, (F,) or a scalar, and the values (nnz,)."""
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
    """(n, k) the k largest of x · weightᵀ + bias of each row and their features, unordered; in bfloat16 with `fast`."""
    values, features = [], []
    for block in _preactivations(x, weight, bias, fast=fast):
        features.append(_strongest(block, k))
        values.append(block.gather(1, features[-1]))
    return torch.cat(values), torch.cat(features)


def _preactivations(x: Tensor, weight: Tensor, bias: Tensor, *, fast: bool) -> Iterator[Tensor]:
    """x · weightᵀ + bias, a block of rows at a time; in bfloat16, each block overwrites the one before."""
    if not fast:
        yield from (product(block, weight, bias) for block in x.split(BLOCK_ROWS // 2))
        return
    joined = x.device.type == "cpu"
    if joined:  # the bias becomes the weight of one more input, always 1; adding it separately takes 6 % of the time
        x, weight = _joined(x, torch.ones(len(x), 1)), _joined(weight, bias[:, None])
    else:
        x, weight, bias = x.bfloat16(), weight.bfloat16(), bias.bfloat16()
    pre = x.new_empty(min(BLOCK_ROWS, len(x)), len(weight))
    for block in x.split(BLOCK_ROWS):
        out = pre[: len(block)]
        yield torch.mm(block, weight.T, out=out) if joined else torch.addmm(bias, block, weight.T, out=out)


def _joined(left: Tensor, right: Tensor) -> Tensor:
    """The columns of both, side by side, in bfloat16."""
    both = torch.empty(len(left), left.shape[1] + right.shape[1], dtype=torch.bfloat16)
    both[:, : left.shape[1]] = left
    both[:, left.shape[1] :] = right
    return both


def _strongest(block: Tensor, k: int) -> Tensor:
    """(n, k) the features of the k largest pre-activations (n, F) of each row, unordered."""
    # Positive bfloat16s are in the order of their bits read as integers, and integers compare twice as fast. Negative
    # numbers come last, in another order, which does not matter: all of them give a code of zero.
    return _grouped_top(block.view(torch.int16) if block.dtype == torch.bfloat16 else block, k)


def _with_places(values: Tensor, features: Tensor, rows: Tensor, n_features: int) -> tuple[Tensor, Tensor]:
    """Values and features (n, width) of `rows` -> both flat, the features as places in the flat (n, F) matrix."""
    return values.flatten(), (features + rows[:, None] * n_features).flatten()


def _grouped_top(values: Tensor, k: int) -> Tensor:
    """(n, k) places of the k largest of each row, unordered: all lie in the k groups with the largest maxima."""
    n, width = values.shape
    n_groups = width // GROUP
    if n_groups < 4 * k or width % GROUP or values.device.type != "cpu":  # grouping saves nothing here
        return torch.topk(values, k, dim=1, sorted=False).indices
    groups = _grouped_top(values.view(n, GROUP, n_groups).amax(dim=1), k)
    members = torch.arange(0, width, n_groups, device=values.device)
    places = (groups[:, None, :] + members[None, :, None]).view(n, -1)
    return places.gather(1, torch.topk(values.gather(1, places), k, dim=1, sorted=False).indices)
