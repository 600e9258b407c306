"""In: estimated effects of patches, a way to do them exactly. Out: how far the two agree, on cells drawn by a seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

Exact = Callable[[Tensor, Tensor], Tensor]
"""Rows (n,) and columns (n,) of cells to the figure (n,) after each one's intervention."""


def drawn_cells(possible: Tensor, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """(rows, columns) of n cells, or of all if there are fewer, of those that `possible` (rows, columns) marks."""
    cells = possible.cpu().nonzero()
    drawn = np.random.default_rng(seed).permutation(len(cells))[:n]
    row, column = cells[torch.from_numpy(np.sort(drawn))].T
    return row, column


def agreement(estimates: Tensor, possible: Tensor, exact: Exact, before: float, n: int, seed: int) -> dict[str, Any]:
    """Spearman's correlation of estimated figures (rows, columns) with exact ones, and how far they are apart at most.

    `before` is the figure without intervention. None where all cells have the same effect.
    """
    row, column = drawn_cells(possible, n, seed)
    measured, guess = exact(row, column).double(), estimates.cpu()[row, column].double()
    return {
        "cells": len(row),
        "rank_correlation": rank_correlation(guess, measured),
        "largest_exact": float((measured - before).abs().max()) if len(row) else None,
        "largest_difference": float((measured - guess).abs().max()) if len(row) else None,
    }


def rank_correlation(first: Tensor, second: Tensor) -> float | None:
    """Spearman's correlation of two lists; None where one of them is constant or has fewer than three values."""
    from scipy.stats import spearmanr

    if len(first) < 3 or float(first.std()) == 0 or float(second.std()) == 0:
        return None
    return float(spearmanr(first.numpy(), second.numpy()).statistic)
