"""How well units (features, neurons, raw dimensions) follow rules about tokens: counts that merge, and scores from them.

Three kinds of rules: what the token is (the token ` self`), what comes before it (the token after ` def`), and a label of
its place in the text (inside a docstring). Whatever is chosen (a rule, a unit, a threshold) is chosen on one half of the
documents and scored on the other, so that nothing can win by chance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from actstore import paths
from actstore.reader import Shard, Store
from pipelines.concepts.labels import SegmentLabels, shard_labels
from pipelines.shared import markdown

MIN_FIRINGS = 20
"""A rule is chosen from at least this many firings on the choosing half."""


@dataclass(frozen=True)
class Finding:
    """A feature and its rule; precision, recall and F1 are of the scoring half."""

    feature: int
    rule: str
    kind: str
    threshold: float
    precision: float
    recall: float
    f1: float
    f1_chosen: float
    firings: int


class RuleScores:
    """How often each unit fires above each threshold where each rule holds, on either half of the documents.

    Columns are the labels, then tokens, then tokens before.
    """

    def __init__(self, n_units: int, n_rules: int, n_thresholds: int):
        self.hits = [[sp.csr_array((n_units, n_rules), dtype=np.int64) for _ in range(n_thresholds)] for _ in range(2)]
        self.firings = np.zeros((2, n_thresholds, n_units), np.int64)
        self.holds = np.zeros((2, n_rules), np.int64)

    def update(self, fired: list[sp.csr_array], rules: sp.csr_array, half: NDArray[np.bool_]) -> None:
        """`fired`, one (n, U) 0/1 matrix a threshold; `rules` (n, R) 0/1; `half` (n,) which half each row is of."""
        for h in range(2):
            mine = np.flatnonzero(half == bool(h))
            own_rules = rules[mine]
            self.holds[h] += np.asarray(own_rules.sum(axis=0)).ravel()
            for t, matrix in enumerate(fired):
                own = matrix[mine]
                self.hits[h][t] = self.hits[h][t] + own.T.tocsr() @ own_rules
                self.firings[h, t] += np.asarray(own.sum(axis=0)).ravel()

    def merge(self, other: RuleScores) -> RuleScores:
        self.hits = [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(self.hits, other.hits, strict=True)]
        self.firings += other.firings
        self.holds += other.holds
        return self

    def finalize(self, thresholds: NDArray[np.float64], labels: tuple[str, ...], token_texts: list[str]) -> list[Finding]:
        """Each unit's best rule on half 0, scored on half 1, by falling F1. `thresholds` is (T, U)."""
        findings = []
        for unit, (t, rule, f1_chosen) in self._best_rules().items():
            hits = int(self.hits[1][t][unit, rule])
            fired, holds = int(self.firings[1, t, unit]), int(self.holds[1, rule])
            text, kind = rule_name(rule, labels, token_texts)
            findings.append(
                Finding(
                    feature=unit,
                    rule=text,
                    kind=kind,
                    threshold=float(thresholds[t, unit]),
                    precision=hits / max(fired, 1),
                    recall=hits / max(holds, 1),
                    f1=2 * hits / max(fired + holds, 1),
                    f1_chosen=f1_chosen,
                    firings=fired,
                )
            )
        return sorted(findings, key=lambda finding: (-finding.f1, finding.feature))

    def chosen(self, t: int, columns: slice = slice(None)) -> UnitRules:
        """How every unit above its t-th threshold follows some of the rules on half 0, where the two meet at all."""
        pairs = self.hits[0][t][:, columns].tocoo()
        unit, rule = (np.asarray(axis, np.int64) for axis in pairs.coords)
        fired, holds = self.firings[0, t][unit], self.holds[0][columns][rule]
        f1 = np.where(fired < MIN_FIRINGS, -1.0, 2 * pairs.data / np.maximum(fired + holds, 1))
        return UnitRules(unit, rule, f1, pairs.data / np.maximum(fired, 1), np.asarray(pairs.data, np.int64))

    def _best_rules(self) -> dict[int, tuple[int, int, float]]:
        """unit -> (threshold, rule, F1) with the largest F1 on half 0; ties by number."""
        best: dict[int, tuple[int, int, float]] = {}
        for t in range(len(self.hits[0])):
            pairs = self.chosen(t)
            order = np.lexsort((pairs.rule, -pairs.f1, pairs.unit))
            first = order[np.r_[True, np.diff(pairs.unit[order]) != 0]] if len(order) else order
            for i in first[pairs.f1[first] >= 0].tolist():
                unit, f1 = int(pairs.unit[i]), float(pairs.f1[i])
                if unit not in best or f1 > best[unit][2]:
                    best[unit] = (t, int(pairs.rule[i]), f1)
        return dict(sorted(best.items()))


class UnitRules(NamedTuple):
    """Pairs of a unit and a rule on the choosing half; F1 is -1 for a unit with too few firings."""

    unit: NDArray[np.int64]
    rule: NDArray[np.int64]
    f1: NDArray[np.float64]
    precision: NDArray[np.float64]
    hits: NDArray[np.int64]


def rule_name(rule: int, labels: tuple[str, ...], token_texts: list[str]) -> tuple[str, str]:
    """(one line, kind) of a rule: columns are the labels, then tokens, then previous tokens."""
    if rule < len(labels):
        return labels[rule], "place"
    kind, token = divmod(rule - len(labels), len(token_texts))
    text = markdown.code(token_texts[token])
    return (f"the token {text}", "token") if kind == 0 else (f"the token after {text}", "after")


def rule_matrix(
    holds: sp.csr_array, tokens: NDArray[np.int64], previous: NDArray[np.int64], n_vocabulary: int
) -> sp.csr_array:
    """(n, R) 0/1: which rules hold at each row, given which labels do (n, L)."""
    n = len(tokens)
    ones, rows = np.ones(n, np.int64), np.arange(n)
    columns = (sp.csr_array((ones, (rows, own)), shape=(n, n_vocabulary)) for own in (tokens, previous))
    return sp.hstack([holds, *columns], format="csr")


def shard_rules(
    store: Store, shard: Shard, labels: SegmentLabels, n_vocabulary: int
) -> tuple[sp.csr_array, NDArray[np.bool_]]:
    """(rule matrix, half of each row) of a shard of any store over the labelled token table."""
    holds, half = shard_labels(store, shard, labels)
    index = store.token_index(shard)
    ids = store.table(shard.segment, paths.TOKEN_IDS)
    separator = store.manifest.policy.separator_token_id
    previous = np.where(index > 0, ids[np.maximum(index, 1) - 1].astype(np.int64), separator)
    return rule_matrix(holds, store.token_ids(shard), previous, n_vocabulary), half
