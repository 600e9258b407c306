"""`sweep.json`, the record of a sweep: the runs of one pass and their comparison. Loads no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from actstore.errors import DamagedStore
from actstore.sealed_folder import open_sealed

FORMAT, VERSION, KIND = "actstore-sweep", 1, "sweep"
SUMMARY, FRONTIER = "sweep.json", "frontier.svg"
HELDOUT = "held-out rows"


def read_sweep(path: str | Path) -> dict[str, Any]:
    """The record of a finished sweep.

    Raises NotAStore when `path` holds none, IncompleteStore for one that is not finished, DamagedStore for one that differs
    from its seal.
    """
    summary: dict[str, Any] = open_sealed(path, KIND, "train").record()
    try:
        if (summary.pop("format"), summary.pop("version")) != (FORMAT, VERSION):
            raise ValueError(f"not of format version {VERSION}")
        comparison_table(summary)
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedStore(f"{path}/{SUMMARY}: not the comparison of a sweep ({error}); train it again.") from error
    return summary


def sweep_value(summary: dict[str, Any]) -> dict[str, Any]:
    """What the file of a sweep holds."""
    return {"format": FORMAT, "version": VERSION, **summary}


def comparison_table(summary: dict[str, Any]) -> list[str]:
    """The runs as a table, highest FVE first, and the data on which they were measured."""
    rows = summary["runs"]
    width = max(len(row["run"]) for row in rows + summary["diverged"])
    lines = [f"{'run':<{width}}{'FVE':>9}{'L0':>9}{'dead':>9}"]
    lines += [f"{row['run']:<{width}}{row['fve']:>9.4f}{row['l0']:>9.1f}{row['dead']:>9.1%}" for row in rows]
    lines += [f"{row['run']:<{width}}  diverged within {row['diverged_within']:,} rows" for row in summary["diverged"]]
    dead = "that fire in none" if summary["measured_on"] == HELDOUT else "silent for long in training"
    return [*lines, f"FVE and L0 of {summary['measured_on']}, dead {dead}"]
