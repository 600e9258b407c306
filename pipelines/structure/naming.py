"""Names of features, and places in the text where several features fire, by which a reader can check a structure."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from actstore import paths
from pipelines.analysis.reader import Analysis
from pipelines.codes.code_store import CodeStore
from pipelines.shared import markdown
from pipelines.shared.visible_text import visible
from pipelines.structure.sample import Sample
from pipelines.text.codec import TextCodec

MIN_F1 = 0.5
"""Least F1 of the rule that names a feature; below, its most frequent tokens name it."""
BEFORE, AFTER = 16, 4
N_CONTEXTS = 3


class Naming:
    """Names of an analysis' features, and contexts from the documents of a sample (the half that tests)."""

    def __init__(self, analysis: Analysis, codes: CodeStore, codec: TextCodec, sample: Sample):
        self.analysis, self.codes, self.codec, self.sample = analysis, codes, codec, sample

    @cached_property
    def _rules(self) -> dict[int, str]:
        """The rule of each feature that has a rule of at least this F1."""
        return {finding["feature"]: finding["rule"] for finding in self.analysis.findings if finding["f1"] >= MIN_F1}

    def name(self, feature: int) -> str:
        """A feature's rule, or the tokens that it fires on most often."""
        if feature in self._rules:
            return self._rules[feature]
        tokens = self.analysis.top_tokens(feature, 3)
        return (
            "on " + ", ".join(f"{markdown.code(token.text)} {token.share:.0%}" for token in tokens) if tokens else "silent"
        )

    def contexts(self, features: list[int], at_least: int = 2, n: int = N_CONTEXTS) -> list[dict[str, str]]:
        """Up to `n` rows, each from another document, in which most of some features fire, and at least so many.

        Among rows with equally many, the first of each document is taken; documents are in the sample's order.
        """
        wanted = np.zeros(self.sample.table.n_features + 1, bool)
        wanted[features] = True
        together = wanted[self.sample.table.features].sum(axis=1)
        rows = np.flatnonzero(together >= at_least)
        order = rows[np.lexsort((rows, -together[rows]))]
        _, firsts = np.unique(self.sample.documents[order], return_index=True)
        chosen = order[np.sort(firsts)][:n]
        return [self._context(int(row)) for row in chosen]

    def _context(self, row: int) -> dict[str, str]:
        segment, token = int(self.sample.segments[row]), int(self.sample.tokens[row])
        ids = self.codes.table(segment, paths.TOKEN_IDS)
        offsets = self.codes.table(segment, paths.DOCUMENT_OFFSETS)
        document = int(np.searchsorted(offsets, max(token, 0), side="right")) - 1
        first, last = max(int(offsets[document]), token - BEFORE), min(int(offsets[document + 1]), token + AFTER + 1)
        around = (
            self.codec.around(ids[first:last], token - first) if token >= 0 else ("", "", self.codec.text(ids[first:last]))
        )
        before, own, after = map(visible, around)
        return {
            "document": self.codes.document_names(segment)[document],
            "text": f"{before}⟦{own}⟧{after}",
        }


def pair_facts(columns: dict[str, Any], i: int, naming: Naming, with_examples: bool) -> dict[str, Any]:
    """Row `i` of the table of pairs as plain values, with names and, where both fire, examples."""
    facts = {name: values[i].item() for name, values in columns.items()}
    facts = {name: None if isinstance(value, float) and np.isnan(value) else value for name, value in facts.items()}
    ends = [facts["left"], facts["right"]]
    facts["names"] = [naming.name(feature) for feature in ends]
    facts["examples"] = naming.contexts(ends) if with_examples else []
    return facts


def community_facts(facts: dict[str, Any], central: Any, naming: Naming) -> dict[str, Any]:
    """A community's figures with its most linked members by name, and rows in which most of its features fire."""
    shown = [int(feature) for feature in central[:8]]
    return {
        **facts,
        "central": [{"feature": feature, "name": naming.name(feature)} for feature in shown],
        "examples": naming.contexts(facts["features"], at_least=min(3, len(facts["features"]))),
    }
