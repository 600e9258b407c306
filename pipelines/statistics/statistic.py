"""What `analyze` needs to know of a statistic: how it is made, updated, merged, kept by shard, and written.

A statistic is a class in a file of `pipelines/statistics/of_codes/`, of one of two forms. What is small whatever the corpus
is a `DenseStatistic`: tasks return it, and it is merged in a tree. What grows with the corpus lies by feature and is a
`TiledStatistic`: each shard's part is left on disk, and a task adds up all shards' parts of some features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from pipelines.statistics.block import CodeBlock

Arrays = dict[str, NDArray[Any]]
FEATURES = "features"
"""The group of an analysis that holds one entry a feature in each array."""


@dataclass(frozen=True)
class Extent:
    """What a statistic is made for: how many there are of everything that is counted, and what is kept of the rest.

    `n_examples` strongest and `n_random` random firings of each feature are kept, the latter drawn by `seed`.
    """

    n_features: int
    k: int
    n_vocabulary: int
    context: int
    n_documents: int
    n_parts: int
    n_examples: int = 0
    n_random: int = 0
    seed: int = 0


class Statistic(ABC):
    """A value that rows are added to, and other values of other rows.

    `name` is unique among the registered ones. `arrays` are the full names, such as "features/fires", of what the statistic
    writes whole; an analysis opened for reading has them as `arrays_of(name)`.
    """

    name: ClassVar[str]
    arrays: ClassVar[tuple[str, ...]] = ()

    @classmethod
    @abstractmethod
    def make(cls, extent: Extent) -> Self:
        """The statistic of no rows."""

    @abstractmethod
    def update(self, block: CodeBlock) -> None:
        """Add rows."""

    @abstractmethod
    def merge(self, other: Any) -> Any:
        """Add the rows of another value of the same extent; returns this one. The order of merging changes no integer."""


class DenseStatistic(Statistic):
    """A statistic of few numbers: all its attributes are arrays or numbers, which is what a partial result holds."""

    @abstractmethod
    def finalize(self) -> Arrays:
        """The arrays to be written, by their full names: those of `arrays`."""

    def state(self) -> Arrays:
        """Every attribute as a one-dimensional array."""
        return {name: np.ravel(value) for name, value in vars(self).items()}

    def load(self, state: Arrays) -> None:
        """Take over what `state` gave of a statistic of the same extent."""
        for name, own in vars(self).items():
            array = state[name].reshape(np.shape(own))
            setattr(self, name, array if isinstance(own, np.ndarray) else array.item())


class Tile(NamedTuple):
    """What a tiled statistic says of some features: `arrays` to be written under the tile's own name, and `facts`.

    Facts are one-dimensional; those of all tiles, one after another, are what `feature_arrays` is given.
    """

    arrays: Arrays
    facts: Arrays


class TiledStatistic(Statistic):
    """A statistic of lists by feature, of any length.

    `columns` are the names of its lists in a partial result. A statistic that `writes_table` writes a sparse table of
    counts in CSR form (`starts`, `columns`, `count`), which an analysis opened for reading has as `table(name)`.
    """

    columns: ClassVar[tuple[str, ...]]
    writes_table: ClassVar[bool] = False

    @classmethod
    def n_columns(cls, extent: Extent) -> int:
        """Columns of the table, where it has one."""
        return 0

    @abstractmethod
    def take(self, n_features: int) -> Arrays:
        """`starts` (F + 1,), and the lists of `columns`, in which feature f has [starts[f], starts[f + 1]).

        The statistic forgets them: both forms of all statistics at once would be a task's largest memory.
        """

    @abstractmethod
    def add(self, features: slice, parts: Iterable[Arrays]) -> None:
        """Add what `take` gave of other rows, cut to some features; `starts` are then of those features alone."""

    @abstractmethod
    def tile(self, features: slice) -> Tile:
        """What there is to write and to say of some features, all of whose rows have been added."""

    def feature_arrays(self, facts: Arrays, dense: Mapping[str, Any]) -> Arrays:
        """What is written whole, by full name, from the facts of all features and the merged dense statistics by name."""
        return {}
