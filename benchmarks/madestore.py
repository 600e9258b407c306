"""A store of made-up rows like a residual stream's, at any size, for benchmarks that need no model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from actstore.schema import CorpusIdentity
from pipelines.stores.made.made_store import SITE, write_made_store

__all__ = ["OUTLIERS", "SITE", "make_store", "residual_rows"]

OUTLIERS = ((138, 40.0, 15.0), (378, -60.0, 8.0), (447, 150.0, 20.0))
"""(channel, mean, deviation) of the made-up outlier dimensions; the other channels' deviations are around 1."""


def residual_rows(n_rows: int, d_model: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """(n, d) rows like a residual stream's: channels of uneven size, three of them outliers tens of times the others.

    GPT-2's first position, whose norm is some 30 times the others', is not among them: stores leave it out.
    """
    rows = rng.standard_normal((n_rows, d_model), dtype=np.float32)
    rows *= np.exp(np.random.default_rng(1).standard_normal(d_model) * 0.5).astype(np.float32)
    for channel, mean, deviation in OUTLIERS:
        if channel < d_model:
            rows[:, channel] = rows[:, channel] * np.float32(deviation) + np.float32(mean)
    return rows


def make_store(path: Path, n_rows: int, d_model: int = 768, encoding: str = "fp16", seed: int = 0) -> Path:
    """A store of `n_rows` training rows, all of one long document; returns `path`."""
    return write_made_store(
        path,
        lambda start, stop: residual_rows(stop - start, d_model, np.random.default_rng((seed, start))),
        n_rows,
        corpus=CorpusIdentity("made-up", "0" * 64),
        encoding=encoding,
        seed=seed,
    )
