"""In: nothing, or a run. Out: plots of superposition: a toy model over sparsity, an SAE's directions beside chance.

The toy (Elhage et al. 2022, "Toy Models of Superposition"): 20 features in 5 dimensions, x̂ = ReLU(WᵀW x + b), trained on
Σ importance · (x − x̂)² where each feature is 0 with probability S and else uniform in [0, 1]. Dense features get a
dimension each, the five most important ones; the sparser they are, the more are kept, in directions that interfere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actstore.errors import InputError
from actstore.files import json_bytes
from actstore.place import Place
from actstore.sealed_folder import results_folder, seal_folder
from pipelines.metrics.directions import all_pairs, random_directions, unit_rows
from pipelines.sae.checkpoint import load_run

SUMMARY, TOY, KEPT, COSINES = FILES = "superposition.json", "toy.png", "kept.png", "cosines.png"
KEPT_NORM = 0.5
"""Least norm of the direction of a represented feature; norms gather near 0 and 1."""
COSINE_BINS = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class SuperpositionConfig:
    """What `superposition` is asked for; the names are the command's options."""

    out: Path
    run: Path | None = None
    features: int = 20
    dimensions: int = 5
    importance: float = 0.9
    sparsities: int = 9
    steps: int = 3000
    batch: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.dimensions <= self.features or not 0 < self.importance <= 1:
            raise InputError(
                f"features {self.features}, dimensions {self.dimensions}, importance {self.importance}: need 1 <= "
                "dimensions <= features, and an importance in (0, 1] that each feature has of the one before it."
            )
        if min(self.steps, self.batch) < 1 or self.sparsities < 2:
            raise InputError(
                f"steps {self.steps}, batch {self.batch}, sparsities {self.sparsities}: need 1, 1 and 2 at least."
            )

    @property
    def densities(self) -> NDArray[np.float64]:
        """1 − S of each instance: from 1 down to 0.01, evenly in its logarithm."""
        return np.logspace(0, -2, self.sparsities)


@dataclass(frozen=True)
class Toy:
    """Trained instances, one a density: directions `w` (I, n, m), biases (I, n), and their loss over the last steps (I,)."""

    densities: NDArray[np.float64]
    w: NDArray[np.float64]
    b: NDArray[np.float64]
    loss: NDArray[np.float64]

    @property
    def norms(self) -> NDArray[np.float64]:
        """(I, n) lengths of the features' directions."""
        return np.asarray(np.linalg.norm(self.w, axis=2))

    @property
    def kept(self) -> NDArray[np.int64]:
        """(I,) how many features are represented."""
        return (self.norms > KEPT_NORM).sum(axis=1)

    @property
    def gram(self) -> NDArray[np.float64]:
        """(I, n, n) WᵀW: entry (i, j) is the share of feature j that arrives at feature i."""
        return np.asarray(self.w @ self.w.swapaxes(1, 2))

    @property
    def interference(self) -> NDArray[np.float64]:
        """(I,) mean over represented features i of Σ_{j≠i} (ŵ_i · w_j)²: 0 where each has a dimension of its own."""
        unit = self.w / np.maximum(self.norms[..., None], 1e-12)
        overlap = np.square(unit @ self.w.swapaxes(1, 2))
        others = overlap.sum(axis=2) - np.einsum("iff->if", overlap)
        kept = self.norms > KEPT_NORM
        return np.asarray((others * kept).sum(axis=1) / np.maximum(kept.sum(axis=1), 1))


