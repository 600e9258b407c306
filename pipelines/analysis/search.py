"""In: an analysis, a text. Out: the features that fire most specifically on its tokens, and rules that name it."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from actstore.errors import InputError
from pipelines.analysis.reader import Analysis
from pipelines.shared import markdown
from pipelines.shared.visible_text import visible

COMMON_WORDS = frozenset({"a", "after", "an", "and", "in", "is", "of", "or", "that", "the", "token"})
"""Words of the rules' own language, which name no concept."""


def search(analysis: Analysis, text: str, top: int) -> dict[str, Any]:
    """Which features fire on a text: on its last token, and on any of its tokens where it has several.

    Counted over the whole corpus, for a set of tokens: precision is the share of a feature's firings that are on them,
    recall the share of their rows that it fires in, lift how many times more often than if it fired anywhere alike.
    Features come by F1, the harmonic mean of the first two. Raises InputError for a text of no tokens.
    """
    if top < 1:
        raise InputError(f"top {top}: need at least 1.")
    ids = analysis.token_ids(text)
    asked = [ids[-1:], *([sorted(set(ids))] if len(set(ids)) > 1 else [])]
    return {
        "text": text,
        "tokens": [{"token": token, "text": analysis.token_texts[token]} for token in ids],
        "results": [_on(analysis, tokens, top) for tokens in asked],
        "rules": _rules(analysis, text, top),
    }


def _on(analysis: Analysis, tokens: list[int], top: int) -> dict[str, Any]:
    """The features that fire on any of some tokens."""
    counts = np.zeros(analysis.n_features, np.int64)
    for token in tokens:
        features, own = analysis.features_on(token)
        counts[features] += own
    n_rows = int(analysis.token_rows[tokens].sum())
    precision = counts / np.maximum(analysis.fires, 1)
    recall = counts / max(n_rows, 1)
    f1 = 2 * counts / np.maximum(analysis.fires + n_rows, 1)
    order = np.argsort(-f1, kind="stable")[:top]
    return {
        "tokens": [analysis.token_texts[token] for token in tokens],
        "rows": n_rows,
        "features": [
            {
                "feature": feature,
                "f1": float(f1[feature]),
                "precision": float(precision[feature]),
                "recall": float(recall[feature]),
                "lift": float(precision[feature] * analysis.n_rows / n_rows),
                "rows": int(counts[feature]),
            }
            for feature in order.tolist()
            if counts[feature]
        ],
    }


def _rules(analysis: Analysis, text: str, top: int) -> list[dict[str, Any]]:
    """Findings whose rule quotes the text as a token, or has it among its words."""
    quoted, words = markdown.code(text), text.strip()
    is_word = re.fullmatch(r"[\w ]{2,}", words) and words.lower() not in COMMON_WORDS
    pattern = re.compile(rf"\b{re.escape(words)}\b", re.IGNORECASE) if is_word else None
    fitting = [f for f in analysis.findings if quoted in f["rule"] or (pattern and pattern.search(f["rule"]))]
    fitting.sort(key=lambda f: (-f["f1"], f["feature"]))
    return [{name: f[name] for name in ("feature", "rule", "precision", "recall", "f1")} for f in fitting[:top]]


def search_lines(answer: dict[str, Any]) -> list[str]:
    """The result as tables."""
    lines = ["tokens: " + " ".join(repr(visible(token["text"])) for token in answer["tokens"])]
    for result in answer["results"]:
        names = " or ".join(repr(visible(text)) for text in result["tokens"])
        lines.append(f"on {names}, in {result['rows']:,} rows:")
        lines.append(f"  {'feature':>7} {'F1':>6} {'precision':>10} {'recall':>7} {'lift':>9} {'rows':>9}")
        lines += [f"{_scores(f)} {f['lift']:>8,.1f}x {f['rows']:>9,}" for f in result["features"]] or [
            "  no feature fires there"
        ]
    if answer["rules"]:
        lines.append(
            "rules that name it, each feature above its own threshold (scored on documents they were not chosen on):"
        )
        lines += [f"{_scores(rule)}  {rule['rule']}" for rule in answer["rules"]]
    return lines


def _scores(row: dict[str, Any]) -> str:
    return f"  {row['feature']:>7} {row['f1']:>6.2f} {row['precision']:>10.1%} {row['recall']:>7.1%}"
