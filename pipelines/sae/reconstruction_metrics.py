"""In: rows, their reconstructions, the features that fired. Out: how well the rows are explained, and by how many features.

`RowMetrics` is a value with `update`, `merge` and `finalize`: float64 sums over batches, which may come in any order. The
definitions are the field's, as in docs/GLOSSARY.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actstore import paths
from actstore.errors import InputError
from actstore.reader import ActivationStore
from pipelines.sae.base import Sae

PART = "heldout"
BATCH_ROWS, BATCH_CODES = 8192, 1 << 26
"""Limits of one batch: 8,192 rows, and 67 million codes, zeros included (0.27 GB)."""
DENSE = 0.1
BINS_PER_DECADE = 2
EPSILON = 1e-13
"""A variance below this share of the mean squared norm is rounding, and counts as 0."""


@dataclass
class RowMetrics:
    """Sums over n rows x (d,) and reconstructions x̂, from which FVE, MSE, cosine, shrinkage, bias, L0 and densities follow.

    `firings` (F,) counts the rows in which each feature fired; F is 0 where there are no features.

    >>> metrics = RowMetrics.empty(2, 3)
    >>> rows, reconstructions = torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    >>> metrics.update(rows, reconstructions, torch.tensor([0, 2, 2]))
    >>> figures = metrics.finalize()
    >>> figures["fve"], figures["l0"], figures["dead_features"]
    (0.5, 1.5, 1)
    """

    n_rows: int
    n_codes: int
    n_directed: int
    """Rows that are not zero. Only these have a direction, and a norm to divide by."""
    squared_error: float
    squared_norm: float
    squared_norm_out: float
    product: float
    cosine: float
    norm_ratio: float
    total: NDArray[np.float64]
    firings: NDArray[np.int64]

    @classmethod
    def empty(cls, d_model: int, n_features: int) -> RowMetrics:
        return cls(0, 0, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, np.zeros(d_model), np.zeros(n_features, np.int64))

    def update(self, x: Tensor, reconstruction: Tensor, fired: Tensor | None = None, *, n_codes: int = 0) -> None:
        """Add rows (n, d) and their reconstructions.

        `fired` (nnz,) holds the feature of every code above zero, in any order. Without features, `n_codes` is the number of
        values from which the rows were reconstructed.
        """
        exact, guess = x.double(), reconstruction.double()
        norm, norm_out = exact.norm(dim=1), guess.norm(dim=1)
        product = (exact * guess).sum(dim=1)
        directed = norm > 0
        self.n_rows += len(x)
        self.n_directed += int(directed.sum())
        self.squared_error += float((exact - guess).square().sum())
        self.squared_norm += float(norm.square().sum())
        self.squared_norm_out += float(norm_out.square().sum())
        self.product += float(product.sum())
        self.cosine += float((product / (norm * norm_out).clamp_min(1e-300))[directed].sum())
        self.norm_ratio += float((norm_out / norm)[directed].sum())
        self.total += exact.sum(dim=0).cpu().numpy()
        self.n_codes += n_codes if fired is None else len(fired)
        if fired is not None:
            self.firings += torch.bincount(fired, minlength=len(self.firings)).cpu().numpy()

    def merge(self, other: RowMetrics) -> None:
        """Add the sums over other rows."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    @property
    def variance(self) -> float:
        """E‖x‖² − ‖E x‖²; 0 for rows that do not vary."""
        if not self.n_rows:
            return 0.0
        norm = self.squared_norm / self.n_rows
        variance = norm - float(np.square(self.total / self.n_rows).sum())
        return variance if variance > EPSILON * norm else 0.0

    def finalize(self) -> dict[str, Any]:
        """The figures by name; `density_histogram` is plain lists. Raises InputError for rows that do not vary."""
        if not self.variance:
            raise InputError(f"{self.n_rows} rows that do not vary: no share of their variance can be explained.")
        n, directed = self.n_rows, max(self.n_directed, 1)
        figures: dict[str, Any] = {
            "fve": 1.0 - self.squared_error / n / self.variance,
            "mse": self.squared_error / n / len(self.total),
            "l0": self.n_codes / n,
            "cosine": self.cosine / directed,
            "l2_ratio": self.norm_ratio / directed,
            "relative_reconstruction_bias": self.squared_norm_out / self.product if self.product else None,
        }
        if not (n_features := len(self.firings)):
            return figures
        n_dead, n_dense = int((self.firings == 0).sum()), int((self.firings > DENSE * n).sum())
        return figures | {
            "dead_features": n_dead,
            "dead_share": n_dead / n_features,
            "dense_features": n_dense,
            "dense_share": n_dense / n_features,
            "density_histogram": density_histogram(self.firings, n),
        }


