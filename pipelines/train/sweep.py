"""In: a store and values for some of `train`'s options. Out: a run for each combination of values, and their comparison.

All SAEs are trained in one pass over the store. One folder holds the runs, each named by the options in which they differ,
with `sweep.json` (the comparison) and `frontier.svg` (FVE over L0), which are sealed. The runs are compared on held-out
rows, or on the last training batch where the store has no held-out rows.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import Any

from actstore.errors import InputError, OutputExists
from actstore.files import publish_json
from actstore.folder import Folder
from actstore.reader import ActivationStore
from actstore.sealed_folder import is_sealed, seal_folder
from pipelines.models.load import choose_device
from pipelines.sae.checkpoint import load_run
from pipelines.sae.reconstruction_metrics import heldout_metrics
from pipelines.train.config import OWN, TrainConfig
from pipelines.train.ranks import is_first_process
from pipelines.train.stage import alone, finish, train, train_together
from pipelines.train.sweep_record import FRONTIER, HELDOUT, KIND, SUMMARY, comparison_table, sweep_value

SWEPT = tuple(name for name in OWN if name != "out")
COMPARED_ROWS = 200_000
"""At most this many held-out rows: the standard error of an FVE is then far below the difference between SAEs."""
COMPARED = ("fve", "l0", "dead", "loss")
HELDOUT_FIGURES = {"fve": "fve", "l0": "l0", "dead": "dead_share", "heldout_rows": "heldout_rows"}
BATCH = "the last training batch"


def sweep(options: dict[str, Any]) -> dict[str, Any]:
    """`train` with a tuple of values for any of `SWEPT`. A single combination is trained by `train`.

    Raises InputError for a value that is given twice, OutputExists for a finished sweep, and all that `train_together`
    raises.
    """
    configs = grid(options)
    if len(configs) == 1:
        return train(configs[0])
    out = Path(options["out"])
    if is_sealed(out):
        raise OutputExists(f"{out}: holds a finished sweep; choose another --out, or move it away.")
    with alone(configs, out):
        return _swept(configs, str(options["store"]), out)


def _swept(configs: list[TrainConfig], store: str, out: Path) -> dict[str, Any]:
    results = train_together(configs, out)
    speed = {"sweep": str(out), "rows_per_s": results[0]["rows_per_s"], "data_wait_share": results[0]["data_wait_share"]}
    if not is_first_process():
        return speed
    pairs = list(zip(configs, results, strict=True))
    finished = [(config, result) for config, result in pairs if "diverged_within" not in result]
    diverged = [
        _named(config) | {"diverged_within": result["diverged_within"]}
        for config, result in pairs
        if "diverged_within" in result
    ]
    measured_on, figures = compared_figures(*map(list, zip(*finished, strict=True)))
    rows = [
        _named(config) | {"run_id": result["run_id"]} | of_run
        for (config, result), of_run in zip(finished, figures, strict=True)
    ]
    rows.sort(key=lambda row: -row["fve"])
    draw_frontier(rows, out / FRONTIER, measured_on)
    summary = {
        "store": store,
        "measured_on": measured_on,
        "runs": rows,
        "diverged": diverged,
        "frontier": str(out / FRONTIER),
    }
    publish_json(out / SUMMARY, sweep_value(summary))
    seal_folder(Folder(out), KIND, SUMMARY, [SUMMARY, FRONTIER])
    finish(out)
    return {**speed, **summary}


def grid(options: dict[str, Any]) -> list[TrainConfig]:
    """One configuration per combination of values; its `out` is named by the options that vary.

    >>> [config.out.as_posix() for config in grid({"store": "s", "out": "o", "k": (8, 16), "features": (64,)})]
    ['o/k8', 'o/k16']
    """
    values = {name: _values(name, options[name]) for name in SWEPT if name in options}
    varied = [name for name in values if len(values[name]) > 1]
    rest = {name: value for name, value in options.items() if name not in values}
    configs = []
    for chosen in product(*values.values()):
        value = dict(zip(values, chosen, strict=True))
        name = "-".join(value[key] if isinstance(value[key], str) else f"{key}{value[key]}" for key in varied)
        configs.append(TrainConfig(**{**rest, **value, "out": Path(options["out"]) / name}))
    return configs


def _named(config: TrainConfig) -> dict[str, Any]:
    return {"run": config.out.name, **{name: getattr(config, name) for name in SWEPT}}


def compared_figures(configs: list[TrainConfig], results: list[dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """The data on which the runs are compared, and each run's FVE, L0 and share of dead features there.

    On held-out rows, a dead feature fires in no row; in training, it has not fired for long. All runs are compared on the
    same data: on the last training batch if any site's held-out rows are missing or do not vary. The figures of training are
    always included, as `training_…`.
    """
    training = [{f"training_{name}": result["metrics"][name] for name in COMPARED} for result in results]
    store = ActivationStore(configs[0].store, snapshot=results[0]["snapshot"])
    with suppress(InputError):
        figures = []
        for config, of_training in zip(configs, training, strict=True):
            sae, record = load_run(config.out)
            heldout = heldout_metrics(sae.to(choose_device(config.device)), store, record.site, COMPARED_ROWS)
            figures.append({name: heldout[key] for name, key in HELDOUT_FIGURES.items()} | of_training)
        return HELDOUT, figures
    return BATCH, [
        {name: of_training[f"training_{name}"] for name in HELDOUT_FIGURES if name != "heldout_rows"} | of_training
        for of_training in training
    ]


def draw_frontier(rows: list[dict[str, Any]], path: Path, measured_on: str) -> None:
    """Draw FVE over L0, with one line for each architecture, site and number of features."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        layer = "" if row["layer"] is None else f".{row['layer']}"
        lines.setdefault(f"{row['architecture']} {row['site']}{layer} {row['features']:,}", []).append(
            (row["l0"], row["fve"])
        )
    for label, points in sorted(lines.items()):
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    axes.set(xlabel="L0 (active features in a row)", ylabel="variance explained (FVE)", title=measured_on)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path)


def comparison_lines(summary: dict[str, Any]) -> list[str]:
    """The comparison as a table, highest FVE first."""
    *lines, measured = comparison_table(summary)
    speed = f"{summary['rows_per_s']:,} rows/s of {len(summary['runs'])} SAEs each"
    return [*lines, f"{measured}; {speed}; plot: {summary['frontier']}"]


def _values(name: str, given: Any) -> tuple[Any, ...]:
    default = next(field.default for field in fields(TrainConfig) if field.name == name)
    values = given if isinstance(given, tuple) else (given,)
    if len(set(values)) < len(values):
        raise InputError(f"{name} {', '.join(map(str, values))}: a value is given twice; give each once.")
    return values or (default,)
