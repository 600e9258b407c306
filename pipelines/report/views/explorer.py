"""The list of all features, and the one that is chosen: its tokens, partners and examples.

What its script reads:

    n_rows, band_names
    fires, mean, peak   one number a feature
    bands               one digit a feature: the place of its band in band_names
    vocabulary          token texts, the most used first; tokens below are places in it
    documents           document names
    findings            [feature, rule, F1], ...
    details             feature -> [tokens, partners, examples]:
                            tokens     [token, firings on it, rows it stands at], ...
                            partners   [feature, rows together], ...
                            examples   [value, document, focus, tokens, levels], ...

A level is a value in 99ths of the feature's peak, rounded up: 0 only where the feature is silent.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from pipelines.analysis.reader import Analysis, Example
from pipelines.report.view import View, text_beside
from pipelines.statistics import BANDS

DETAILED_FEATURES = 5_000
"""Features with details: rarer ones have a row in the list but no tokens, partners and examples, so that the page stays
small."""
DETAILED_TOKENS, DETAILED_PARTNERS = 10, 8
LEVELS = 99


def shown(analysis: Analysis, n_examples: int) -> dict[str, Any]:
    """The bands that the list can be filtered by, and how many features have details."""
    live = analysis.n_features - analysis.record.bands["dead"]
    return {"band_names": BANDS, "n_detailed": min(live, DETAILED_FEATURES)}


def data(analysis: Analysis, n_examples: int) -> dict[str, Any]:
    """What the explorer's script reads; see the head of this file."""
    frequent = analysis.sorted_features("frequency")[:DETAILED_FEATURES].tolist()
    detailed = [feature for feature in frequent if analysis.fires[feature]]
    analysis.preload()
    tokens = {feature: analysis.top_tokens(feature, DETAILED_TOKENS) for feature in detailed}
    examples = {
        feature: [_within_window(example) for example in analysis.examples(feature)[:n_examples]] for feature in detailed
    }
    # the commonest first: their places have the fewest digits
    token_uses = Counter(token.text for shares in tokens.values() for token in shares)
    token_uses.update(text for kept in examples.values() for example in kept for text in example.tokens)
    place = {text: i for i, (text, _) in enumerate(token_uses.most_common())}
    documents = Counter(example.document for kept in examples.values() for example in kept)
    document_place = {name: i for i, (name, _) in enumerate(documents.most_common())}

    def example_columns(example: Example, peak: float) -> list[Any]:
        levels = np.ceil(np.asarray(example.values) / peak * LEVELS).astype(int).tolist()
        texts = [place[text] for text in example.tokens]
        return [_short(example.value), document_place[example.document], example.focus, texts, levels]

    return {
        "n_rows": analysis.n_rows,
        "band_names": list(BANDS),
        "fires": analysis.fires.tolist(),
        "mean": [_short(value) for value in analysis.mean.tolist()],
        "peak": [_short(value) for value in analysis.peak.tolist()],
        "bands": "".join(str(BANDS.index(analysis.band(feature))) for feature in range(analysis.n_features)),
        "vocabulary": list(place),
        "documents": list(document_place),
        "findings": [[finding["feature"], finding["rule"], finding["f1"]] for finding in analysis.findings],
        "details": {
            feature: [
                [[place[token.text], token.count, int(analysis.token_rows[token.token])] for token in tokens[feature]],
                [[partner, together] for partner, together, _ in analysis.partners(feature, DETAILED_PARTNERS)],
                [example_columns(example, float(analysis.peak[feature])) for example in examples[feature]],
            ]
            for feature in detailed
        },
    }


def _within_window(example: Example) -> Example:
    """An example without the places outside its window; a start token has no text and stays when it is what fired."""
    inside = [i for i, text in enumerate(example.tokens) if text or i == example.focus]
    part = slice(inside[0], inside[-1] + 1)
    return Example(example.value, example.document, example.tokens[part], example.values[part], example.focus - inside[0])


def _short(value: float) -> float:
    """Six significant digits: what float32 holds, near enough, in fewer characters."""
    return float(f"{value:.6g}")


VIEW = View(order=30, template=text_beside(__file__), shown=shown, data=data)