def train_toy(config: SuperpositionConfig) -> Toy:
    """All instances at once, each on its own draws; Adam at 5e-3 with a cosine decay to 0."""
    generator = torch.Generator().manual_seed(config.seed)
    n, m, n_instances = config.features, config.dimensions, config.sparsities
    density = torch.tensor(config.densities, dtype=torch.float32)[:, None, None]
    importance = config.importance ** torch.arange(n, dtype=torch.float32)
    w = torch.randn(n_instances, n, m, generator=generator) / math.sqrt(n)
    w, b = w.requires_grad_(), torch.zeros(n_instances, 1, n, requires_grad=True)
    optimizer = torch.optim.Adam([w, b], lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    shape = (n_instances, config.batch, n)
    last: list[Tensor] = []
    for step in range(config.steps):
        present = torch.rand(shape, generator=generator) < density
        x = torch.rand(shape, generator=generator) * present
        guess = torch.relu(torch.baddbmm(b, torch.bmm(x, w), w.transpose(1, 2)))
        loss = ((x - guess).square() * importance).mean(dim=(1, 2))
        optimizer.zero_grad()
        # Each instance by the scale of its own density: Adam's step does not depend on it, its epsilon would.
        (loss / density.flatten()).sum().backward()
        optimizer.step()
        schedule.step()
        if step >= config.steps * 9 // 10:
            last.append(loss.detach())
    return Toy(
        config.densities,
        w.detach().double().numpy(),
        b.detach()[:, 0].double().numpy(),
        torch.stack(last).mean(dim=0).double().numpy(),
    )


def superposition(config: SuperpositionConfig) -> dict[str, Any]:
    """Train the toy, compare a run's decoder with chance where one is given, and publish figures and plots in `out`.

    Raises OutputExists, LockedStore, and what loading the run raises.
    """
    with results_folder(config.out, FILES) as place:
        return {"out": str(config.out), **_superposition(config, place)}


def _superposition(config: SuperpositionConfig, place: Place) -> dict[str, Any]:
    decoder = None if config.run is None else load_run(config.run)[0].W_dec.numpy()
    toy = train_toy(config)
    result: dict[str, Any] = {
        "features": config.features,
        "dimensions": config.dimensions,
        "toy": [
            {"density": float(d), "kept": int(k), "interference": float(i), "loss": float(loss)}
            for d, k, i, loss in zip(toy.densities, toy.kept, toy.interference, toy.loss, strict=True)
        ],
    }
    plots = {TOY: draw_toy(toy), KEPT: draw_kept(toy, config.dimensions)}
    if decoder is not None:
        result["run"] = {"path": str(config.run), **(cosines := decoder_cosines(decoder, config.seed))}
        plots[COSINES] = draw_cosines(cosines)
    for name, data in plots.items():
        place.publish(name, data)
    place.publish(SUMMARY, json_bytes({"format": "actstore-superposition", "version": 1, **result}))
    seal_folder(place, "superposition", SUMMARY)
    return {**result, "plots": sorted(plots)}


def decoder_cosines(decoder: NDArray[np.floating], seed: int) -> dict[str, Any]:
    """Absolute cosines of all pairs of an SAE's directions (F, d), and of each with its nearest, beside those of as many
    random ones. For random directions the mean square is 1 / d."""
    figures: dict[str, Any] = {"n_features": len(decoder), "d_model": decoder.shape[1], "bins": COSINE_BINS.tolist()}
    for name, own in (("decoder", unit_rows(decoder)), ("random", random_directions(len(decoder), decoder.shape[1], seed))):
        pairs, nearest = all_pairs(own, COSINE_BINS)
        gram = own.T.astype(np.float64) @ own.astype(np.float64)
        n = len(own)
        figures[name] = {
            "pairs": pairs.tolist(),
            "nearest": np.histogram(np.minimum(nearest, 1.0), bins=COSINE_BINS)[0].tolist(),
            "mean_square": float((np.square(gram).sum() - n) / max(n * (n - 1), 1)),
            "mean_nearest": float(nearest.mean(dtype=np.float64)),
            "largest": float(nearest.max()),
            "nearest_quantiles": np.quantile(nearest, [0.05, 0.5, 0.95]).tolist(),
        }
    return figures


def draw_toy(toy: Toy) -> bytes:
    """Above, WᵀW of each instance; below, the features' norms, coloured by how much others point along them."""
    figure = _figure(1.5 * len(toy.densities), 4)
    axes = figure.subplots(2, len(toy.densities), height_ratios=[1, 1.2])
    unit = toy.w / np.maximum(toy.norms[..., None], 1e-12)
    overlap = np.square(unit @ toy.w.swapaxes(1, 2))
    for i, density in enumerate(toy.densities):
        axes[0, i].imshow(toy.gram[i], cmap="RdBu", vmin=-1, vmax=1)
        others = overlap[i].sum(axis=1) - np.diag(overlap[i])
        colours = _colours(np.minimum(others, 1))
        axes[1, i].barh(np.arange(len(others)), toy.norms[i], color=colours)
        axes[1, i].set(xlim=(0, 1.4), ylim=(len(others) - 0.5, -0.5), xlabel="‖W_i‖")
        axes[0, i].set_title(f"1 − S = {density:.3g}\n{toy.kept[i]} kept", fontsize=9)
        for axis in axes[:, i]:
            axis.set_yticks([])
        axes[0, i].set_xticks([])
    axes[0, 0].set_ylabel("WᵀW")
    axes[1, 0].set_ylabel("feature (yellow: interferes)")
    return _png(figure)


def draw_kept(toy: Toy, dimensions: int) -> bytes:
    """The number of represented features, and their interference, over 1 / (1 − S)."""
    figure = _figure(6, 4)
    axes = figure.subplots()
    axes.semilogx(1 / toy.densities, toy.kept, marker="o", label="features kept")
    axes.axhline(dimensions, linestyle=":", color="grey", label="dimensions")
    axes.set(xlabel="1 / (1 − S), sparser to the right", ylabel="features kept", ylim=(0, toy.w.shape[1] + 1))
    right = axes.twinx()
    right.semilogx(1 / toy.densities, toy.interference, marker="s", color="C1", label="interference (right)")
    right.set(ylabel="mean Σ (ŵ_i · w_j)² of the kept")
    figure.legend(loc="outside upper center", ncols=3)
    return _png(figure)


def draw_cosines(figures: dict[str, Any]) -> bytes:
    """Histograms of absolute cosines: all pairs, and each direction with its nearest."""
    figure = _figure(9, 3.5)
    middles = (COSINE_BINS[1:] + COSINE_BINS[:-1]) / 2
    for axes, key, title in zip(
        figure.subplots(1, 2), ("pairs", "nearest"), ("all pairs", "each with its nearest"), strict=True
    ):
        for name in ("decoder", "random"):
            counts = np.array(figures[name][key])
            axes.step(middles, counts / max(counts.sum(), 1), where="mid", label=f"{name} directions")
        axes.set(xlabel="|cosine|", ylabel="share", title=title)
        axes.legend()
    figure.axes[0].set_yscale("log")
    return _png(figure)


def superposition_lines(result: dict[str, Any]) -> list[str]:
    """What `superposition` prints."""
    lines = [
        f"{result['features']} features in {result['dimensions']} dimensions",
        f"{'1 - S':>8}{'kept':>6}{'interference':>14}{'loss':>10}",
    ]
    lines += [
        f"{own['density']:>8.3f}{own['kept']:>6}{own['interference']:>14.3f}{own['loss']:>10.5f}" for own in result["toy"]
    ]
    if run := result.get("run"):
        lines += [
            "",
            f"{run['path']}: {run['n_features']:,} directions in {run['d_model']} dimensions",
            f"{'|cosine|':<10}{'rms':>8}{'nearest':>9}{'largest':>9}",
        ]
        lines += [
            f"{name:<10}{math.sqrt(run[name]['mean_square']):>8.3f}{run[name]['mean_nearest']:>9.3f}{run[name]['largest']:>9.3f}"
            for name in ("decoder", "random")
        ]
    return [*lines, "", f"saved: {result['out']}: {', '.join([SUMMARY, *result['plots']])}"]


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=120)


def _colours(values: NDArray[np.float64]) -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"](values)


def _png(figure: Any) -> bytes:
    import io

    sink = io.BytesIO()
    figure.savefig(sink, format="png")
    return sink.getvalue()
