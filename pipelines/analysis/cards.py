"""Features as plain lines for a terminal, and as plain values for `--json`."""

from __future__ import annotations

from typing import Any

import numpy as np

from actstore.errors import InputError
from pipelines.analysis.reader import EXAMPLE_KINDS, Analysis
from pipelines.shared.visible_text import BAR, visible

EXAMPLE_TITLES = {
    "top": "strongest firings, each from another window:",
    "strata": "random firings, one of each part of the feature's firings by strength, weakest first:",
    "random": "random firings:",
}


def feature_rows(analysis: Analysis, sort: str, top: int) -> list[dict[str, Any]]:
    """The first `top` features in an order, with their three most frequent tokens."""
    return [
        {
            "feature": feature,
            "frequency": float(analysis.frequency[feature]),
            "band": analysis.band(feature),
            "mean": float(analysis.mean[feature]),
            "peak": float(analysis.peak[feature]),
            "documents": int(analysis.n_documents[feature]),
            "burstiness": _number(analysis.burstiness[feature]),
            "tokens": [vars(token) for token in analysis.top_tokens(feature, 3)],
        }
        for feature in analysis.sorted_features(sort)[:top].tolist()
    ]


def _number(value: float) -> float | None:
    """A number for JSON: None where it is not defined."""
    return None if np.isnan(value) else float(value)


def joint_rows(analysis: Analysis, top: int) -> dict[str, Any]:
    """The joint frequencies of the most frequent features: the share of rows in which each two fire."""
    features, together = (array[:top] for array in analysis.joint)
    unit = int((analysis.document_rows > 0).sum()) if analysis.record.within == "document" else analysis.n_rows
    return {
        "within": analysis.record.within,
        "features": features.tolist(),
        "together": together[:, : len(features)].tolist(),
        "frequency": (together[:, : len(features)] / max(unit, 1)).tolist(),
    }


def joint_lines(joint: dict[str, Any]) -> list[str]:
    """The matrix of joint frequencies; on the diagonal, each feature's own."""
    lines = [f"share of {'documents' if joint['within'] == 'document' else 'rows'} in which both fire:"]
    lines.append(" " * 8 + "".join(f"{feature:>8}" for feature in joint["features"]))
    for feature, shares in zip(joint["features"], joint["frequency"], strict=True):
        lines.append(f"{feature:>8}" + "".join(f"{share:>8.3%}" for share in shares))
    return lines


def features_lines(rows: list[dict[str, Any]]) -> list[str]:
    """A table of features."""
    lines = [f"{'feature':>7} {'fires':>8} {'band':<9} {'mean':>8} {'peak':>8} {'documents':>9}  tokens (share of firings)"]
    for row in rows:
        tokens = "  ".join(f"{visible(t['text'])!r} {t['share']:.0%}" for t in row["tokens"])
        numbers = f"{row['frequency']:>8.3%} {row['band']:<9} {row['mean']:>8.3f} {row['peak']:>8.3f} {row['documents']:>9,}"
        lines.append(f"{row['feature']:>7} {numbers}  {tokens}")
    return lines


def feature_card(analysis: Analysis, feature: int, examples: str = "top") -> dict[str, Any]:
    """All that an analysis holds of one feature, with one kind of `examples`. Raises InputError for an id that is not a
    feature's."""
    if examples not in EXAMPLE_KINDS:
        raise InputError(f"examples {examples!r}: choose one of {', '.join(EXAMPLE_KINDS)}.")
    analysis.require_feature(feature)
    return {
        "feature": feature,
        "rows": int(analysis.fires[feature]),
        "frequency": float(analysis.frequency[feature]),
        "band": analysis.band(feature),
        "mean": float(analysis.mean[feature]),
        "peak": float(analysis.peak[feature]),
        "quantiles": analysis.quantiles(feature),
        "documents": int(analysis.n_documents[feature]),
        "document_share": float(analysis.n_documents[feature] / max((analysis.document_rows > 0).sum(), 1)),
        "burstiness": _number(analysis.burstiness[feature]),
        "positions": analysis.position_halves(feature),
        "parts": [{"part": name, "rows": n, "lift": lift} for name, n, lift in analysis.top_parts(feature)],
        "tokens": [vars(token) for token in analysis.top_tokens(feature, 8)],
        "partners": [{"feature": f, "rows": n, "lift": _number(lift)} for f, n, lift in analysis.partners(feature)],
        "partners_beyond_chance": _beyond_chance(analysis, feature),
        "examples_kind": examples,
        "examples": [vars(example) for example in analysis.examples(feature, examples)],
    }


