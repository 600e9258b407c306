"""The units that are scored against rules: features of a code store, or dimensions of a site of an activation store.

A unit is one feature, one dimension in one of its signs, or one neuron. It fires where its value exceeds a threshold, of
which each unit has a few candidates: shares of a feature's peak, quantiles of a dimension, taken on the choosing half.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from actstore import paths
from actstore.open_place import absolute
from actstore.reader import ActivationStore, Shard, Store
from actstore.schema import PARTS
from pipelines.codes.code_store import CodeStore, read_codes
from pipelines.concepts.labels import SegmentLabels, shard_labels
from pipelines.concepts.rules import RuleScores, shard_rules
from pipelines.models.sites.registry import kind_of
from pipelines.models.sites.site import Site
from pipelines.shared.cluster import reduce_tasks, share

PEAK_SHARES = (0.0, 0.1, 0.2, 0.3, 0.45, 0.6)
"""Candidate thresholds of a feature, as shares of its peak on the choosing half."""
FIRING_SHARES = (0.3, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002)
"""Candidate thresholds of a dimension: the values above which it lies in these shares of the choosing half's rows."""
SAMPLE_ROWS = 100_000


@dataclass(frozen=True)
class ScoredUnits:
    """A code store's features (`site` None), or the dimensions of a site; pinned, and small enough to send to a worker."""

    name: str
    url: str
    snapshot: str
    site: str | None = None

    @classmethod
    def of(cls, store: Store, site: str | None = None, name: str = "") -> ScoredUnits:
        return cls(name or site or store.url, absolute(store.url), store.snapshot, site)

    def open(self) -> Store:
        """The store, opened once a process. Raises IdentityMismatch when another one lies there."""
        return _open(self.url, self.snapshot, self.site is None)

    @property
    def acts(self) -> str:
        """The row array of the site whose dimensions these are."""
        assert self.site is not None, "features are no site"
        return paths.acts(self.site)

    @property
    def is_signed(self) -> bool:
        """Whether a dimension counts in both signs. A neuron's activation, after its non-linearity, has one."""
        return self.site is not None and kind_of(Site.parse(self.site).name).is_signed

    @property
    def n_units(self) -> int:
        store = self.open()
        if self.site is None:
            assert isinstance(store, CodeStore)
            return store.n_features
        return store.manifest.d_model(self.site) * (1 + self.is_signed)

    def unit_name(self, unit: int) -> str:
        """A feature's or neuron's number; a dimension's with its sign."""
        if not self.is_signed:
            return str(unit)
        width = self.n_units // 2
        return f"+{unit}" if unit < width else f"-{unit - width}"

    def shards(self) -> list[Shard]:
        store = self.open()
        return [shard for part in PARTS for shard in store.shards(part)]

    def dense(self, shard: Shard, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """(n, U) values of rows of a shard of a site, the dimensions with their sign turned behind them as they are."""
        rows = self.open().read(shard, self.acts, start, stop)
        return np.concatenate([rows, -rows], axis=1) if self.is_signed else np.asarray(rows, np.float32)

    def sparse(self, shard: Shard) -> sp.csr_array:
        """(n, U) values of the codes of a shard that are above 0."""
        store = self.open()
        assert isinstance(store, CodeStore)
        indices, values = read_codes(store, shard)
        row, slot = np.nonzero(values > 0)
        return sp.csr_array((values[row, slot], (row, indices[row, slot])), shape=(shard.n_rows, store.n_features))

    def columns(self, shard: Shard, units: NDArray[np.int64]) -> NDArray[np.float32]:
        """(n, len(units)) values of some units over a shard's rows."""
        if self.site is None:
            return np.asarray(self.sparse(shard)[:, units].toarray(), np.float32)
        return self.dense(shard)[:, units]

    def fired(self, shard: Shard, thresholds: NDArray[np.float64]) -> list[sp.csr_array]:
        """For each of the thresholds (T, U), (n, U) 0/1: where each unit exceeds its own."""
        if self.site is not None:
            values = self.dense(shard)
            return [sp.csr_array((values > bounds).astype(np.int64)) for bounds in thresholds]
        entries = self.sparse(shard).tocoo()
        row, unit = entries.coords
        above = [entries.data > bounds[unit] for bounds in thresholds]
        return [sp.csr_array((np.ones(int(m.sum()), np.int64), (row[m], unit[m])), shape=entries.shape) for m in above]


@lru_cache(maxsize=6)
def _open(url: str, snapshot: str, is_codes: bool) -> Store:
    return (CodeStore if is_codes else ActivationStore)(url, snapshot=snapshot)


def shard_tasks(scored: ScoredUnits, labels: list[Any]) -> list[tuple[Any, ...]]:
    """(scored, shard, labels of its segment) for every shard; `labels` may be futures of them."""
    return [(scored, shard, labels[shard.segment]) for shard in scored.shards()]


def choose_thresholds(scored: ScoredUnits, labels: list[Any], client: Any) -> NDArray[np.float64]:
    """(T, U) candidate thresholds of every unit, from the choosing half."""
    if scored.site is None:
        peaks = reduce_tasks(client, "peaks", half_peaks, np.maximum, shard_tasks(scored, labels))
        return np.outer(PEAK_SHARES, peaks)
    shards = scored.open().shards() or scored.shards()
    n_rows = -(-2 * SAMPLE_ROWS // len(shards))  # about half of them are of the choosing half
    tasks = [(scored, shard, labels[shard.segment], n_rows) for shard in shards]
    sample = reduce_tasks(client, "sample", half_sample, _joined, tasks)
    quantiles: NDArray[np.float64] = np.quantile(sample, [1 - share for share in FIRING_SHARES], axis=0)
    return quantiles


def half_peaks(scored: ScoredUnits, shard: Shard, labels: SegmentLabels) -> NDArray[np.float64]:
    """(U,) largest value of each feature over a shard's rows of half 0. Runs on a worker."""
    _, half = shard_labels(scored.open(), shard, labels)
    peaks = np.zeros(scored.n_units)
    entries = scored.sparse(shard)[np.flatnonzero(~half)].tocoo()
    np.maximum.at(peaks, entries.coords[1], entries.data.astype(np.float64))
    return peaks


def half_sample(scored: ScoredUnits, shard: Shard, labels: SegmentLabels, n_rows: int) -> NDArray[np.float32]:
    """Values of those of a shard's first rows that are of half 0. Runs on a worker.

    The first rows of a shard are a uniform sample of it: rows are permuted inside shards.
    """
    _, half = shard_labels(scored.open(), shard, labels)
    return scored.dense(shard, 0, n_rows)[~half[:n_rows]]


def _joined(one: NDArray[Any], other: NDArray[Any]) -> NDArray[Any]:
    return np.concatenate([one, other])


def score_rules(
    scored: ScoredUnits, labels: list[Any], thresholds: NDArray[np.float64], n_vocabulary: int, client: Any
) -> RuleScores:
    """Every unit against every label, and, where a vocabulary is given, against tokens and tokens before."""
    shared = share(client, thresholds)
    tasks = [(*task, shared, n_vocabulary) for task in shard_tasks(scored, labels)]
    scores: RuleScores = reduce_tasks(client, "rules", score_shard, RuleScores.merge, tasks)
    return scores


def score_shard(
    scored: ScoredUnits, shard: Shard, labels: SegmentLabels, thresholds: NDArray[np.float64], n_vocabulary: int
) -> RuleScores:
    """The rule scores of one shard. Runs on a worker."""
    store = scored.open()
    if n_vocabulary:
        rules, half = shard_rules(store, shard, labels, n_vocabulary)
    else:
        rules, half = shard_labels(store, shard, labels)
    scores = RuleScores(scored.n_units, rules.shape[1], len(thresholds))
    scores.update(scored.fired(shard, thresholds), rules, half)
    return scores
