"""Test-only: codes whose structure is known, because it was planted or because there is none. No command uses them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipelines.structure.null import CodeTable
from pipelines.structure.sample import Sample, cut_blocks

NOTHING = ("independent", "bursty", "zipf", "top-k")
"""Without structure: equal rates; rates that change with the document; Zipf's; both, and only k a row kept."""


class Unnamed:
    """Stands for `Naming` where there is no text."""

    def name(self, feature: int) -> str:
        return f"feature {feature}"

    def contexts(self, features: list[int], at_least: int = 2, n: int = 3) -> list[dict[str, str]]:
        return []


def rates_of(
    kind: str, n_documents: int, n_features: int, mean_rate: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    """(documents, F) how often each feature fires in each document when there is no structure."""
    zipf = 1 / np.arange(1, n_features + 1) ** (0.9 if kind in ("zipf", "top-k") else 0.0)
    burst = 1.2 if kind in ("bursty", "top-k") else 0.0
    rates = zipf * np.exp(burst * rng.normal(size=(n_documents, n_features)) - burst**2 / 2)
    return np.minimum(rates * (mean_rate * n_features / zipf.sum()), 0.6)


def keep_largest(fired: NDArray[np.bool_], k: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Each row's k firings with the largest activations, which are drawn from one exponential law for all."""
    values = np.where(fired, rng.exponential(size=fired.shape), 0)
    bound = np.sort(values, axis=1)[:, -k]
    return fired & (values >= bound[:, None])


def nothing(kind: str, n_documents: int, n_features: int, rng: np.random.Generator, rows: int = 500) -> NDArray[np.bool_]:
    """(documents · rows, F) firings without any structure but that of documents, of rates, and of a top-k."""
    rates = rates_of(kind, n_documents, n_features, 0.06, rng)
    fired = rng.random((n_documents, rows, n_features)) < rates[:, None]
    flat = fired.reshape(-1, n_features)
    return keep_largest(flat, 8, rng) if kind == "top-k" else flat


def communities(
    n_documents: int, n_features: int, sizes: list[int], rng: np.random.Generator, rows: int = 500, work: float = 0.05
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Bursty firings, of which groups of features fire together in some rows: (firings, group of each feature or -1).

    Each group is at work in a share `work` of the rows, in some documents more than in others; in 70 % of those rows
    each member fires.
    """
    groups = np.repeat(np.arange(len(sizes)), sizes)
    fired = rng.random((n_documents * rows, n_features)) < np.repeat(
        rates_of("bursty", n_documents, n_features, 0.015, rng), rows, axis=0
    )
    at_work = rng.random((n_documents * rows, len(sizes))) < np.repeat(
        np.minimum(work * np.exp(rng.normal(size=(n_documents, len(sizes))) - 0.5), 0.3), rows, axis=0
    )
    fired[:, : len(groups)] |= at_work[:, groups] & (rng.random((len(fired), len(groups))) < 0.7)
    return keep_largest(fired, 16, rng), np.r_[groups, np.full(n_features - len(groups), -1)]


def hierarchy(
    n_documents: int, n_features: int, rng: np.random.Generator, rows: int = 500
) -> tuple[NDArray[np.bool_], dict[str, tuple[int, int]]]:
    """Bursty firings in which 1 implies 0 and 2 implies 1; and 4 takes the place of 3 in some rows of 3's concept.

    Gives the firings and, by name, the pairs (source, target) of both.
    """
    fired = nothing("bursty", n_documents, n_features, rng, rows)
    draws = rng.random((len(fired), 4))
    fired[:, 0] = draws[:, 0] < 0.2
    fired[:, 1] = fired[:, 0] & (draws[:, 1] < 0.4)
    fired[:, 2] = fired[:, 1] & (draws[:, 2] < 0.4)
    concept, instead = draws[:, 3] < 0.2, rng.random(len(fired)) < 0.3
    fired[:, 3], fired[:, 4] = concept & ~instead, concept & instead
    return fired, {"implication": (1, 0), "second": (2, 1), "absorber": (4, 3)}


def sample_of(fired: NDArray[np.bool_], rows: int = 500, block_rows: int = 1024) -> Sample:
    """Firings of documents of equal length as the sample of one half."""
    n_features = fired.shape[1]
    width = int(fired.sum(axis=1).max())
    features = np.where(fired, np.arange(n_features), n_features).astype(np.int32)
    documents = np.arange(len(fired)) // rows
    table = CodeTable(np.sort(features, axis=1)[:, :width].copy(), cut_blocks(documents, block_rows), n_features)
    places = np.zeros(len(fired), np.int64)
    return Sample(table, documents, places, places, int(documents[-1]) + 1)
