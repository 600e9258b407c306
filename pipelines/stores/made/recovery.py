"""How much of a known dictionary an SAE has found: its decoder directions and its codes against the truth.

Pure functions of arrays. `decoder` is (F, d_model) and `truth` (n, d_model), one direction a row, of any length;
`fired` and `true_codes` are (rows, F) and (rows, n) sparse, over the same rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csc_matrix, csr_matrix

RECALL_COSINE = 0.9
SPLIT_COSINE = 0.7
"""Within 45 degrees, about: nearer to this true direction than to any that is orthogonal to it."""
ABSORBED_COSINE, ABSORBED_PROJECTION, ABSORBED_SHARE = 0.1, 0.4, 0.5

Matrix = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Recovery:
    """Figures of one dictionary: means over all true features, then counts of dictionary, true and child features."""

    mmcs: float
    matched_cosine: float
    recall: float
    n_dead: int
    n_split: int
    n_absorbed: int
    l0: float


def measure(
    decoder: NDArray[np.floating], codes: csr_matrix, truth: NDArray[np.floating], true_codes: csr_matrix, parents: Ints
) -> Recovery:
    """Every figure at once. `codes` are the SAE's, (rows, F); `parents` (n,) names each true feature's, -1 for none."""
    cosines = cosine_matrix(decoder, truth)
    dead = dead_features(codes)
    latent, cosine = match(cosines)
    absorbed = absorbed_share(decoder, codes, truth, true_codes, parents, latent) >= ABSORBED_SHARE
    return Recovery(
        mmcs=mean_max_cosine(cosines),
        matched_cosine=float(cosine.mean()),
        recall=recall(cosines),
        n_dead=int(dead.sum()),
        n_split=int(split_features(cosines[~dead]).sum()),
        n_absorbed=int(absorbed.sum()),
        l0=float((codes > 0).sum() / codes.shape[0]),
    )


def cosine_matrix(decoder: NDArray[np.floating], truth: NDArray[np.floating]) -> Matrix:
    """(F, n) cosine of each dictionary direction with each true one; 0 where a direction has no length.

    >>> cosine_matrix(np.array([[2.0, 0.0], [0.0, 0.0]]), np.array([[1.0, 1.0]])).round(3).tolist()
    [[0.707], [0.0]]
    """
    left, right = (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12) for rows in (decoder, truth))
    return np.asarray(left @ right.T, np.float64)


def mean_max_cosine(cosines: Matrix) -> float:
    """MMCS of Sharkey et al. 2022: the mean, over true features, of the largest cosine any dictionary direction has.

    One dictionary direction may serve several true features: `match` is stricter.
    """
    return float(cosines.max(axis=0).mean())


def match(cosines: Matrix) -> tuple[Ints, Matrix]:
    """The one-to-one assignment with the largest sum of cosines (Kuhn 1955): a dictionary feature for each true one.

    Gives (n,) indices and (n,) cosines; -1 and 0 where the dictionary is too small for all.
    """
    rows, columns = linear_sum_assignment(cosines, maximize=True)
    latent, cosine = np.full(cosines.shape[1], -1, np.int64), np.zeros(cosines.shape[1])
    latent[columns], cosine[columns] = rows, cosines[rows, columns]
    return latent, cosine


def recall(cosines: Matrix, threshold: float = RECALL_COSINE) -> float:
    """The share of true features to which some dictionary direction has at least this cosine."""
    return float((cosines.max(axis=0) >= threshold).mean())


def dead_features(codes: csr_matrix) -> NDArray[np.bool_]:
    """(F,) dictionary features that fire in none of the rows."""
    return np.asarray((codes > 0).sum(axis=0) == 0).ravel()


def split_features(cosines: Matrix, threshold: float = SPLIT_COSINE) -> NDArray[np.bool_]:
    """(n,) true features that two or more dictionary features share (feature splitting, Bricken et al. 2023).

    A dictionary feature counts for the true one it has its largest cosine with, and where that cosine is at least the
    threshold. Pass only features that are alive.
    """
    if not len(cosines):
        return np.zeros(cosines.shape[1], bool)
    nearest = cosines.argmax(axis=1)[cosines.max(axis=1) >= threshold]
    return np.asarray(np.bincount(nearest, minlength=cosines.shape[1]) > 1)


def absorbed_share(
    decoder: NDArray[np.floating],
    codes: csr_matrix,
    truth: NDArray[np.floating],
    true_codes: csr_matrix,
    parents: Ints,
    latent: Ints,
) -> Matrix:
    """(n,) the share of a child's rows in which its dictionary feature does its parent's work; 0 without a parent.

    Full absorption as Chanin et al. 2024 ("A is for absorption") have it and SAEBench measures it, with the known
    features in place of probes: the parent truly fires, its main dictionary feature (`latent`, from `match`) does
    not, and another one accounts for it. That other one is here the child's main feature: it fires, its direction has
    a cosine of at least 0.1 with the parent's, and what it adds along that is at least 0.4 of the parent's true code.
    A child is absorbing, and `n_absorbed` counts it, where that is so in at least half of the rows in which it fires.
    """
    sae, true = csc_matrix(codes), csc_matrix(true_codes)
    share = np.zeros(len(truth))
    for child in np.flatnonzero(parents >= 0):
        own, main = latent[child], latent[parents[child]]
        if own < 0 or main < 0:
            continue
        direction = truth[parents[child]] / np.linalg.norm(truth[parents[child]])
        along = float(decoder[own] @ direction)
        rows = true[:, child].indices
        if not len(rows) or along < ABSORBED_COSINE * np.linalg.norm(decoder[own]):
            continue
        silent = sae[:, main].toarray().ravel()[rows] <= 0
        code = sae[:, own].toarray().ravel()[rows]
        asked = true[:, parents[child]].toarray().ravel()[rows] * np.linalg.norm(truth[parents[child]])
        share[child] = (silent & (code > 0) & (code * along >= ABSORBED_PROJECTION * asked)).mean()
    return share
