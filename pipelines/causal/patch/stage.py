"""In: a clean text, a corrupt one or none, a model, perhaps a run. Out: what patching each place does to the answer.

Exact, an intervention for every cell of a grid; or estimated for all cells at once by one backward pass, with the measured
agreement to some exact ones.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actstore.errors import InputError
from actstore.lease import held_file
from pipelines.causal.attribute.logit_parts import require_position
from pipelines.causal.engine.answer_metrics import Metric, change_metric, pair_metric, require_metric
from pipelines.causal.engine.language_model import LanguageModel, Prompt, Spliced, open_either
from pipelines.causal.engine.trace import trace
from pipelines.causal.patch.gradient_estimates import activation_effects, feature_effects, gradients, integrated_gradients
from pipelines.causal.patch.heatmap import heat_lines, require_picture_path, save_heatmap
from pipelines.causal.patch.patch_grid import (
    DIRECTIONS,
    Grid,
    Pair,
    dense_codes,
    feature_cells,
    feature_grid,
    n_heads_at,
    patch_cells,
    patch_grid,
    require_equal_length,
    row_names,
    run_logits,
)
from pipelines.causal.patch.rank_agreement import agreement
from pipelines.models.capture import require_patched
from pipelines.models.forward import blocks_of
from pipelines.models.sites.registry import patched_names
from pipelines.models.sites.site import Site
from pipelines.shared.visible_text import visible

FEATURES = "features"
METHODS = ("exact", "attribution")
KL_STEPS = 16
"""Steps of integrated gradients for KL, whose plain gradient is zero, where no number is asked for."""


@dataclass(frozen=True)
class PatchConfig:
    """What `patch` is asked for; the names are the command's options."""

    clean: str
    corrupt: str | None = None
    run: Path | None = None
    store: str | None = None
    model: str | None = None
    site: str = "resid_pre"
    metric: str | None = None
    direction: str = "denoising"
    method: str = "exact"
    target: str | None = None
    against: str | None = None
    position: int = -1
    top: int = 12
    steps: int = 0
    check: int = 0
    seed: int = 0
    out: Path | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("site", self.site, (*patched_names(), FEATURES)),
            ("direction", self.direction, DIRECTIONS),
            ("method", self.method, METHODS),
        ):
            if value not in known:
                raise InputError(f"{name} {value!r}: known are {', '.join(known)}.")
        if self.metric is not None:
            require_metric(self.metric)
        if (self.site == FEATURES) != (self.run is not None):
            raise InputError(f"site {self.site!r}: --site features and --run need each other; give both or neither.")
        if self.corrupt is None and self.site != FEATURES:
            raise InputError(
                f"site {self.site!r}: needs a corrupt text to patch with; only features can be ablated without."
            )
        if self.top < 1 or self.steps < 0 or self.check < 0:
            raise InputError(f"top {self.top}, steps {self.steps}, check {self.check}: need at least 1, 0 and 0.")
        if (self.steps or self.check) and self.method != "attribution":
            raise InputError("steps and check: belong to attribution patching; add --method attribution.")
        if self.out is not None:
            require_picture_path(self.out)


@dataclass(frozen=True)
class Task:
    """What a grid is made of: the run that is patched, codes or activations to patch with, and the figure."""

    lm: LanguageModel
    spliced: Spliced | None
    prompt: Prompt
    pair: Pair
    metric: Metric
    kept: Tensor
    """(position,) where codes are read in both texts."""
    change: Tensor | None
    """(position, n_features) what the codes of the patched run change by; None where no features are patched."""


def patch(config: PatchConfig) -> dict[str, Any]:
    """Patch every place of a site, and give the grid of figures; with `out` also a picture.

    Without a corrupt text the features are ablated (their codes set to 0). Features are shown by falling estimated effect.
    The default answers are the most likely tokens of the two runs. Raises InputError for texts of unequal length, and for
    answers that the runs do not tell apart."""
    lm, spliced = open_either(config.run, config.store, config.model, config.device)
    if spliced is not None:
        require_patched(lm.model, spliced.site)
    with nullcontext() if config.out is None else held_file(config.out):
        return _patched(config, lm, spliced)


