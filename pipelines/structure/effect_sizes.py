"""Effect sizes of chosen pairs on one half, each with an interval over resampled documents."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.statistics import association
from pipelines.structure.null import CodeTable, Pairs
from pipelines.structure.sample import Sample
from pipelines.structure.significance import TINY

RESAMPLES = 400
GROUP_BYTES = 128 << 20


def by_documents(sample: Sample, pairs: Pairs) -> Iterator[tuple[slice, NDArray[np.float64], NDArray[np.float64]]]:
    """(documents, counts, expectation) of some documents at a time, both (documents, P).

    The expectation is each document's hypergeometric one, block by block; only its shares between documents are used.
    """
    wanted = pairs.key(pairs.left, pairs.right)
    step = max(1, GROUP_BYTES // (16 * max(len(pairs), 1)))
    bounds = np.searchsorted(sample.documents, np.arange(sample.n_documents + 1))
    for first in range(0, sample.n_documents, step):
        last = min(first + step, sample.n_documents)
        counts, expected = np.zeros((last - first, len(pairs))), np.zeros((last - first, len(pairs)))
        for document in range(first, last):
            rows = slice(bounds[document], bounds[document + 1])
            table = CodeTable(sample.table.features[rows], sample.table.blocks[rows], sample.table.n_features)
            for keys in pairs.keys(table):
                keys.sort()
                counts[document - first] += np.searchsorted(keys, wanted, side="right") - np.searchsorted(keys, wanted)
            fires, n_rows = table.block_counts(pairs.features)
            for own, n in zip(fires, n_rows, strict=True):
                expected[document - first] += own[pairs.left] * own[pairs.right] / n
        yield slice(first, last), counts, expected


def lift_intervals(
    sample: Sample, pairs: Pairs, mean: NDArray[np.float64], seed: int, groups: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """95 % intervals of each pair's count over its expectation in the null, `mean`, documents drawn with replacement.

    With `groups`, (P,) numbers from 0, of the sums over each group of pairs.
    """
    picks = np.random.default_rng((seed, 1)).integers(0, sample.n_documents, (RESAMPLES, sample.n_documents))
    weights = np.zeros((RESAMPLES, sample.n_documents))
    np.add.at(weights, (np.arange(RESAMPLES)[:, None], picks), 1)
    n = len(pairs) if groups is None else int(groups.max(initial=-1)) + 1
    numerator, denominator, total = np.zeros((RESAMPLES, n)), np.zeros((RESAMPLES, n)), np.zeros(n)
    for documents, counts, expected in by_documents(sample, pairs):
        if groups is not None:
            counts, expected = (_grouped(values, groups, n) for values in (counts, expected))
        numerator += weights[:, documents] @ counts
        denominator += weights[:, documents] @ expected
        total += expected.sum(axis=0)
    of_null = mean if groups is None else np.bincount(groups, weights=mean, minlength=n).astype(np.float64)
    lifts = numerator / np.maximum(denominator * (of_null / np.maximum(total, TINY)), TINY)
    low, high = np.quantile(lifts, [0.025, 0.975], axis=0)
    return low, high


def _grouped(values: NDArray[np.float64], groups: NDArray[np.int64], n: int) -> NDArray[np.float64]:
    return np.stack([np.bincount(groups, weights=row, minlength=n) for row in values])


def effect_columns(table: CodeTable, pairs: Pairs, counts: NDArray[np.int64], mean: NDArray[np.float64]) -> dict[str, Any]:
    """Effect sizes of pairs by name, (P,) each, NaN where a feature never fires; null_… are of the expectation."""
    left, right = (table.fires[ids] for ids in pairs.ids)
    n = table.n_rows
    return {
        "phi": association.phi(counts, left, right, n),
        "null_phi": association.phi(mean, left, right, n),
        "npmi": association.npmi(counts, left, right, n),
        "null_npmi": association.npmi(mean, left, right, n),
        "jaccard": association.jaccard(counts, left, right),
        "right_given_left": association.conditional(counts, left),
        "left_given_right": association.conditional(counts, right),
    }
