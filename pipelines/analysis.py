"""An analysis on disk, opened for looking: features, their tokens, their examples, their partners."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import zarr
from numpy.typing import NDArray

from actstore import paths
from actstore.errors import InputError, NotAStore, OutputExists
from actstore.files import read_json
from pipelines.statistics import BANDS
from pipelines.tokens import parse_tokenizer

ANALYSIS_VERSION = 1
RECORD = "analysis.json"
SORTS = ("frequency", "mean", "peak", "id")


@dataclass(frozen=True)
class TokenShare:
    """One token a feature fires on: `share` of its firings, and `recall`, the share of the token's rows it fires on."""

    token: int
    text: str
    count: int
    share: float
    recall: float


@dataclass(frozen=True)
class Example:
    """A firing in its text: token texts and the feature's value at each; `focus` is the firing's place."""

    value: float
    document: str
    tokens: tuple[str, ...]
    values: tuple[float, ...]
    focus: int


def require_new_analysis(path: Path) -> None:
    """Raises OutputExists when anything is at `path`."""
    if path.exists():
        raise OutputExists(f"{path}: exists; choose another --out, or move it away.")


class Analysis:
    """What `analyze` wrote. Raises NotAStore when `path` holds no finished analysis of this format version."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not (self.path / RECORD).exists():
            raise NotAStore(f"{self.path}: not an analysis (no {RECORD}); pass a folder that `analyze` wrote.")
        self.record: dict[str, Any] = read_json(self.path / RECORD)
        if self.record.get("format") != "actstore-analysis" or self.record.get("version") != ANALYSIS_VERSION:
            raise NotAStore(f"{self.path}: not an analysis of format version {ANALYSIS_VERSION}; run `analyze` again.")
        self._root = zarr.open_group(self.path / paths.DATA, mode="r")
        file = self.path / paths.TOKENIZER / "tokenizer.json"
        special = self.record["bos_token_id"], self.record["separator_token_id"]
        self._codec = parse_tokenizer(file.read_bytes(), str(file), *special)

    def _get(self, name: str) -> NDArray[Any]:
        return np.asarray(self._root[name][:])  # type: ignore[index]

    @property
    def n_features(self) -> int:
        n: int = self.record["n_features"]
        return n

    @property
    def n_rows(self) -> int:
        n: int = self.record["n_rows"]
        return n

    @cached_property
    def fires(self) -> NDArray[np.int64]:
        return self._get("features/fires")

    @cached_property
    def frequency(self) -> NDArray[np.float64]:
        """(F,) share of rows each feature fires in."""
        return self._get("features/frequency")

    @cached_property
    def mean(self) -> NDArray[np.float64]:
        """(F,) mean activation over a feature's firings."""
        return self._get("features/mean")

    @cached_property
    def peak(self) -> NDArray[np.float32]:
        """(F,) largest activation."""
        return self._get("features/peak")

    @cached_property
    def token_texts(self) -> list[str]:
        return self._codec.token_texts()

    @cached_property
    def cooccurrence(self) -> sp.csr_array:
        """(F, F) CSR: rows in which features i < j fire together."""
        parts = [self._get(f"cooccurrence/{name}") for name in ("count", "columns", "starts")]
        return sp.csr_array(tuple(parts), shape=(self.n_features, self.n_features))

    def _row(self, group: str, row: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(columns, counts) of one row of a CSR group; only the chunks that hold it are read."""
        own = slice(*(int(bound) for bound in self._part(f"{group}/starts", slice(row, row + 2))))
        columns, counts = (self._part(f"{group}/{name}", own) for name in ("columns", "count"))
        return columns.astype(np.int64), counts.astype(np.int64)

    def _column(self, group: str, column: int, rows: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(rows, counts) of one column of the first `rows` rows of a CSR group: a scan of its column numbers alone."""
        starts = self._part(f"{group}/starts", slice(0, rows + 1))
        places = np.flatnonzero(self._part(f"{group}/columns", slice(0, int(starts[-1]))) == column)
        counts = self._part(f"{group}/count", places) if len(places) else np.empty(0)
        return np.searchsorted(starts, places, side="right") - 1, counts.astype(np.int64)

    def _part(self, name: str, which: slice | NDArray[np.int64]) -> NDArray[Any]:
        """Some values of an array of one dimension."""
        array: Any = self._root[name]
        return np.asarray(array[which] if isinstance(which, slice) else array.oindex[which])

    @cached_property
    def token_counts(self) -> sp.csr_array:
        """(F, vocabulary) CSR: firings of each feature on each token."""
        parts = [self._get(f"tokens/{name}") for name in ("count", "columns", "starts")]
        return sp.csr_array(tuple(parts), shape=(self.n_features, len(self.token_rows)))

    @cached_property
    def token_rows(self) -> NDArray[np.int64]:
        """(vocabulary,) rows of the corpus that stand at each token."""
        return self._get("tokens/corpus_rows")

    @cached_property
    def document_names(self) -> list[str]:
        return self._get("documents/name").tobytes().decode().split("\n")

    def require_feature(self, feature: int) -> int:
        """Raises InputError for an id that is not a feature's."""
        if not 0 <= feature < self.n_features:
            raise InputError(
                f"feature {feature}: {self.path} has {self.n_features} features; choose 0 to {self.n_features - 1}."
            )
        return feature

    def band(self, feature: int) -> str:
        """The frequency band of a feature."""
        per_cent = int(self.fires[feature]) * 100
        above = (90 * self.n_rows, 10 * self.n_rows, self.n_rows, 0)
        return next((name for name, bound in zip(BANDS, above, strict=False) if per_cent > bound), BANDS[-1])

    def sorted_features(self, sort: str) -> NDArray[np.int64]:
        """Feature ids by falling `sort`, ties by id."""
        if sort not in SORTS:
            raise InputError(f"sort {sort!r}: choose one of {', '.join(SORTS)}.")
        if sort == "id":
            return np.arange(self.n_features)
        return np.argsort(
            -np.asarray({"frequency": self.frequency, "mean": self.mean, "peak": self.peak}[sort]), kind="stable"
        )

    def top_tokens(self, feature: int, n: int = 5) -> list[TokenShare]:
        """The tokens a feature fires on most often."""
        tokens, counts = self._row("tokens", feature)
        return [
            TokenShare(
                token=int(tokens[i]),
                text=self.token_texts[tokens[i]],
                count=int(counts[i]),
                share=float(counts[i] / self.fires[feature]),
                recall=float(counts[i] / self.token_rows[tokens[i]]),
            )
            for i in np.lexsort((tokens, -counts))[:n]
        ]

    def features_on(self, token: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(features, counts): which features fire on a token, by rising id, and in how many of its rows."""
        return self._column("tokens", token, self.n_features)

    def token_ids(self, text: str) -> list[int]:
        """A text as ids of the analysis' tokenizer. Raises InputError for a text of no tokens."""
        ids: list[int] = self._codec.backend.encode(text, add_special_tokens=False).ids
        if not ids:
            raise InputError(f"text {text!r}: has no tokens; pass at least one character.")
        return ids

    def examples(self, feature: int) -> list[Example]:
        """A feature's strongest firings, strongest first, each from another window."""
        found = {
            name: np.asarray(self._root[f"examples/{name}"][feature])  # type: ignore[index]
            for name in ("value", "document", "tokens", "values")
        }
        n = int((found["value"] > 0).sum())
        return [
            Example(
                value=float(found["value"][i]),
                document=self.document_names[found["document"][i]],
                tokens=tuple("" if t < 0 else self.token_texts[t] for t in found["tokens"][i]),
                values=tuple(float(v) for v in found["values"][i]),
                focus=self.record["focus"],
            )
            for i in range(n)
        ]

    def partners(self, feature: int, n: int = 5) -> list[tuple[int, int, float]]:
        """(feature, rows together, lift) of the features that fire with this one most often.

        Lift is P(a, b) / (P(a) P(b)): how many times more often than if the two were independent.
        """
        sides = self._row("cooccurrence", feature), self._column("cooccurrence", feature, feature)
        partner, together = (np.concatenate(column) for column in zip(*sides, strict=True))
        order = np.lexsort((partner, -together))[:n]
        partner, together = partner[order], together[order]
        lift = together * self.n_rows / (self.fires[feature] * self.fires[partner])
        return list(zip(partner.tolist(), together.tolist(), lift.tolist(), strict=True))