def _patched(config: PatchConfig, lm: LanguageModel, spliced: Spliced | None) -> dict[str, Any]:
    task, answers = _task(config, lm, spliced)
    notes: list[str] = []
    steps = _steps(config, task, notes)
    if spliced is None:
        exact = config.method == "exact"
        grid = patch_grid(lm.model, task.pair, config.site, task.metric.of) if exact else _estimated(config, task, steps)
    else:
        grid = _features(config, task, steps)
    columns = [*task.prompt.texts, "all"]
    values = [[float(v) if math.isfinite(v) else None for v in row] for row in grid.values.tolist()]
    result = {
        "model": lm.name,
        "run_id": spliced.record.run_id if spliced else None,
        "site": spliced.site.label if spliced else config.site,
        "direction": config.direction if config.corrupt is not None else "ablation",
        "method": config.method if not steps else f"integrated gradients, {steps} steps",
        "metric": task.metric.name,
        "unit": task.metric.unit,
        **answers,
        "clean": task.metric.clean,
        "corrupt": task.metric.corrupt,
        "tokens": list(task.prompt.texts),
        "rows": list(grid.rows),
        "columns": columns,
        "values": values,
        "notes": notes,
        "agreement": _agreement(config, task, grid) if config.check else None,
        "picture": None if config.out is None else str(config.out),
    }
    if config.out is not None:
        shown = grid.values.tolist()
        save_heatmap(config.out, grid.rows, columns, shown, f"{result['direction']}, {result['site']}", task.metric.unit)
    return result


def _task(config: PatchConfig, lm: LanguageModel, spliced: Spliced | None) -> tuple[Task, dict[str, Any]]:
    """The runs, the figure, and the answers as text."""
    prompt = lm.prompt(config.clean)
    other = prompt if config.corrupt is None else lm.prompt(config.corrupt)
    require_equal_length(prompt, other)
    clean = trace(lm.model, prompt.ids)
    corrupt = clean if config.corrupt is None else trace(lm.model, other.ids)
    at = require_position(clean, config.position)
    pair = Pair(clean, corrupt, config.direction, at)
    first, last = (run_logits(lm.model, run, at) for run in (clean, corrupt))
    target = int(first.argmax()) if config.target is None else lm.token(config.target)
    against = None if config.against is None else lm.token(config.against)
    if config.corrupt is None:
        metric = change_metric(config.metric or "log_probability", first, target, against)
    else:
        against = int(last.argmax()) if against is None else against
        name = config.metric or "logit_difference"
        if name == "logit_difference" and target == against:
            name = lm.codec.token_text(target)
            raise InputError(
                f"both texts are most likely followed by {name!r}, so there is no difference of answers; name two with "
                "--target and --against."
            )
        metric = pair_metric(name, first, last, target, against)
    kept, change = prompt.kept & other.kept, None
    if spliced is not None:
        own = dense_codes(spliced.sae, pair.into.at(spliced.site), kept)
        change = -own if config.corrupt is None else dense_codes(spliced.sae, pair.source.at(spliced.site), kept) - own
    text = lm.codec.token_text
    answers = {"target": text(target), "against": None if against is None else text(against)}
    return Task(lm, spliced, prompt, pair, metric, kept, change), answers


def _steps(config: PatchConfig, task: Task, notes: list[str]) -> int:
    """Steps of integrated gradients; 0 for one gradient."""
    estimated = config.method == "attribution" or task.spliced is not None
    if config.steps or not estimated or task.metric.name != "kl" or task.pair.into is not task.pair.clean:
        return config.steps
    notes.append(
        f"the gradient of KL is zero at the clean run, where KL has its minimum: {KL_STEPS} steps of integrated gradients "
        "in its place; they tell large effects from small ones, but not how large"
    )
    return KL_STEPS


def _estimated(config: PatchConfig, task: Task, steps: int) -> Grid:
    """The grid of a site by gradients: each cell the metric before plus its estimated change, the last column their sum."""
    model, pair, before = task.lm.model, task.pair, _before(task)
    sites = [Site(config.site, layer) for layer in range(len(blocks_of(model)))]
    if steps:
        slopes = {
            s.label: integrated_gradients(model, pair.into, s, pair.source.at(s), task.metric.of, steps, pair.at)
            for s in sites
        }
    else:
        slopes = gradients(model, pair.into, sites, task.metric.of, pair.at)
    effects = torch.cat(
        [activation_effects(pair.into, pair.source, s, slopes[s.label], n_heads_at(model, s)) for s in sites]
    ).double()
    names = [name for site in sites for name in row_names(model, site)]
    return Grid(tuple(names), before + torch.cat([effects, effects.sum(dim=1, keepdim=True)], dim=1).cpu())


