"""In: firings and labels of tokens. Out: for each feature, the one-line rule it follows best, and how well.

Three kinds of rules: what the token is (`the token ' self'`), what comes before it (`the token after ' def'`), and
a label of its place in the text (`inside a docstring`). A feature's rule and threshold are chosen on one half of
the documents and scored on the other, so that a rule cannot win by chance.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from actstore.place import absolute
from actstore.reader import Shard, Store
from actstore.schema import PARTS
from pipelines.cluster import reduce_tasks
from pipelines.code_store import CodeStore, open_codes, read_codes
from pipelines.python_labels import LABELS, label_tokens
from pipelines.terminal import visible
from pipelines.tokens import TextCodec

HALF_BIT = np.uint64(1) << np.uint64(63)
PEAK_SHARES = (0.0, 0.1, 0.2, 0.3, 0.45, 0.6)
"""Candidate thresholds of a feature, as shares of its peak on the choosing half."""
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


def label_store(store: Store, codec: TextCodec) -> list[NDArray[np.uint64]]:
    """For each segment, (n_tokens,) label bits of every token of the table; bit 63 is the half of its document."""
    pieces = codec.token_bytes()
    found = []
    for segment in store.segments:
        ids = store.table(segment.index, "tokens/ids")
        offsets = store.table(segment.index, "documents/offsets")
        labels = np.zeros(len(ids), np.uint64)
        for name, start, stop in zip(store.document_names(segment.index), offsets[:-1], offsets[1:], strict=True):
            token_bytes = [pieces[i] for i in ids[start : stop - 1]]
            source = b"".join(token_bytes).decode("utf-8", errors="ignore")
            labels[start : stop - 1] = label_tokens(source, token_bytes)
            if hashlib.sha256(name.encode()).digest()[8] & 1:
                labels[start:stop] |= HALF_BIT
        found.append(labels)
    return found


class RuleScores:
    """How often each feature fires above each threshold where each rule holds, on either half of the documents."""

    def __init__(self, n_features: int, n_rules: int, n_thresholds: int):
        self.hits = [[sp.csr_array((n_features, n_rules), dtype=np.int64) for _ in range(n_thresholds)] for _ in range(2)]
        self.firings = np.zeros((2, n_thresholds, n_features), np.int64)
        self.holds = np.zeros((2, n_rules), np.int64)

    def update(self, fired: list[sp.csr_array], rules: sp.csr_array, half: NDArray[np.bool_]) -> None:
        """`fired`, one (n, F) 0/1 matrix a threshold; `rules` (n, R) 0/1; `half` (n,) which half each row is of."""
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

    def finalize(self, thresholds: NDArray[np.float64], token_texts: list[str]) -> list[Finding]:
        """Each feature's best rule on half 0, scored on half 1, by falling F1. `thresholds` is (T, F)."""
        n_features = self.firings.shape[2]
        best = np.full(n_features, -1.0)
        chosen = np.full((n_features, 2), -1, np.int64)
        for t, hits in enumerate(self.hits[0]):
            pairs = hits.tocoo()
            feature, rule = pairs.coords
            f1 = 2 * pairs.data / (self.firings[0, t][feature] + self.holds[0][rule])
            f1[self.firings[0, t][feature] < MIN_FIRINGS] = -1.0
            order = np.lexsort((rule, -f1, feature))
            first = order[np.r_[True, np.diff(feature[order]) != 0]] if len(order) else order
            better = first[f1[first] > best[feature[first]]]
            best[feature[better]] = f1[better]
            chosen[feature[better]] = np.stack([np.full(len(better), t), rule[better]], axis=1)
        findings = []
        for feature in np.flatnonzero(best >= 0).tolist():
            t, rule = chosen[feature].tolist()
            hits = int(self.hits[1][t][feature, rule])
            fired, holds = int(self.firings[1, t, feature]), int(self.holds[1][rule])
            text, kind = rule_name(rule, token_texts)
            findings.append(
                Finding(
                    feature=feature,
                    rule=text,
                    kind=kind,
                    threshold=float(thresholds[t, feature]),
                    precision=hits / max(fired, 1),
                    recall=hits / max(holds, 1),
                    f1=2 * hits / max(fired + holds, 1),
                    f1_chosen=float(best[feature]),
                    firings=fired,
                )
            )
        return sorted(findings, key=lambda finding: (-finding.f1, finding.feature))


