"""The arrays and tables of an analysis, by statistic and under short names."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from actstore.errors import DamagedStore, InputError
from actstore.place import Place
from actstore.sealed_folder import SealedFolder
from pipelines.analysis.arrays import SparseRows
from pipelines.analysis.record import AnalysisRecord
from pipelines.analysis.stored_arrays import StoredArray, StoredArrays
from pipelines.statistics import Extent, statistics
from pipelines.statistics.statistic import Arrays, Statistic, TiledStatistic


class AnalysisContents:
    """The arrays and tables of an analysis at a place, whose record is known.

    Reading raises DamagedStore where an array is missing, is not as `analyze` writes it, or is not of the record's shape.
    """

    def __init__(self, place: Place, record: AnalysisRecord, sealed: SealedFolder | None):
        self.place, self.record = place, record
        self._arrays = StoredArrays(place) if sealed is None else StoredArrays(place, sealed.there, sealed.read)

    def _get(self, name: str, *shape: int | None) -> NDArray[Any]:
        """A whole array that every analysis has. Raises DamagedStore when it is missing or has another shape."""
        return self._array(name, *shape)[...]

    def _array(self, name: str, *shape: int | None) -> StoredArray:
        try:
            return self._arrays.array(name, shape)
        except KeyError as error:
            raise self._missing(name) from error

    def _missing(self, name: str) -> DamagedStore:
        return DamagedStore(f"{self._arrays.where(name)}: is missing; restore it from a copy, or run `analyze` again.")

    @property
    def n_features(self) -> int:
        return self.record.n_features

    @property
    def n_rows(self) -> int:
        return self.record.n_rows

    @cached_property
    def extent(self) -> Extent:
        """The numbers of features, tokens, positions, documents and parts."""
        record = self.record
        return Extent(record.n_features, record.k, record.n_vocabulary, record.context, record.n_documents, record.n_parts)

    def arrays_of(self, statistic: str) -> Arrays:
        """The arrays that a registered statistic wrote whole, by full name.

        Raises InputError for a name that no statistic has, or when the analysis was made without that statistic.
        """
        try:
            return {name: self._arrays.whole(name) for name in self._registered(statistic).arrays}
        except KeyError as error:
            raise self._without(statistic) from error

    def table(self, statistic: str) -> SparseRows:
        """The sparse table (F, columns) of a registered statistic. Raises InputError as `arrays_of` does, or when the
        statistic writes no table."""
        kind = self._registered(statistic)
        if not (issubclass(kind, TiledStatistic) and kind.writes_table):
            raise InputError(f"statistic {statistic!r}: writes no table; ask for its arrays.")
        try:
            return SparseRows(self._arrays, statistic, self.n_features, kind.n_columns(self.extent))
        except KeyError as error:
            raise self._without(statistic) from error

    @staticmethod
    def _registered(statistic: str) -> type[Statistic]:
        kinds = statistics()
        if statistic not in kinds:
            raise InputError(f"statistic {statistic!r}: there is none of that name; choose one of {', '.join(kinds)}.")
        return kinds[statistic]

    def _without(self, statistic: str) -> InputError:
        return InputError(f"{self.place}: was made without the statistic {statistic!r}; run `analyze` on its codes again.")

    @cached_property
    def fires(self) -> NDArray[np.int64]:
        return self._get("features/fires", self.n_features)

    @cached_property
    def frequency(self) -> NDArray[np.float64]:
        """(F,) share of rows each feature fires in."""
        return self._get("features/frequency", self.n_features)

    @cached_property
    def mean(self) -> NDArray[np.float64]:
        """(F,) mean activation over a feature's firings."""
        return self._get("features/mean", self.n_features)

    @cached_property
    def peak(self) -> NDArray[np.float32]:
        """(F,) largest activation."""
        return self._get("features/peak", self.n_features)

    @cached_property
    def n_documents(self) -> NDArray[np.int64]:
        """(F,) documents in which each feature fires."""
        return self._get("features/n_documents", self.n_features)

    @cached_property
    def burstiness(self) -> NDArray[np.float64]:
        """(F,) how many times likelier two rows of one document both fire than two rows of any; NaN for under 2 firings."""
        return self._get("features/burstiness", self.n_features)

    @cached_property
    def quantile_bins(self) -> NDArray[np.int32]:
        """(F, quantiles) the bin of each quantile of a feature's activations; -1 when dead."""
        return self._get("features/quantile_bins", self.n_features, len(self.record.quantiles))

    @cached_property
    def active(self) -> NDArray[np.int64]:
        """(k + 1,) rows by number of active features: the distribution of L0."""
        return self._get("rows/active", self.record.k + 1)

    @cached_property
    def document_rows(self) -> NDArray[np.int64]:
        """(documents,) rows of each document."""
        return self._get("rows/documents", self.record.n_documents)

    @cached_property
    def joint(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The 20 most frequent features (n,), and in how many rows each two of them fire (n, n); diagonal: firings."""
        features = self._get("joint/features", None)
        return features, self._get("joint/together", len(features), len(features))

    @cached_property
    def part_names(self) -> list[str]:
        """Names of the corpus parts: first folders below the one that all documents share."""
        return self._names("parts", self.record.n_parts)

    @cached_property
    def pairs(self) -> SparseRows:
        """(F, F) in both triangles: with how many of its rows (or documents) each other feature is together."""
        try:
            return SparseRows(self._arrays, "cooccurrence", self.n_features, self.n_features)
        except KeyError as error:
            raise self._missing("cooccurrence") from error

    @cached_property
    def cooccurrence(self) -> sp.csr_array:
        """(F, F) CSR: rows in which features i < j fire together. All of it in memory: `pairs` reads a row."""
        return sp.csr_array(sp.triu(self.pairs.whole(), k=1, format="csr"))

    @cached_property
    def tokens(self) -> SparseRows:
        """(F, vocabulary): firings of each feature on each token (`count`), and the sum of its values there (`total`)."""
        return self.table("tokens")

    @cached_property
    def positions(self) -> SparseRows:
        """(F, context): firings of each feature at each position of a window."""
        return self.table("positions")

    @cached_property
    def parts(self) -> SparseRows:
        """(F, corpus parts): firings of each feature in each part."""
        return self.table("parts")

    @cached_property
    def bins(self) -> SparseRows:
        """(F, bins): firings of each feature by strength, 16 bins an octave; `bin_edges` gives their values."""
        return self.table("bins")

    @cached_property
    def token_counts(self) -> sp.csr_array:
        """(F, vocabulary) CSR: firings of each feature on each token. All in memory."""
        return self.tokens.whole()

    @cached_property
    def token_rows(self) -> NDArray[np.int64]:
        """(vocabulary,) rows of the corpus that stand at each token."""
        return self._get("rows/tokens", self.record.n_vocabulary)

    @cached_property
    def document_names(self) -> list[str]:
        return self._names("documents", self.record.n_documents)

    def _names(self, group: str, n_names: int) -> list[str]:
        try:
            names = self._get(f"{group}/name", None).tobytes().decode().split("\n")
        except UnicodeDecodeError as error:
            raise DamagedStore(f"{self._arrays.where(group)}/name: is no text in UTF-8; restore it from a copy.") from error
        if len(names) != n_names:
            raise DamagedStore(
                f"{self._arrays.where(group)}/name: {len(names):,} names, {n_names:,} in the record; restore it from a copy."
            )
        return names

    @cached_property
    def _part_rows(self) -> NDArray[np.int64]:
        return self._get("rows/parts", self.record.n_parts)
