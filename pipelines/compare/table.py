"""What `compare` prints."""

from __future__ import annotations

from typing import Any

CLOSE = (0.7, 0.9)
"""Least similarities with the best partner for a feature to count as shared; both shares are reported."""


def compare_lines(result: dict[str, Any]) -> list[str]:
    """What `compare` prints."""
    lines = [
        f"{run['name']}: {run['site']}, {run['architecture']}, {run['live']:,} of {run['n_features']:,} features live"
        for run in result["runs"]
    ]
    lines.append(
        f"{result['rows']:,} rows encoded by each"
        if result["rows"]
        else "no rows read (--store, --codes): every feature counts as live, and all alike"
    )
    head = f"  {'':<16}{'mean best':>10}{'chance':>8}{'one to one':>12}"
    head += "".join(f"{f'>= {bound}':>9}{'of firings':>12}" for bound in CLOSE)
    for pair in result["pairs"]:
        lines += ["", f"{pair['one']} -> {pair['other']}", head]
        for kind, name in (("decoder", "decoder cosine"), ("coactivation", "co-activation")):
            if kind in pair:
                lines.append(_pair_line(name, pair[kind]))
        lines += [f"  left out: {reason}" for reason in pair.get("left_out", [])]
    if result["stability"]:
        lines += ["", "stability (mean best cosine over the other runs): mean, quartiles"]
        lines += [
            f"  {name:<24}{own['mean']:.3f}   {own['q25']:.3f} {own['median']:.3f} {own['q75']:.3f}"
            for name, own in result["stability"].items()
        ]
    return [*lines, *([f"saved: {result['out']}"] if result["out"] else [])]


def _pair_line(name: str, own: dict[str, Any]) -> str:
    shared = own["shared"][0]
    matched = own["one_to_one"].get("mean")
    cells = (
        f"  {name:<16}{own['mean_best'][0]:>10.3f}{own['random']:>8.3f}{'–' if matched is None else f'{matched:.3f}':>12}"
    )
    return cells + "".join(f"{shared[f'features_{bound}']:>9.1%}{shared[f'firings_{bound}']:>12.1%}" for bound in CLOSE)
