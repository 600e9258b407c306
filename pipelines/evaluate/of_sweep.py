"""In: a run or a sweep of runs, a store, the model. Out: the run's figures, or those of each run, kept beside it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from actstore.errors import IdentityMismatch
from actstore.kind import found
from pipelines.evaluate.baselines import BaselinesConfig, evaluate_beside_baselines
from pipelines.evaluate.baselines import lines as run_lines
from pipelines.sae.run_record import read_run_record
from pipelines.train.sweep_record import KIND as SWEEP
from pipelines.train.sweep_record import read_sweep

COLUMNS = {
    "fve": ("FVE", ".4f"),
    "l0": ("L0", ".1f"),
    "dead_share": ("dead", ".1%"),
    "delta_ce": ("ΔCE", "+.4f"),
    "ce_loss_score": ("CE score", ".4f"),
    "kl": ("KL", ".4f"),
}
"""The figures of a sweep's table: heading and form."""


def evaluate_all(config: BaselinesConfig) -> dict[str, Any]:
    """The figures of a run; of a sweep, those of each of its runs, highest FVE first.

    Raises what evaluating a run raises, and IdentityMismatch where another run lies in the place of one of the sweep's.
    """
    if found(config.run).kind != SWEEP:
        return evaluate_beside_baselines(config)
    rows = read_sweep(config.run)["runs"]
    for row in rows:
        own = read_run_record(config.run / row["run"])
        if own.run_id != row["run_id"]:
            raise IdentityMismatch(
                f"{config.run / row['run']}: is run {own.run_id}, the sweep trained {row['run_id']} there; put it back, "
                "or evaluate the runs one by one."
            )
    results = [
        {"run": row["run"], **evaluate_beside_baselines(replace(config, run=config.run / row["run"]))} for row in rows
    ]
    return {"sweep": str(config.run), "runs": sorted(results, key=lambda figures: -figures["fve"])}


def lines(result: dict[str, Any]) -> list[str]:
    """What `evaluate` prints: of a sweep a table, with the baselines of each run where they were asked for."""
    if "sweep" not in result:
        return run_lines(result)
    runs = result["runs"]
    width = max(len(figures["run"]) for figures in runs)
    table = [f"{'run':<{width}}" + "".join(f"{heading:>10}" for heading, _ in COLUMNS.values())]
    for figures in runs:
        cells = ("–" if (value := figures[name]) is None else format(value, form) for name, (_, form) in COLUMNS.items())
        table.append(f"{figures['run']:<{width}}" + "".join(f"{cell:>10}" for cell in cells))
    for figures in runs:
        if "baselines" in figures:
            table += ["", f"{figures['run']}:", *run_lines(figures)]
    unsaved = [figures["run"] for figures in runs if figures["saved"] is None]
    not_kept = [f"not saved, their folders cannot be written to: {', '.join(unsaved)}"] if unsaved else []
    return [*table, f"saved below {result['sweep']}: RUN/evaluations", *not_kept]
