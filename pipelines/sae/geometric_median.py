"""The geometric median, from which decoder biases start."""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-12


def geometric_median(rows: Tensor, *, iterations: int = 100, tolerance: float = 1e-7) -> Tensor:
    """The point with the least sum of distances to (n, d) rows, by Weiszfeld's algorithm in float64.

    Residual streams have a few rows with huge norms; these move the mean, but hardly the geometric median.
    """
    points = rows.double()
    median = points.mean(dim=0)
    for _ in range(iterations):
        distance = (points - median).norm(dim=1)
        weights = torch.where(distance > 0, 1.0 / distance, 0.0)
        step = weights @ points / weights.sum().clamp_min(EPSILON) - median
        # Rows exactly at the estimate would hold it in place; they pull only by their number (Vardi and Zhang 2000).
        pull = weights.sum() * step.norm()
        step *= (1.0 - (distance == 0).sum() / pull.clamp_min(EPSILON)).clamp_min(0.0)
        median = median + step
        if step.norm() <= tolerance * distance.mean():
            break
    return median.to(rows.dtype)