def _beyond_chance(analysis: Analysis, feature: int) -> list[dict[str, Any]] | None:
    partners = analysis.partners_beyond_chance(feature)
    names = ("feature", "rows", "expected", "lift")
    return None if partners is None else [dict(zip(names, partner, strict=True)) for partner in partners]


def feature_lines(card: dict[str, Any]) -> list[str]:
    """A feature's card; in the examples, the firing is in brackets and bars show the value at each token."""
    lines = [
        f"feature {card['feature']}: fires in {card['rows']:,} rows ({card['frequency']:.3%}, {card['band']}), "
        f"mean {card['mean']:.3f}, peak {card['peak']:.3f}"
    ]
    if card["rows"]:
        low, middle, high = (card["quantiles"][name] for name in ("0.05", "0.5", "0.95"))
        bursts = (
            "" if card["burstiness"] is None else f"; two firings share one {card['burstiness']:.1f}x as often as two rows"
        )
        lines.append(f"activations: median {middle:.3f}, 5 to 95 % {low:.3f} to {high:.3f}")
        lines.append(f"in {card['documents']:,} documents ({card['document_share']:.1%}){bursts}")
        lines.append(f"firings in the first, second half of a window: {card['positions'][0]:,}, {card['positions'][1]:,}")
    if len(card["parts"]) > 1:
        parts = "  ".join(f"{p['part']} {p['rows']:,} ({p['lift']:.1f}x)" for p in card["parts"])
        lines.append(f"parts of the corpus (rows; against its mean): {parts}")
    if card["tokens"]:
        lines.append("tokens (share of its firings; share of the token's rows it fires on):")
        lines += [f"  {visible(t['text'])!r:<16} {t['share']:>6.1%} {t['recall']:>6.1%}" for t in card["tokens"]]
    if card["partners"]:
        lines.append("fires together with (rows; times more often than if independent):")
        lines += [
            f"  feature {p['feature']:<8} {p['rows']:>8,}" + (f" {p['lift']:>8.1f}x" if p["lift"] is not None else "")
            for p in card["partners"]
        ]
    if card["partners_beyond_chance"]:
        lines.append("together beyond the null of structure (rows on its second half; expected; times that):")
        lines += [
            f"  feature {p['feature']:<8} {p['rows']:>8,} {p['expected']:>10,.1f} {p['lift']:>8.1f}x"
            for p in card["partners_beyond_chance"]
        ]
    if card["examples"]:
        lines.append(EXAMPLE_TITLES[card["examples_kind"]])
    for example in card["examples"]:
        lines.append(f"  {example['value']:.3f}  {example['document']}")
        shown = "".join(
            f"[{visible(token)}]" if place == example["focus"] else visible(token)
            for place, token in enumerate(example["tokens"])
        )
        levels = "".join(
            BAR[round(8 * value / card["peak"])] * (len(visible(token)) + 2 * (place == example["focus"]))
            for place, (token, value) in enumerate(zip(example["tokens"], example["values"], strict=True))
        )
        lines += [f"    {shown}", f"    {levels.rstrip()}"]
    return lines


def firings_lines(result: dict[str, Any]) -> list[str]:
    """A feature's firings, one a line; the token is in brackets."""
    firings, n = result["firings"], result["n_firings"]
    part = "" if len(firings) == n else f", the strongest {len(firings):,} (--top {n} or --json: all)"
    lines = [f"feature {result['feature']}: fires in {n:,} rows of {result['codes']}{part}"]
    if firings:
        lines.append(f"{'value':>9} {'row':>10} {'position':>8}  document: text")
    for firing in firings:
        text = f"{visible(firing['before'])}[{visible(firing['token'])}]{visible(firing['after'])}"
        lines.append(
            f"{firing['value']:>9.4g} {firing['row']:>10,} {firing['position']:>8,}  {visible(firing['document'])}: {text}"
        )
    return lines