def feature_estimates(task: Task, steps: int) -> Tensor:
    """(position, n_features) estimated change of the metric by each feature's patch."""
    assert task.spliced is not None
    assert task.change is not None
    model, site, sae, run = task.lm.model, task.spliced.site, task.spliced.sae, task.pair.into
    if steps:
        end = run.at(site) + task.change @ sae.W_dec.to(task.change.dtype)
        slope = integrated_gradients(model, run, site, end, task.metric.of, steps, task.pair.at)
    else:
        slope = gradients(model, run, [site], task.metric.of, task.pair.at)[site.label]
    return feature_effects(task.change, sae, slope)


def _features(config: PatchConfig, task: Task, steps: int) -> Grid:
    """The grid of the features whose estimated effects, summed in size over positions, are largest."""
    assert task.spliced is not None
    assert task.change is not None
    effects = feature_estimates(task, steps).double()
    changed = (task.change != 0).any(dim=0).nonzero()[:, 0]
    order = effects[:, changed].abs().sum(dim=0).argsort(descending=True)[: config.top]
    chosen = changed[order].tolist()
    if not chosen:
        raise InputError("no feature's code differs between the two texts: there is nothing to patch; choose other texts.")
    if config.method == "exact":
        return feature_grid(
            task.lm.model, task.pair.into, task.spliced.site, task.spliced.sae, chosen, task.change, task.kept,
            task.metric.of, task.pair.at,
        )  # fmt: skip
    own = effects[:, chosen].T
    values = _before(task) + torch.cat([own, own.sum(dim=1, keepdim=True)], dim=1).cpu()
    values[:, :-1][:, ~task.kept.cpu()] = torch.nan
    return Grid(tuple(f"feature {feature}" for feature in chosen), values)


def _before(task: Task) -> float:
    """The metric of the patched run as it is."""
    return float(task.metric.of(run_logits(task.lm.model, task.pair.into, task.pair.at)))


def _agreement(config: PatchConfig, task: Task, grid: Grid) -> dict[str, Any]:
    """The estimates against exact interventions in `check` cells: of the grid, or of all features whose codes change."""
    model, metric, n_positions = task.lm.model, task.metric, len(task.pair.into)
    if task.spliced is not None:
        site, sae, change = task.spliced.site, task.spliced.sae, task.change
        assert change is not None
        estimates = _before(task) + feature_estimates(task, _steps(config, task, [])).double().T

        def exact(row: Tensor, column: Tensor) -> Tensor:
            return feature_cells(model, task.pair.into, site, sae, change, row, column, metric.of, task.pair.at)

        return agreement(estimates, change.T != 0, exact, _before(task), config.check, config.seed)
    n_heads = len(grid.rows) // len(blocks_of(model))

    def exact_of_grid(row: Tensor, column: Tensor) -> Tensor:
        figures = torch.zeros(len(row), dtype=torch.float64)
        for layer in (row // n_heads).unique().tolist():
            own = row // n_heads == layer
            place = Site(config.site, layer)
            figures[own] = patch_cells(model, task.pair, place, row[own] % n_heads, column[own], metric.of)
        return figures

    estimates = grid.values[:, :n_positions]
    return agreement(estimates, torch.ones_like(estimates), exact_of_grid, _before(task), config.check, config.seed)


def patch_lines(result: dict[str, Any]) -> list[str]:
    """The direction of the patch, the heat map, and notes on both."""
    answers = f"answer {visible(result['target'])!r}"
    if result["against"] is not None:
        answers += f" against {visible(result['against'])!r}"
    ends = f"clean {result['clean']:.3f}"
    if result["corrupt"] is not None:
        ends += f", corrupt {result['corrupt']:.3f}"
    values = [[math.nan if v is None else v for v in row] for row in result["values"]]
    lines = [
        f"{result['model']}, {result['site']}, {result['direction']}, {result['method']}: {answers}",
        f"{result['unit']}: {ends}",
        *heat_lines(result["rows"], result["columns"], values),
        *(f"note: {note}" for note in result["notes"]),
    ]
    if result["agreement"] is not None:
        own = result["agreement"]
        rank = "not defined" if own["rank_correlation"] is None else f"{own['rank_correlation']:.3f}"
        lines.append(f"against {own['cells']} exact interventions: rank correlation {rank}")
        if own["cells"]:
            lines[-1] += f"; largest effect {own['largest_exact']:.3f}, largest difference {own['largest_difference']:.3f}"
    if result["picture"] is not None:
        lines.append(f"saved: {result['picture']}")
    return lines
