"""Splitting and absorption of labelled concepts: pure arrays in, values that merge out.

Chanin et al. 2024, "A is for Absorption: Studying Feature Splitting and Absorption in Sparse Autoencoders". **Splitting**: a
concept is followed by several features together better than by one; k features are taken for as long as one more raises the
F1 of "any of them fires" by more than 0.03 (theirs: a k-sparse probe; ours: a greedy union). These are the concept's *main*
features. **Absorption**: the concept is there, a linear probe of the row sees it, every main feature is silent, and another
feature stands in. Theirs must have the largest ablation effect; ours, as in SAEBench (Karvonen et al. 2025), must itself
carry at least 0.4 of the row's score along the probe, with a decoder direction that points along it by more than three
standard deviations of a random direction's cosine. Needs no run of the language model.

An implication (the child fires only where its parent does) is another thing: there the parent fires too, so no main feature
is silent and nothing is counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

SPLIT_GAIN = 0.03
CARRIED = 0.4
COSINE_DEVIATIONS = 3.0
RIDGE = 1e-3
SCORE_BINS = np.linspace(-4.0, 5.0, 451)
"""A row's score along a probe is 0 at the mean of rows without the concept and 1 at the mean of those with it."""

Counts = NDArray[np.int64]


@dataclass
class Patterns:
    """Which of up to 32 candidates fire together, for one concept: how many rows of each half show each pattern.

    A key is pattern · 4 + 2 · label + half, the pattern's bit i being candidate i. Sorted and unique.
    """

    keys: Counts
    rows: Counts

    @classmethod
    def of(cls, fired: NDArray[np.bool_], label: NDArray[np.bool_], half: NDArray[np.bool_]) -> Patterns:
        """`fired` (n, M), `label` and `half` (n,)."""
        pattern = fired.astype(np.int64) @ (1 << np.arange(fired.shape[1], dtype=np.int64))
        return cls(*np.unique(pattern * 4 + label.astype(np.int64) * 2 + half, return_counts=True))

    def merge(self, other: Patterns) -> Patterns:
        keys, place = np.unique(np.concatenate([self.keys, other.keys]), return_inverse=True)
        rows = np.zeros(len(keys), np.int64)
        np.add.at(rows, place, np.concatenate([self.rows, other.rows]))
        return Patterns(keys, rows)

    def union_score(self, candidates: list[int], half: int) -> tuple[float, float, float]:
        """(precision, recall, F1) of "any of these candidates fires" on one half."""
        mask = sum(1 << i for i in candidates)
        mine = (self.keys & 1) == half
        fires, holds = ((self.keys >> 2) & mask) != 0, ((self.keys >> 1) & 1) == 1
        hits = int(self.rows[mine & fires & holds].sum())
        n_fires, n_holds = int(self.rows[mine & fires].sum()), int(self.rows[mine & holds].sum())
        return hits / max(n_fires, 1), hits / max(n_holds, 1), 2 * hits / max(n_fires + n_holds, 1)


def greedy_union(patterns: Patterns, n_candidates: int, most: int) -> tuple[list[int], list[float]]:
    """Candidates in the order in which each raises the F1 of the union most on half 0, and that F1 after each.

    Ends at `most`, or where none raises it. Ties go to the candidate with the smaller number.
    """
    chosen: list[int] = []
    found: list[float] = []
    while len(chosen) < min(most, n_candidates):
        rest = [i for i in range(n_candidates) if i not in chosen]
        scores = [patterns.union_score([*chosen, i], 0)[2] for i in rest]
        best = int(np.argmax(scores))
        if scores[best] <= (found[-1] if found else 0.0):
            break
        chosen.append(rest[best])
        found.append(scores[best])
    return chosen, found


def n_main(f1: list[float]) -> int:
    """How many features of a greedy union are main: the first, and those after it that each raise F1 by more than 0.03.

    >>> n_main([0.6, 0.7, 0.72, 0.8])
    2
    """
    gains = np.diff(f1)
    short = np.flatnonzero(gains <= SPLIT_GAIN)
    return 0 if not f1 else 1 + int(short[0] if len(short) else len(gains))