def density_histogram(firings: NDArray[np.int64], n_rows: int) -> dict[str, Any]:
    """Features by log10 of their density, in half decades from the lowest density that `n_rows` rows can show.

    Bin i counts features with log10_edges[i] <= log10 density < log10_edges[i + 1]; the last bin includes its upper edge.
    Features that never fired are in no bin but counted as `dead`: counts and dead sum to F.

    >>> density_histogram(np.array([0, 1, 50, 100]), 100)
    {'log10_edges': [-2.0, -1.5, -1.0, -0.5, 0.0], 'counts': [1, 0, 0, 2], 'dead': 1}
    """
    lowest = min(-1, int(np.floor(np.log10(1 / max(n_rows, 1)))))
    edges = np.arange(lowest * BINS_PER_DECADE, 1) / BINS_PER_DECADE
    counts, _ = np.histogram(np.log10(firings[firings > 0] / n_rows), bins=edges)
    return {"log10_edges": edges.tolist(), "counts": counts.tolist(), "dead": int((firings == 0).sum())}


def heldout_rows(
    store: ActivationStore, site: str, batch_rows: int = BATCH_ROWS, max_rows: int | None = None
) -> Iterator[NDArray[np.float32]]:
    """The held-out rows of a site in batches (n, d_model). About `max_rows` at most: the same share of every shard."""
    shards, n_rows = store.shards(PART), store.n_rows(PART)
    share = 1.0 if max_rows is None else min(1.0, max_rows / max(n_rows, 1))
    for shard in shards:
        # Rows are permuted inside shards, so the first rows of a shard are a uniform sample of all its rows.
        stop = max(1, round(share * shard.n_rows))
        for start in range(0, stop, batch_rows):
            yield store.read(shard, paths.acts(site), start, min(start + batch_rows, stop))


def heldout_metrics(sae: Sae, store: ActivationStore, site: str, max_rows: int | None = None) -> dict[str, Any]:
    """The figures of an SAE over the held-out rows, and the number of these rows.

    Raises InputError when there are no held-out rows, or when they do not vary.
    """
    metrics = RowMetrics.empty(sae.d_model, sae.n_features)
    for x in heldout_rows(store, site, batch_rows(sae.n_features), max_rows):
        batch = torch.from_numpy(x).to(sae.W_dec.device)
        with torch.inference_mode():
            codes = sae.codes(batch)
            metrics.update(batch, sae.reconstruct(codes), codes.active.features[codes.values > 0])
    if not metrics.variance:
        raise InputError(f"{store.url}: has {metrics.n_rows} held-out rows, which do not vary; collect more text.")
    return {"heldout_rows": metrics.n_rows, **metrics.finalize()}


def batch_rows(n_features: int) -> int:
    """Rows per batch, chosen so that a dense matrix of all their codes fits in bounded memory.

    >>> batch_rows(4096), batch_rows(24_576), batch_rows(1 << 20)
    (8192, 2730, 256)
    """
    return max(256, min(BATCH_ROWS, BATCH_CODES // n_features))
