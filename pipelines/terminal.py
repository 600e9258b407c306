"""Features as plain lines for a terminal, and as plain values for `--json`."""

from __future__ import annotations

from typing import Any

from pipelines.analysis import Analysis

BAR = " ▁▂▃▄▅▆▇█"


def visible(text: str) -> str:
    """A token or context with its white space made visible.

    >>> visible("def f():\\n\\treturn")
    'def f():⏎⇥return'
    """
    return text.replace("\r", "␍").replace("\n", "⏎").replace("\t", "⇥")


def feature_rows(analysis: Analysis, sort: str, top: int) -> list[dict[str, Any]]:
    """The first `top` features in an order, with their three most frequent tokens."""
    return [
        {
            "feature": feature,
            "frequency": float(analysis.frequency[feature]),
            "band": analysis.band(feature),
            "mean": float(analysis.mean[feature]),
            "peak": float(analysis.peak[feature]),
            "tokens": [vars(token) for token in analysis.top_tokens(feature, 3)],
        }
        for feature in analysis.sorted_features(sort)[:top].tolist()
    ]


def features_lines(rows: list[dict[str, Any]]) -> list[str]:
    """A table of features."""
    lines = [f"{'feature':>7} {'fires':>8} {'band':<9} {'mean':>8} {'peak':>8}  tokens (share of firings)"]
    for row in rows:
        tokens = "  ".join(f"{visible(t['text'])!r} {t['share']:.0%}" for t in row["tokens"])
        numbers = f"{row['frequency']:>8.3%} {row['band']:<9} {row['mean']:>8.3f} {row['peak']:>8.3f}"
        lines.append(f"{row['feature']:>7} {numbers}  {tokens}")
    return lines


def feature_card(analysis: Analysis, feature: int) -> dict[str, Any]:
    """Everything an analysis knows of one feature. Raises InputError for an id that is not there."""
    analysis.require_feature(feature)
    return {
        "feature": feature,
        "rows": int(analysis.fires[feature]),
        "frequency": float(analysis.frequency[feature]),
        "band": analysis.band(feature),
        "mean": float(analysis.mean[feature]),
        "peak": float(analysis.peak[feature]),
        "tokens": [vars(token) for token in analysis.top_tokens(feature, 8)],
        "partners": [{"feature": f, "rows": n, "lift": lift} for f, n, lift in analysis.partners(feature)],
        "examples": [vars(example) for example in analysis.examples(feature)],
    }


def feature_lines(card: dict[str, Any]) -> list[str]:
    """A feature's card; in the examples, the firing is in brackets and bars show the value at each token."""
    lines = [
        f"feature {card['feature']}: fires in {card['rows']:,} rows ({card['frequency']:.3%}, {card['band']}), "
        f"mean {card['mean']:.3f}, peak {card['peak']:.3f}"
    ]
    if card["tokens"]:
        lines.append("tokens (share of its firings; share of the token's rows it fires on):")
        lines += [f"  {visible(t['text'])!r:<16} {t['share']:>6.1%} {t['recall']:>6.1%}" for t in card["tokens"]]
    if card["partners"]:
        lines.append("fires together with (rows; times more often than if independent):")
        lines += [f"  feature {p['feature']:<8} {p['rows']:>8,} {p['lift']:>8.1f}x" for p in card["partners"]]
    if card["examples"]:
        lines.append("strongest firings, each from another window:")
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


def inspect_lines(found: dict[str, Any]) -> list[str]:
    """The features most active on new texts, each with its strongest firings."""
    lines = [f"{found['tokens']} tokens of {found['texts']} texts; features by mean activation:"]
    for feature in found["features"]:
        lines.append(f"feature {feature['feature']}: mean {feature['mean']:.4f}")
        lines += [
            f"  {firing['value']:>8.3f}  {visible(firing['before'])}[{visible(firing['token'])}]"
            for firing in feature["firings"]
        ]
    return lines
