"""In: an analysis. Out: one self-contained HTML page.

The page loads nothing: style, script and data are inside it. The data is one JSON object:

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray

from actstore.errors import InputError, OutputExists
from actstore.files import publish_bytes, require_free_space
from pipelines.analysis.reader import Analysis, Example
from pipelines.statistics.bands import BAND_RANGES, BANDS

DETAILED_FEATURES = 5_000
"""The page stays bounded: rarer features keep their row in the list and lose tokens, partners and examples."""
DETAILED_TOKENS, DETAILED_PARTNERS = 10, 8
LEVELS = 99
BINS_PER_DECADE = 10


@dataclass(frozen=True)
class ReportConfig:
    """What `report` is asked for; the names are the command's options."""

    analysis: str | Path
    out: Path
    examples: int = 5

    def __post_init__(self) -> None:
        if self.examples < 1:
            raise InputError(f"examples {self.examples}: need at least 1.")


def report(config: ReportConfig) -> dict[str, Any]:
    """Write the page of an analysis; returns its path, the number of features and its length in bytes.

    Raises OutputExists, NotAStore (no analysis there), DamagedStore (unreadable findings) or NoSpace; nothing is
    written then.
    """
    if config.out.exists():
        raise OutputExists(f"{config.out}: exists; choose another --out, or move it away.")
    analysis = Analysis(config.analysis)
    page = render(analysis, analysis.findings, config.examples).encode()
    require_free_space(config.out, len(page), "the page")
    publish_bytes(config.out, page)
    return {"page": str(config.out), "features": analysis.n_features, "bytes": len(page)}


def render(analysis: Analysis, findings: list[dict[str, Any]], n_examples: int) -> str:
    """The page as text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # jinja2's tojson escapes < > & ' on top of this, so that no token can end the script element
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "ensure_ascii": False, "allow_nan": False}
    counts = [analysis.record["bands"][name] for name in BANDS]
    return environment.get_template("template.html").render(
        record=analysis.record,
        bands=list(zip(BANDS, BAND_RANGES, counts, strict=True)),
        density=frequency_density(analysis.fires, analysis.n_rows),
        findings=findings,
        n_detailed=min(analysis.n_features - analysis.record["bands"]["dead"], DETAILED_FEATURES),
        data=page_data(analysis, findings, n_examples),
    )


def page_data(analysis: Analysis, findings: list[dict[str, Any]], n_examples: int) -> dict[str, Any]:
    """The data inside the page; see the head of this file."""
    frequent = analysis.sorted_features("frequency")[:DETAILED_FEATURES].tolist()
    detailed = [feature for feature in frequent if analysis.fires[feature]]
    analysis.preload()
    tokens = {feature: analysis.top_tokens(feature, DETAILED_TOKENS) for feature in detailed}
    examples = {feature: [_shown(example) for example in analysis.examples(feature)[:n_examples]] for feature in detailed}
    # the commonest first: their places have the fewest digits
    token_uses = Counter(token.text for shares in tokens.values() for token in shares)
    token_uses.update(text for found in examples.values() for example in found for text in example.tokens)
    place = {text: i for i, (text, _) in enumerate(token_uses.most_common())}
    documents = Counter(example.document for found in examples.values() for example in found)
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
        "findings": [[found["feature"], found["rule"], found["f1"]] for found in findings],
        "details": {
            feature: [
                [[place[token.text], token.count, int(analysis.token_rows[token.token])] for token in tokens[feature]],
                [[partner, together] for partner, together, _ in analysis.partners(feature, DETAILED_PARTNERS)],
                [example_columns(example, float(analysis.peak[feature])) for example in examples[feature]],
            ]
            for feature in detailed
        },
    }


def frequency_density(fires: NDArray[np.int64], n_rows: int) -> dict[str, Any]:
    """How many live features fire how often: equal bins of log10 of the frequency, from a whole decade up to 0.

    >>> frequency_density(np.array([0, 1, 1, 100]), 100)["decades"]
    [-2, -1, 0]
    >>> sum(frequency_density(np.array([0, 1, 1, 100]), 100)["counts"])
    3
    """
    exponents = np.log10(fires[fires > 0] / max(n_rows, 1))
    lowest = min(int(np.floor(exponents.min(initial=0))), -1)
    counts, _ = np.histogram(exponents, bins=-lowest * BINS_PER_DECADE, range=(lowest, 0))
    return {"counts": counts.tolist(), "decades": list(range(lowest, 1)), "top": round_up(int(counts.max()))}


def round_up(count: int) -> int:
    """The next even multiple, 2 to 20, of a power of ten, so that an axis and its middle are round.

    >>> [round_up(n) for n in (0, 1, 3, 10, 37, 116, 2007)]
    [2, 2, 4, 10, 40, 120, 4000]
    """
    step = 1
    while count > 20 * step:
        step *= 10
    return max(-(-count // (2 * step)), 1) * 2 * step


def _shown(example: Example) -> Example:
    """An example without the places outside its window; a start token has no text and stays when it is what fired."""
    inside = [i for i, text in enumerate(example.tokens) if text or i == example.focus]
    part = slice(inside[0], inside[-1] + 1)
    return Example(example.value, example.document, example.tokens[part], example.values[part], example.focus - inside[0])


def _short(value: float) -> float:
    """Six significant digits: what float32 holds, near enough, in fewer characters."""
    return float(f"{value:.6g}")
