"""Firings kept to be looked at: a few of each feature, or of each stratum of its strength, chosen by a rank."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from pipelines.statistics.block import CodeBlock
from pipelines.statistics.firing_table import stable_order
from pipelines.statistics.statistic import Arrays, Extent, Tile, TiledStatistic
from pipelines.statistics.value_bins import value_bins

COLUMNS = {
    "feature": np.int32,
    "stratum": np.uint16,
    "rank": np.uint32,
    "value": np.float32,
    "window": np.int64,
    "position": np.int32,
}


class KeptFirings(TiledStatistic):
    """The `n` firings of the smallest rank of each (feature, stratum); ties go to the earlier window and position.

    What a tile says of its features are all their kept firings; nothing is written.
    """

    columns = tuple(COLUMNS)

    def __init__(self, n: int):
        self.n = n
        self.clear()

    def merge(self, other: Any) -> Any:
        return self.add_kept(other.finalize())

    def add_kept(self, *columns: Arrays) -> Any:
        """Merge what others kept, as their `finalize` gives it."""
        self._keep(**{name: np.concatenate([getattr(self, name), *(c[name] for c in columns)]) for name in COLUMNS})
        return self

    def clear(self) -> None:
        """Forget all firings."""
        for name, dtype in COLUMNS.items():
            setattr(self, name, np.empty(0, dtype))

    def take(self, n_features: int) -> Arrays:
        kept = self.finalize()
        self.clear()
        starts = np.searchsorted(kept["feature"], np.arange(n_features + 1)).astype(np.int64)
        return kept | {"starts": starts}

    def add(self, features: slice, parts: Iterable[Arrays]) -> None:
        self.add_kept(*parts)

    def tile(self, features: slice) -> Tile:
        return Tile({}, self.finalize())

    def finalize(self) -> Arrays:
        """Columns of equal length, by feature, stratum and rank: feature, stratum, rank, value, window, position."""
        return {name: getattr(self, name) for name in COLUMNS}

    def _add(self, **columns: NDArray[Any]) -> None:
        """Firings in the order of (window, position): first what of them alone is kept, then beside what was."""
        order = stable_order(columns["feature"], columns["stratum"], columns["rank"])
        chosen = order[_place_in_group(columns["feature"][order], columns["stratum"][order]) < self.n]
        new = {name: column[chosen] for name, column in columns.items()}
        self._keep(**{name: np.concatenate([getattr(self, name), new[name]]) for name in COLUMNS})

    def _keep(self, **columns: NDArray[Any]) -> None:
        order = stable_order(*(columns[name] for name in ("feature", "stratum", "rank", "window", "position")))
        chosen = order[_place_in_group(columns["feature"][order], columns["stratum"][order]) < self.n]
        for name in COLUMNS:
            setattr(self, name, columns[name][chosen])


class SampledExamples(KeptFirings):
    """`n` random firings of each stratum of each feature: those with the smallest hash of (seed, feature, row).

    `edges` (F, strata - 1) are bins of `value_bins`: stratum s holds firings in bins above edge s - 1, up to edge s. Without
    edges there is one stratum, and the firings are a uniform sample of all. Any split of the rows gives the same ones.
    """

    def __init__(self, n: int, seed: int, edges: NDArray[np.int64] | None = None):
        super().__init__(n)
        self.seed, self.edges = seed, edges

    @classmethod
    def make(cls, extent: Extent) -> Self:
        return cls(extent.n_random, extent.seed)

    def update(self, block: CodeBlock) -> None:
        row, feature, value = ordered_firings(block)
        rank = firing_hash(self.seed, feature, block.windows[row], block.positions[row])
        columns = firing_columns(block, row, feature, value, rank)
        if self.edges is not None:
            columns["stratum"] = (value_bins(value)[:, None] > self.edges[feature]).sum(axis=1, dtype=np.uint16)
        self._add(**columns)


def firing_hash(
    seed: int, feature: NDArray[np.int64], window: NDArray[np.int64], position: NDArray[np.int64]
) -> NDArray[np.int64]:
    """32 mixed bits of each (seed, feature, window, position): the finaliser of splitmix64 (Steele et al. 2014), in turn."""
    state = np.full(len(feature), seed & 0xFFFFFFFFFFFFFFFF, np.uint64)
    for part in (feature, window, position):
        state = (state ^ part.astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return (state >> np.uint64(32)).astype(np.int64)


def ordered_firings(block: CodeBlock) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """(row, feature, value) of a block's firings in the order of (window, position)."""
    row, feature, value = block.firings
    if block.rows_are_sorted:
        return row, feature, value
    place = np.empty(len(block.indices), np.int64)
    place[np.lexsort((block.positions, block.windows))] = np.arange(len(place))
    order = np.argsort(place[row], kind="stable")
    return row[order], feature[order], value[order]


def firing_columns(
    block: CodeBlock, row: NDArray[np.int64], feature: NDArray[np.int64], value: NDArray[np.float32], rank: NDArray[np.int64]
) -> Arrays:
    """`COLUMNS` of some firings of a block, all of stratum 0."""
    columns: Arrays = {
        "feature": feature,
        "stratum": np.zeros(len(row), np.uint16),
        "rank": rank,
        "value": value,
        "window": block.windows[row],
        "position": block.positions[row],
    }
    return {name: column.astype(COLUMNS[name], copy=False) for name, column in columns.items()}


def is_new(*keys: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Where any of some sorted columns changes; True at the first place."""
    changes = np.zeros(len(keys[0]), bool)
    changes[:1] = True
    for key in keys:
        changes[1:] |= key[1:] != key[:-1]
    return changes


def _place_in_group(*keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """0, 1, 2, ... inside each run of equal keys."""
    starts = np.flatnonzero(is_new(*keys))
    return np.arange(len(keys[0])) - np.repeat(starts, np.diff(starts, append=len(keys[0])))