class ProbeSums:
    """Sums over rows (n, d) and over those with each of L concepts: what a linear probe is made of. float64."""

    def __init__(self, n_concepts: int, d_model: int):
        self.n = 0
        self.total, self.products = np.zeros(d_model), np.zeros((d_model, d_model))
        self.n_present, self.present = np.zeros(n_concepts, np.int64), np.zeros((n_concepts, d_model))

    def update(self, rows: NDArray[np.floating], labels: sp.csr_array) -> None:
        """Rows (n, d) and where each concept holds (n, L) 0/1."""
        exact = rows.astype(np.float64)
        self.n += len(rows)
        self.total += exact.sum(axis=0)
        self.products += exact.T @ exact
        self.n_present += np.asarray(labels.sum(axis=0)).ravel().astype(np.int64)
        self.present += labels.T @ exact

    def merge(self, other: ProbeSums) -> ProbeSums:
        for name in ("n", "total", "products", "n_present", "present"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self

    def probes(self) -> Probes:
        """Fisher's linear discriminant of each concept: Σ⁻¹(μ₁ − μ₀) with the covariance of all rows, a ridge of 1e-3 of the
        mean variance added, scaled so that the two means score 1 apart. 0 where a concept is in no row, or in all."""
        n_absent = self.n - self.n_present
        absent = (self.total - self.present) / np.maximum(n_absent, 1)[:, None]
        difference = self.present / np.maximum(self.n_present, 1)[:, None] - absent
        mean = self.total / max(self.n, 1)
        covariance = self.products / max(self.n, 1) - np.outer(mean, mean)
        ridge = RIDGE * max(float(np.trace(covariance)) / len(mean), 1e-30)
        solved = np.linalg.solve(covariance + ridge * np.eye(len(mean)), difference.T).T
        apart = np.einsum("ld,ld->l", solved, difference)
        known = (self.n_present > 0) & (n_absent > 0) & (apart > 0)
        scale = np.where(known, 1 / np.where(known, apart, 1), 0.0)
        directions: NDArray[np.float64] = np.asarray(solved * scale[:, None], np.float64)
        return Probes(directions, np.asarray(np.einsum("ld,ld->l", directions, absent), np.float64))


@dataclass(frozen=True)
class Probes:
    """`directions` (L, d) and `offsets` (L,): a row's score for a concept is direction · row − offset."""

    directions: NDArray[np.float64]
    offsets: NDArray[np.float64]

    def scores(self, rows: NDArray[np.floating]) -> NDArray[np.float64]:
        """(n, L)."""
        projections: NDArray[np.float64] = rows.astype(np.float64) @ self.directions.T - self.offsets
        return projections

    def cosines(self, decoder: NDArray[np.floating]) -> NDArray[np.float64]:
        """(L, F) cosine of each decoder direction (F, d) with each probe's."""
        norms = np.linalg.norm(self.directions, axis=1)[:, None] * np.linalg.norm(decoder, axis=1)
        cosine: NDArray[np.float64] = self.directions @ decoder.T.astype(np.float64) / np.maximum(norms, 1e-30)
        return cosine

    def along(self, decoder: NDArray[np.floating]) -> NDArray[np.float64]:
        """(L, F) what a code of 1 adds to each score; 0 for directions that point along the probe by chance.

        That is, whose cosine is at most three standard deviations of a random direction's, 3 / sqrt(d).
        """
        bound = COSINE_DEVIATIONS / np.sqrt(decoder.shape[1])
        products: NDArray[np.float64] = self.directions @ decoder.T.astype(np.float64)
        return np.where(self.cosines(decoder) > bound, products, 0.0)


class ScoreHistogram:
    """How probes' scores are distributed in rows without and with each concept, on either half: (L, 2 halves, 2, bins)."""

    def __init__(self, n_concepts: int):
        self.counts = np.zeros((n_concepts, 2, 2, len(SCORE_BINS) + 1), np.int64)

    def update(self, scores: NDArray[np.float64], labels: NDArray[np.bool_], half: NDArray[np.bool_]) -> None:
        """Scores and labels (n, L), half (n,). Bin i holds scores in [edge i − 1, edge i)."""
        bins = np.searchsorted(SCORE_BINS, scores, side="right")
        width = self.counts.shape[-1]
        for concept, own in enumerate(self.counts):
            key = (half.astype(np.int64) * 2 + labels[:, concept]) * width + bins[:, concept]
            own += np.bincount(key, minlength=4 * width).reshape(own.shape)

    def merge(self, other: ScoreHistogram) -> ScoreHistogram:
        self.counts += other.counts
        return self

    def finalize(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(thresholds (L,) that give the best F1 on half 0, that F1 on half 1 (L,))."""
        above = np.cumsum(self.counts[..., ::-1], axis=-1)[..., ::-1][..., 1:]  # of scores >= each edge
        hits, fires = above[:, :, 1], above.sum(axis=2)
        f1 = 2 * hits / np.maximum(fires + self.counts[:, :, 1].sum(axis=-1)[..., None], 1)
        best = f1[:, 0].argmax(axis=-1)
        return SCORE_BINS[best], np.take_along_axis(f1[:, 1], best[:, None], axis=-1)[:, 0]


class Absorption:
    """How many rows have each concept (`present`), those in which the probe sees it (`seen`), those of them in which all
    main features are silent (`silent`), and those of these in which one other feature carries it (`absorbed`).

    `carriers` (L, F) counts which feature that is.
    """

    def __init__(self, n_concepts: int, n_features: int):
        self.present, self.seen, self.silent, self.absorbed = (np.zeros(n_concepts, np.int64) for _ in range(4))
        self.carriers = sp.csr_array((n_concepts, n_features), dtype=np.int64)

    def update(
        self,
        codes: sp.csr_array,
        labels: NDArray[np.bool_],
        scores: NDArray[np.float64],
        thresholds: NDArray[np.float64],
        mains: list[list[int]],
        along: NDArray[np.float64],
    ) -> None:
        """Add rows: `codes` (n, F) values, `labels` and probe `scores` (n, L), above `thresholds` (L,) the probe sees it.

        `mains` are each concept's main features (without any, it is left out); `along` (L, F) is `Probes.along`.
        """
        rows, columns = [], []
        for concept, main in enumerate(mains):
            if not main:
                continue
            here = labels[:, concept]
            seen = np.flatnonzero(here & (scores[:, concept] >= thresholds[concept]))
            silent = seen[np.asarray((codes[seen][:, main] > 0).sum(axis=1)).ravel() == 0]
            self.present[concept] += int(here.sum())
            self.seen[concept] += len(seen)
            self.silent[concept] += len(silent)
            carrier = strongest(codes[silent], along[concept], scores[silent, concept])
            carrier = carrier[carrier >= 0]
            self.absorbed[concept] += len(carrier)
            rows.append(np.full(len(carrier), concept))
            columns.append(carrier)
        if rows:
            row, column = np.concatenate(rows), np.concatenate(columns)
            self.carriers = self.carriers + sp.csr_array(
                (np.ones(len(row), np.int64), (row, column)), shape=self.carriers.shape
            )

    def merge(self, other: Absorption) -> Absorption:
        for name in ("present", "seen", "silent", "absorbed", "carriers"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self

    def rates(self) -> NDArray[np.float64]:
        """(L,) absorbed rows over those in which the probe sees the concept; nan where there is none."""
        return np.where(self.seen > 0, self.absorbed / np.maximum(self.seen, 1), np.nan)


def strongest(codes: sp.csr_array, along: NDArray[np.float64], scores: NDArray[np.float64]) -> NDArray[np.int64]:
    """(n,) the feature that adds most to each row's score, if that is at least 0.4 of it; else -1.

    A feature adds its value times `along` (F,). Nothing has a share of a score that is not positive.

    >>> codes = sp.csr_array(np.array([[2.0, 1.0, 0.0], [0.0, 1.0, 1.0], [2.0, 0.0, 0.0]]))
    >>> strongest(codes, np.array([0.5, 0.1, 0.1]), np.array([1.2, 1.0, -0.2])).tolist()
    [0, -1, -1]
    """
    carriers = np.full(codes.shape[0], -1, np.int64)
    if not codes.nnz:
        return carriers
    pairs = codes.tocoo()
    row, feature = (np.asarray(axis, np.int64) for axis in pairs.coords)
    added = pairs.data * along[feature]
    order = np.lexsort((feature, -added, row))
    first = order[np.r_[True, np.diff(row[order]) != 0]]
    own = scores[row[first]]
    first = first[(own > 0) & (added[first] > 0) & (added[first] >= CARRIED * own)]
    carriers[row[first]] = feature[first]
    return carriers
