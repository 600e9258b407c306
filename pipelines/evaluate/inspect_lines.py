"""What `inspect` prints."""

from __future__ import annotations

from typing import Any

from pipelines.shared.visible_text import visible


def inspect_lines(result: dict[str, Any]) -> list[str]:
    """The features most active on new texts, each with its strongest firings."""
    lines = [f"{result['tokens']} tokens of {result['texts']} texts; features by mean activation:"]
    for feature in result["features"]:
        lines.append(f"feature {feature['feature']}: mean {feature['mean']:.4f}")
        lines += [
            f"  {firing['value']:>8.3f}  {visible(firing['before'])}[{visible(firing['token'])}]"
            for firing in feature["firings"]
        ]
    return lines
