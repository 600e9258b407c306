"""`sweep.json`, the record of a sweep: the runs of one pass and their comparison. Loads no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from actstore.errors import NotAStore

SUMMARY = "sweep.json"
HELDOUT = "held-out rows"


def read_sweep(path: str | Path) -> dict[str, Any]:
    """The record of a finished sweep. Raises NotAStore when `path` holds none, or an unreadable one."""
    try:
        summary: dict[str, Any] = json.loads((Path(path) / SUMMARY).read_text(encoding="utf-8"))
        comparison_table(summary)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NotAStore(f"{path}: not a finished sweep ({SUMMARY}: {error}); pass a folder that `train` wrote.") from error
    return summary


def comparison_table(summary: dict[str, Any]) -> list[str]:
    """The runs as a table, highest FVE first, and the data on which they were measured."""
    rows = summary["runs"]
    width = max(len(row["run"]) for row in rows + summary["diverged"])
    lines = [f"{'run':<{width}}{'FVE':>9}{'L0':>9}{'dead':>9}"]
    lines += [f"{row['run']:<{width}}{row['fve']:>9.4f}{row['l0']:>9.1f}{row['dead']:>9.1%}" for row in rows]
    lines += [f"{row['run']:<{width}}  diverged within {row['diverged_within']:,} rows" for row in summary["diverged"]]
    dead = "that fire in none" if summary["measured_on"] == HELDOUT else "silent for long in training"
    return [*lines, f"FVE and L0 of {summary['measured_on']}, dead {dead}"]
