"""Activations of known features in superposition, against which a trained SAE can be measured.

A row is Σ_j magnitude_j · direction_j over the few features j that fire in it, plus noise (Elhage et al. 2022, "Toy
models of superposition"; Sharkey et al. 2022, "Taking features out of superposition"). Everything is a pure function
of the description and the row's number: each block of rows draws from counter-based streams of its own, so any shard
can be computed by anyone. Words are the same everywhere, rows to the rounding of a machine's log, cos and matrix product.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, vstack

from actstore.errors import InputError
from actstore.files import content_hash
from actstore.plan import raw_words
from actstore.reader import Store
from actstore.schema import CorpusIdentity
from pipelines.stores.made.made_store import write_made_store

DIRECTIONS, GATES, MEMBERS, MAGNITUDES, NOISE = range(101, 106)
"""Purposes of the random streams, apart from those of `actstore.plan`."""
BLOCK_ROWS = 1024
MOST_OFTEN = 0.25
"""No group fires in more than this share of the rows, however steep the Zipf law: a dense feature is another problem."""
FRAME_STEPS = 10
KINDS = ("independent", "groups", "hierarchy")
MAGNITUDE_LAWS = ("folded_normal", "lognormal")
LOGNORMAL_SIGMA = 0.5
CORPUS_PREFIX = "superposition:"


@dataclass(frozen=True)
class Superposition:
    """Which features there are, how often they fire and how strongly.

    Features come in groups of `group_size`, numbered one group after another. A group is drawn first, with a frequency
    ∝ rank^-zipf; then each of its features fires with probability `within`. `independent`: groups of one, which always
    fires. `groups`: members fire together but have no parent. `hierarchy`: the first feature of a group is the parent,
    which fires whenever its group is drawn; the others are its children, which fire only where it does.

    `k` is the mean number of features that fire in a row. Magnitudes have mean square 1, `noise` is the deviation of each
    channel. `near_orthogonal` makes the directions orthonormal where d_model allows it, else a unit-norm tight frame,
    whose mean squared cosine is the least there is (Welch 1974).

    >>> truth = Superposition(d_model=16, n_features=32, k=3)
    >>> rows = truth.rows(0, 5000)
    >>> rows.shape, bool((truth.rows(2000, 2010) == rows[2000:2010]).all())
    ((5000, 16), True)
    """

    d_model: int
    n_features: int
    k: float
    kind: str = "independent"
    group_size: int = 1
    within: float = 1.0
    zipf: float = 1.0
    magnitudes: str = "lognormal"
    noise: float = 0.01
    near_orthogonal: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS or self.magnitudes not in MAGNITUDE_LAWS:
            raise InputError(
                f"kind {self.kind!r}, magnitudes {self.magnitudes!r}: choose from {', '.join(KINDS)} and from "
                f"{', '.join(MAGNITUDE_LAWS)}."
            )
        if min(self.d_model, self.n_features, self.group_size) < 1 or self.n_features % self.group_size:
            raise InputError(
                f"d_model {self.d_model}, {self.n_features} features in groups of {self.group_size}: at least 1 of each, "
                "and only whole groups."
            )
        if (self.group_size > 1) != (self.kind != "independent"):
            raise InputError(f"kind {self.kind}, group size {self.group_size}: independent features are groups of 1.")
        if not 0 < self.within <= 1 or self.noise < 0 or self.zipf < 0 or self.seed < 0:
            raise InputError(
                f"within {self.within}, noise {self.noise}, zipf {self.zipf}, seed {self.seed}: within is in (0, 1], the "
                "others are at least 0."
            )
        most = MOST_OFTEN * self.n_groups * float(self._member_rates.sum())
        if not 0 < self.k <= most:
            raise InputError(f"k {self.k}: these features can fire at most {most:g} at a time; choose k in (0, {most:g}].")

    @property
    def n_groups(self) -> int:
        return self.n_features // self.group_size

    @property
    def parents(self) -> NDArray[np.int64]:
        """(n_features,) the parent of each feature; -1 for those without."""
        feature = np.arange(self.n_features)
        first = feature - feature % self.group_size
        return np.where((first < feature) & (self.kind == "hierarchy"), first, -1)

    @property
    def frequencies(self) -> NDArray[np.float64]:
        """(n_features,) the probability that each feature fires in a row."""
        return np.outer(self._group_rates, self._member_rates).ravel()

    @cached_property
    def directions(self) -> NDArray[np.float32]:
        """(n_features, d_model) unit vectors, uniform on the sphere before they are made near-orthogonal."""
        drawn = _normals(self.n_features * self.d_model, self.seed, DIRECTIONS).astype(np.float64)
        unit = _unit(drawn.reshape(self.n_features, self.d_model))
        for _ in range(FRAME_STEPS if self.near_orthogonal else 0):
            left, _, right = np.linalg.svd(unit, full_matrices=False)
            unit = _unit(left @ right)
        return unit.astype(np.float32)

    def codes(self, start: int, stop: int) -> csr_matrix:
        """(stop - start, n_features) float32: the magnitude with which each feature fires in rows [start, stop)."""
        if not 0 <= start < stop:
            raise InputError(f"rows {start} to {stop}: need 0 <= start < stop.")
        blocks = range(start // BLOCK_ROWS, -(-stop // BLOCK_ROWS))
        first = blocks.start * BLOCK_ROWS
        return vstack([self._block_codes(block) for block in blocks], format="csr")[start - first : stop - first]

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """(stop - start, d_model): the activations of rows [start, stop)."""
        made = np.asarray(self.codes(start, stop) @ self.directions, np.float32)
        if self.noise:
            blocks = range(start // BLOCK_ROWS, -(-stop // BLOCK_ROWS))
            drawn = [_normals(BLOCK_ROWS * self.d_model, self.seed, NOISE, block) for block in blocks]
            first = start - blocks.start * BLOCK_ROWS
            noise = np.concatenate(drawn).reshape(-1, self.d_model)[first : first + stop - start]
            made += np.float32(self.noise) * noise
        return made

    def _block_codes(self, block: int) -> csr_matrix:
        shape = (BLOCK_ROWS, self.n_groups)
        drawn = _words32(BLOCK_ROWS * self.n_groups, self.seed, GATES, block).reshape(shape)
        fires = np.repeat(drawn < _threshold(self._group_rates), self.group_size, axis=1)
        if self.group_size > 1:
            words = _words32(fires.size, self.seed, MEMBERS, block).reshape(fires.shape)
            fires &= words < np.tile(_threshold(self._member_rates), self.n_groups)
        codes = csr_matrix(fires, dtype=np.float32)
        normal = _normals(codes.nnz, self.seed, MAGNITUDES, block)
        if self.magnitudes == "folded_normal":
            codes.data = np.abs(normal)
        else:
            codes.data = np.exp(np.float32(LOGNORMAL_SIGMA) * normal - np.float32(LOGNORMAL_SIGMA**2))
        return codes

    @property
    def _member_rates(self) -> NDArray[np.float64]:
        """(group_size,) the probability that each feature of a group that was drawn fires."""
        rates = np.full(self.group_size, self.within if self.group_size > 1 else 1.0)
        if self.kind == "hierarchy":
            rates[0] = 1.0
        return rates

    @cached_property
    def _group_rates(self) -> NDArray[np.float64]:
        """(n_groups,) ∝ rank^-zipf, cut off at MOST_OFTEN, such that k features fire in the mean."""
        law = np.arange(1, self.n_groups + 1) ** -self.zipf
        asked = self.k / self._member_rates.sum()
        low, high = 0.0, MOST_OFTEN / law[-1]
        for _ in range(100):  # bisection, to the last bit
            middle = (low + high) / 2
            low, high = (middle, high) if np.minimum(MOST_OFTEN, middle * law).sum() < asked else (low, middle)
        return np.minimum(MOST_OFTEN, high * law)


def write_synthetic_store(path: Path, truth: Superposition, n_rows: int, n_heldout: int = 0, encoding: str = "fp32") -> Path:
    """Rows [0, n_rows) as a store's training split, the next `n_heldout` as its held-out one; returns `path`.

    The description is the corpus of the store's manifest, from which `truth_of` takes it; for other tools the directions
    themselves lie in the table `truth/directions`.
    """
    corpus = CorpusIdentity(CORPUS_PREFIX + json.dumps(asdict(truth), sort_keys=True), content_hash(asdict(truth)))
    tables = {"truth/directions": truth.directions}
    return write_made_store(
        path, truth.rows, n_rows, n_heldout, corpus=corpus, encoding=encoding, seed=truth.seed, tables=tables
    )


def truth_of(store: Store) -> Superposition:
    """The features that a store was made of. Raises InputError when it was not made by `write_synthetic_store`."""
    spec = store.manifest.corpus.spec
    if not spec.startswith(CORPUS_PREFIX):
        raise InputError(f"{store.url}: holds rows of {spec}, whose true features nobody knows; pass a synthetic store.")
    return Superposition(**json.loads(spec.removeprefix(CORPUS_PREFIX)))


def _words32(n: int, seed: int, purpose: int, *index: int) -> NDArray[np.uint32]:
    """`n` random 32-bit words, the low half of each 64-bit word first."""
    return raw_words(-(-n // 2), seed, purpose, *index).astype("<u8", copy=False).view("<u4")[:n]


def _threshold(rates: NDArray[np.float64]) -> NDArray[np.uint64]:
    """A 32-bit word is below it with probability `rates`."""
    return np.round(rates * 2.0**32).astype(np.uint64)


def _normals(n: int, seed: int, purpose: int, *index: int) -> NDArray[np.float32]:
    """`n` standard normal numbers, by Box and Muller 1958: a pair of 32-bit words gives a pair of numbers."""
    words = _words32(2 * -(-n // 2), seed, purpose, *index).astype(np.float32).reshape(-1, 2)
    radius = np.sqrt(-2 * np.log((words[:, 0] + np.float32(1)) * np.float32(2.0**-32)))
    angle = words[:, 1] * np.float32(2 * np.pi * 2.0**-32)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()[:n]


def _unit(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float64)
