"""An analysis on disk, opened for looking: features, their tokens, their examples, their partners.

An analysis lies in a folder or at a prefix of a bucket; docs/ANALYSIS.md lists its contents. One feature takes two short
reads of each array."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore import paths
from actstore.checked_json import parse_json
from actstore.errors import DamagedStore, IdentityMismatch, InputError, OutputExists
from actstore.open_place import open_place
from actstore.sealed_folder import SealedFolder, is_sealed, open_sealed
from pipelines.analysis.contents import AnalysisContents
from pipelines.analysis.record import ANALYSIS_VERSION as ANALYSIS_VERSION
from pipelines.analysis.record import EXAMPLE_KINDS as EXAMPLE_KINDS
from pipelines.analysis.record import RECORD as RECORD
from pipelines.analysis.record import AnalysisRecord, open_analysis
from pipelines.analysis.stored_arrays import StoredArray
from pipelines.statistics import BANDS, association, band_numbers
from pipelines.statistics.of_codes.bins import QUANTILES
from pipelines.statistics.value_bins import bin_edges
from pipelines.text.tokenizer_files import parse_tokenizer

FINDINGS = "findings.json"
STRUCTURE, PAIRS = "structure", "pairs.parquet"
"""The folder in which `structure` leaves its result, unless told otherwise, and its table of pairs."""
SORTS = ("frequency", "mean", "peak", "documents", "burstiness", "id")
EXAMPLE_ARRAYS = ("value", "document", "tokens", "values")
"""The arrays of the kept firings: (F, slots) each, the last two (F, slots, tokens)."""


@dataclass(frozen=True)
class TokenShare:
    """One token a feature fires on: `share` of its firings (the precision of "fires on this token"), and `recall`, the
    share of the token's rows it fires on; `lift`, the recall over the feature's frequency; `mean` activation there."""

    token: int
    text: str
    count: int
    share: float
    recall: float
    lift: float
    mean: float


@dataclass(frozen=True)
class Example:
    """A firing in its text: token texts and the feature's value at each; `focus` is the firing's place."""

    value: float
    document: str
    tokens: tuple[str, ...]
    values: tuple[float, ...]
    focus: int


def require_new_analysis(path: str | Path) -> None:
    """Raises OutputExists when anything is at `path`."""
    if entries := open_place(path).entries():
        what = "" if "://" not in str(path) else f" ({len(entries)} entries)"
        raise OutputExists(f"{path}: exists{what}; choose another --out, or move it away.")


class Analysis(AnalysisContents):
    """What `analyze` wrote. Raises what `open_analysis` raises.

    `record` is that of an analysis which is being finished and has none yet.
    """

    def __init__(self, path: str | Path, record: AnalysisRecord | None = None):
        place = open_place(path)
        self.path = Path(path)
        sealed, own = (None, record) if record is not None else open_analysis(path)
        self._sealed: SealedFolder | None = sealed
        super().__init__(place, own, self._sealed)
        file = f"{paths.TOKENIZER}/tokenizer.json"
        data = place.read(file) if self._sealed is None else self._sealed.read(file)
        self._codec = parse_tokenizer(data, f"{path}/{file}", own.bos_token_id, own.separator_token_id)
        self._loaded: dict[str, NDArray[Any]] = {}

    def __repr__(self) -> str:
        """Place, features, rows and what they are of, on one line."""
        return (
            f"<Analysis {self.place}: {self.n_features:,} features of run {self.record.run_id} in {self.n_rows:,} rows; "
            f"snapshot {self.record.snapshot}>"
        )

    def preload(self) -> dict[str, NDArray[Any]]:
        """Read the arrays that most features' cards show; returns those of `examples`."""
        for table in (self.pairs, self.tokens):
            table.load()
        self._loaded = {name: self._example_array(name)[...] for name in EXAMPLE_ARRAYS}
        return self._loaded

    def _example_array(self, name: str) -> StoredArray:
        shape = (self.n_features, self.record.n_slots)
        return self._array(f"examples/{name}", *shape, *([] if name in EXAMPLE_ARRAYS[:2] else [self.record.example_width]))

    @cached_property
    def findings(self) -> list[dict[str, Any]]:
        """The features that follow a rule, in the order of their file; none when no later stage has looked for any.

        Each has feature, rule, precision, recall, f1 and threshold. Raises DamagedStore when the file is not of the form
        that the later stage writes."""
        if not self.place.exists(FINDINGS):
            return []
        where = f"{self.place}/{FINDINGS}"
        found = parse_json(self._added(FINDINGS), where)
        try:
            return [
                {"feature": self.require_feature(int(finding["feature"])), "rule": str(finding["rule"])}
                | {name: float(finding[name]) for name in ("precision", "recall", "f1", "threshold")}
                for finding in found["findings"]
            ]
        except (KeyError, TypeError, ValueError, OverflowError, InputError) as error:
            raise DamagedStore(
                f"{where}: not the findings of this analysis ({error}); write it again or move it."
            ) from error

    def _added(self, name: str) -> bytes:
        """An object that a later stage put into the analysis, and sealed or not."""
        is_sealed = self._sealed is not None and name in self._sealed.seal.objects
        return self._sealed.read(name) if self._sealed is not None and is_sealed else self.place.read(name)

    @cached_property
    def token_texts(self) -> list[str]:
        texts = self._codec.token_texts()
        if len(texts) < self.record.n_vocabulary:
            raise DamagedStore(
                f"{self.place}: counts {self.record.n_vocabulary:,} tokens, its tokenizer has {len(texts):,}; restore it "
                "from a copy."
            )
        return texts

    def require_feature(self, feature: int) -> int:
        """Raises InputError for an id that is not a feature's."""
        if not 0 <= feature < self.n_features:
            raise InputError(
                f"feature {feature}: {self.place} has {self.n_features} features; choose 0 to {self.n_features - 1}."
            )
        return feature

    def band(self, feature: int) -> str:
        """The frequency band of a feature."""
        return BANDS[int(band_numbers(self.fires[[feature]], self.n_rows)[0])]

    def sorted_features(self, sort: str) -> NDArray[np.int64]:
        """Feature ids by falling `sort`, ties by id."""
        if sort not in SORTS:
            raise InputError(f"sort {sort!r}: choose one of {', '.join(SORTS)}.")
        if sort == "id":
            return np.arange(self.n_features)
        column: NDArray[Any] = self.n_documents if sort == "documents" else getattr(self, sort)
        return np.argsort(-np.nan_to_num(column, nan=-1.0), kind="stable")

    def quantiles(self, feature: int) -> dict[str, float]:
        """The middle of the bin of each quantile of a feature's activations: within 1/32 of it. Empty when dead."""
        bins = self.quantile_bins[feature]
        if bins[0] < 0:
            return {}
        low, high = bin_edges(bins)
        return {f"{q:g}": float(value) for q, value in zip(QUANTILES, (low + high) / 2, strict=True)}

    def top_tokens(self, feature: int, n: int = 5) -> list[TokenShare]:
        """The tokens a feature fires on most often."""
        columns, counts = self.tokens.row(feature)
        _, totals = self.tokens.row(feature, "total")
        order = np.lexsort((columns, -counts.astype(np.int64)))[:n]
        return [
            TokenShare(
                token=int(columns[i]),
                text=self.token_texts[columns[i]],
                count=int(counts[i]),
                share=float(counts[i] / self.fires[feature]),
                recall=float(counts[i] / self.token_rows[columns[i]]),
                lift=float(association.lift(counts[i], self.fires[feature], self.token_rows[columns[i]], self.n_rows)),
                mean=float(totals[i] / counts[i]),
            )
            for i in order
        ]

    def features_on(self, token: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(features, counts): which features fire on a token, by rising id, and in how many of its rows."""
        features, counts = self.tokens.column(token)
        return features, counts.astype(np.int64)

    def token_ids(self, text: str) -> list[int]:
        """A text as ids of the analysis' tokenizer. Raises InputError for a text of no tokens."""
        (ids,) = self._codec.ids([text])
        if not ids:
            raise InputError(f"text {text!r}: has no tokens; pass at least one character.")
        return ids

    def examples(self, feature: int, kind: str = "top") -> list[Example]:
        """Kept firings of a feature.

        "top": the strongest, strongest first, each from another window; "strata": a random one of each fifth of its
        firings by strength, weakest first; "random": of all its firings, equally likely.
        """
        first, last = self.record.example_slots[kind]
        arrays = {
            name: np.asarray((self._loaded[name] if self._loaded else self._example_array(name))[feature])
            for name in EXAMPLE_ARRAYS
        }
        shown = range(first, last)
        kept = [i for i in shown if arrays["value"][i] > 0]
        for name, n in (("document", self.record.n_documents), ("tokens", len(self.token_texts))):
            if (np.asarray(arrays[name][kept]) >= n).any() or (name == "document" and (arrays[name][kept] < 0).any()):
                raise DamagedStore(f"{self._arrays.where('examples')}/{name}: names beyond the {n:,} there are.")
        return [
            Example(
                value=float(arrays["value"][i]),
                document=self.document_names[arrays["document"][i]],
                tokens=tuple("" if t < 0 else self.token_texts[t] for t in arrays["tokens"][i]),
                values=tuple(float(v) for v in arrays["values"][i]),
                focus=self.record.focus,
            )
            for i in kept
        ]

    def position_halves(self, feature: int) -> tuple[int, int]:
        """A feature's firings in the first and the second half of the window; `positions.row` has each position."""
        columns, counts = self.positions.row(feature)
        is_early = columns < self.positions.n_columns // 2
        return int(counts[is_early].sum()), int(counts[~is_early].sum())

    def top_parts(self, feature: int, n: int = 5) -> list[tuple[str, int, float]]:
        """(part, firings, lift) of the corpus parts in which a feature fires most; lift against its mean frequency."""
        columns, counts = self.parts.row(feature)
        order = np.lexsort((columns, -counts.astype(np.int64)))[:n]
        part, count = columns[order], counts[order].astype(np.int64)
        lift = association.lift(count, self.fires[feature], self._part_rows[part], self.n_rows)
        return list(zip([self.part_names[p] for p in part], count.tolist(), lift.tolist(), strict=True))

    def partners_beyond_chance(self, feature: int, n: int = 5) -> list[tuple[int, int, float, float]] | None:
        """(feature, rows together, rows expected, lift) of the replicated partners with the largest lift over the null.

        Counted on the second half of the documents, by the `structure` that lies in the analysis; None where none does.
        """
        where = f"{self.place.url}/{STRUCTURE}"
        if not is_sealed(where):
            return None
        import pyarrow as pa
        import pyarrow.parquet as pq

        of_feature = [[("left", "=", feature)], [("right", "=", feature)]]
        names = ["left", "right", "count_2", "expected_2", "lift_2", "replicated"]
        table = io.BytesIO(open_sealed(where, STRUCTURE, "structure").read(PAIRS))
        try:
            pairs = pq.read_table(table, columns=names, filters=of_feature).to_pydict()
        except (pa.ArrowException, ValueError, KeyError, OSError) as error:
            reason = str(error).partition("\n")[0]
            raise DamagedStore(
                f"{where}/{PAIRS}: not the pairs that `structure` writes ({reason}); make it again."
            ) from error
        rows = [row for row in zip(*pairs.values(), strict=True) if row[-1] and row[-2] > 1]
        rows.sort(key=lambda row: -row[-2])
        return [
            (right if left == feature else left, count, expected, lift) for left, right, count, expected, lift, _ in rows[:n]
        ]

    def partners(self, feature: int, n: int = 5) -> list[tuple[int, int, float]]:
        """(feature, rows together, lift) of the features that fire with this one most often.

        Lift is P(a, b) / (P(a) P(b)): how many times more often than if the two were independent. In an analysis
        `--within document` rows are documents; `--within N` tokens has no such product, and a lift of NaN.
        """
        columns, counts = self.pairs.row(feature)
        together = counts.astype(np.int64)
        order = np.lexsort((columns, -together))[:n]
        partner, together = columns[order], together[order]
        each, total = self.fires, self.n_rows
        if self.record.within == "document":
            each, total = self.n_documents, int((self.document_rows > 0).sum())
        lift = association.lift(together, each[feature], each[partner], total)
        if self.record.within not in ("row", "document"):
            lift = np.full(len(together), np.nan)
        return list(zip(partner.tolist(), together.tolist(), lift.tolist(), strict=True))


def open_run_analysis(
    path: str | Path, run_id: str, run: object, remedy: str = "pass the analysis of this run."
) -> Analysis:
    """An analysis. Raises IdentityMismatch, which ends with the remedy, when it is of another run."""
    analysis = Analysis(path)
    if analysis.record.run_id != run_id:
        raise IdentityMismatch(f"{path}: is of run {analysis.record.run_id}, {run} is {run_id}; {remedy}")
    return analysis
