"""All registered statistics at once: what one task computes of one shard."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipelines.statistics import CodeBlock, Extent, statistics
from pipelines.statistics.statistic import Arrays, DenseStatistic, TiledStatistic

T = TypeVar("T")


class Survey:
    """Every statistic of some rows: `survey["counts"]` and so on; `dense` and `tiled` are the two forms, by name."""

    def __init__(self, extent: Extent):
        self._n_features = extent.n_features
        made = {name: kind.make(extent) for name, kind in statistics().items()}
        self.dense = {name: one for name, one in made.items() if isinstance(one, DenseStatistic)}
        self.tiled = {name: one for name, one in made.items() if isinstance(one, TiledStatistic)}

    def __getitem__(self, name: str) -> Any:
        return self.dense[name] if name in self.dense else self.tiled[name]

    def update(self, block: CodeBlock) -> None:
        for one in (*self.dense.values(), *self.tiled.values()):
            one.update(block)

    def merge(self, other: Survey) -> Survey:
        for own, others in ((self.dense, other.dense), (self.tiled, other.tiled)):
            for name, one in own.items():
                one.merge(others[name])
        return self

    def take_arrays(self) -> Arrays:
        """All statistics as one-dimensional arrays, named STATISTIC/ARRAY. Each tiled statistic is cleared once its arrays
        are made: both forms of all statistics at once would be the largest memory of a task."""
        arrays = {f"{name}/{key}": array for name, one in self.dense.items() for key, array in one.state().items()}
        for name, one in self.tiled.items():
            arrays |= {f"{name}/{key}": array for key, array in one.take(self._n_features).items()}
        return arrays

    def load_dense(self, read: Callable[[str], NDArray[Any]]) -> Survey:
        """The dense statistics, as `read(name)` gives the arrays of `take_arrays`; the tiled ones stay empty."""
        for name, one in self.dense.items():
            one.load({key: read(f"{name}/{key}") for key in one.state()})
        return self


def tiled_part(name: str, kind: type[TiledStatistic], features: slice, read: Callable[..., NDArray[Any]]) -> Arrays:
    """What a tiled statistic left of some features, as `read(name, start, stop)` gives elements of `take_arrays`."""
    starts = read(f"{name}/starts", features.start, features.stop + 1)
    first, last = int(starts[0]), int(starts[-1])
    return {"starts": np.asarray(starts)} | {key: read(f"{name}/{key}", first, last) for key in kind.columns}


def facts_of(statistic: str, facts: Arrays) -> Arrays:
    """One statistic's facts, of those of all, which are named STATISTIC/FACT."""
    return {name.removeprefix(f"{statistic}/"): values for name, values in facts.items() if name.startswith(f"{statistic}/")}


def merged(left: T, right: T) -> T:
    """`left.merge(right)` of a copy: a task whose worker died may be run again on the same inputs."""
    merge: Any = deepcopy(left)
    return merge.merge(right)