def rule_name(rule: int, token_texts: list[str]) -> tuple[str, str]:
    """(one line, kind) of a rule: columns are the labels, then tokens, then previous tokens."""
    if rule < len(LABELS):
        return LABELS[rule], "place"
    kind, token = divmod(rule - len(LABELS), len(token_texts))
    text = f"`{visible(token_texts[token])}`"
    return (f"the token {text}", "token") if kind == 0 else (f"the token after {text}", "after")


def rule_matrix(
    bits: NDArray[np.uint64], tokens: NDArray[np.int64], previous: NDArray[np.int64], n_vocabulary: int
) -> sp.csr_array:
    """(n, R) 0/1: which rules hold at each row."""
    n = len(bits)
    place_row, place = np.nonzero((bits[:, None] >> np.arange(len(LABELS), dtype=np.uint64)) & np.uint64(1))
    rows = np.concatenate([place_row, np.arange(n), np.arange(n)])
    columns = np.concatenate([place, len(LABELS) + tokens, len(LABELS) + n_vocabulary + previous])
    shape = (n, len(LABELS) + 2 * n_vocabulary)
    return sp.csr_array((np.ones(len(rows), np.int64), (rows, columns)), shape=shape)


def find_rules(codes: CodeStore, codec: TextCodec, client: Any) -> list[Finding]:
    """Every feature's best rule over a code store of Python sources, by falling F1 on the scoring half."""
    labels = [client.scatter(bits, broadcast=True) for bits in label_store(codes, codec)]
    shards = [shard for part in PARTS for shard in codes.shards(part)]
    tasks = [(absolute(codes.url), codes.snapshot, shard, labels[shard.segment]) for shard in shards]
    peaks = reduce_tasks(client, "peaks", half_peaks, np.maximum, tasks)
    thresholds = np.outer(PEAK_SHARES, peaks)
    n_vocabulary = codec.backend.get_vocab_size()
    shared = client.scatter(thresholds, broadcast=True)
    scores = reduce_tasks(client, "rules", score_shard, RuleScores.merge, [(*task, shared, n_vocabulary) for task in tasks])
    return list(scores.finalize(thresholds, codec.token_texts()))


def findings_json(findings: list[Finding]) -> dict[str, Any]:
    """What `findings.json` beside an analysis holds."""
    return {"findings": [asdict(finding) for finding in findings]}


def half_peaks(codes_url: str, snapshot: str, shard: Shard, labels: NDArray[np.uint64]) -> NDArray[np.float64]:
    """(F,) largest value of each feature over a shard's rows of half 0. Runs on a worker."""
    codes = open_codes(codes_url, snapshot)
    indices, values = read_codes(codes, shard)
    mine = (row_labels(codes, shard, labels) & HALF_BIT) == 0
    peaks = np.zeros(codes.n_features)
    np.maximum.at(peaks, indices[mine].ravel(), values[mine].ravel().astype(np.float64))
    return peaks


def score_shard(
    codes_url: str,
    snapshot: str,
    shard: Shard,
    labels: NDArray[np.uint64],
    thresholds: NDArray[np.float64],
    n_vocabulary: int,
) -> RuleScores:
    """The rule scores of one shard. Runs on a worker."""
    codes = open_codes(codes_url, snapshot)
    indices, values = read_codes(codes, shard)
    rules, half = shard_rules(codes, shard, labels, n_vocabulary)
    fired = []
    for bounds in thresholds:
        row, slot = np.nonzero(values > bounds[indices])
        fired.append(
            sp.csr_array((np.ones(len(row), np.int64), (row, indices[row, slot])), shape=(shard.n_rows, codes.n_features))
        )
    scores = RuleScores(codes.n_features, rules.shape[1], len(thresholds))
    scores.update(fired, rules, half)
    return scores


def shard_rules(
    store: Store, shard: Shard, labels: NDArray[np.uint64], n_vocabulary: int
) -> tuple[sp.csr_array, NDArray[np.bool_]]:
    """(rule matrix, half of each row) of a shard of any store over the labelled token table."""
    bits = row_labels(store, shard, labels)
    index = store.token_index(shard)
    ids = store.table(shard.segment, "tokens/ids")
    separator = store.manifest.policy.separator_token_id
    previous = np.where(index > 0, ids[np.maximum(index, 1) - 1].astype(np.int64), separator)
    return rule_matrix(bits & ~HALF_BIT, store.token_ids(shard), previous, n_vocabulary), (bits & HALF_BIT) != 0


def row_labels(store: Store, shard: Shard, labels: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """(n_rows,) label bits of a shard's rows; 0 at start-of-text positions."""
    index = store.token_index(shard)
    return np.where(index >= 0, labels[np.maximum(index, 0)], np.uint64(0))
