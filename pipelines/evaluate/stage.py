"""In: a run, a store, the model. Out: how well the SAE explains rows and text it was not trained on, kept beside the run.

Rows: the held-out split. Text: the held-out windows through the language model, with the site's activation replaced
by its reconstruction at the positions that are kept as rows; all other positions pass through. Definitions are the
field's, written out in docs/GLOSSARY.md; sums are float64.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from actstore import paths
from actstore.errors import IdentityMismatch, InputError, NotAStore
from actstore.files import json_bytes
from actstore.folder import Folder
from actstore.reader import ActivationStore
from actstore.sealed_folder import open_sealed, require_unfinished, seal_folder, unseal
from pipelines.metrics.model_loss import heldout_text, positions_said, reconstructing
from pipelines.models.load import choose_device, load_model, model_identity
from pipelines.models.sites.site import Site
from pipelines.sae.base import Sae
from pipelines.sae.checkpoint import RunRecord, load_run, require_match
from pipelines.sae.reconstruction_metrics import DENSE, PART, heldout_metrics, heldout_rows
from pipelines.shared.visible_text import BAR

EVALUATION, VERSION = "evaluation", 2
PCA_ROWS = 200_000
BLOCK_COSINES = 1 << 25
"""Cosines of decoder directions in memory at a time: 0.13 GB."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
CLOSE = 0.9


@dataclass(frozen=True)
class EvaluateConfig:
    """What `evaluate` is asked for; the names are the command's options."""

    run: Path
    store: str | Path
    windows: int = 128
    pca: int = 16
    model: str | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.windows < 1 or self.pca < 1:
            raise InputError(f"windows {self.windows}, pca {self.pca}: need at least 1.")


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Every figure of one SAE as plain values, kept in `evaluation_folder`; `saved` says where, None for a run's folder
    that cannot be written to.

    Raises InputError when the store holds no held-out rows, LockedStore while another process makes the same figures.
    """
    store = ActivationStore(config.store)
    sae, record = load_run(config.run)
    require_match(config.run, record, store)
    require_heldout(store)
    if config.pca >= record.d_model:
        raise InputError(
            f"pca {config.pca}: rows have {record.d_model} dimensions; choose --pca {record.d_model - 1} or less."
        )
    with kept_beside(evaluation_folder(config, store.snapshot), EVALUATION) as keep:
        figures = _figures(config, store, sae, record)
        return {**figures, "saved": keep(figures)}


def _figures(config: EvaluateConfig, store: ActivationStore, sae: Sae, record: RunRecord) -> dict[str, Any]:
    device = choose_device(config.device)
    sae.to(device)
    rows = heldout_metrics(sae, store, record.site)
    pca_fve = float(linear_fve(store, record.site, *pca_basis(store, record.site, config.pca))[-1])
    neighbours = nearest_cosines(sae.W_dec)
    model = load_same_model(config.model or record.model, store, device)
    text = heldout_text(model, store, Site.parse(record.site), {"sae": reconstructing(sae)}, config.windows, device)
    return {
        "run_id": record.run_id,
        "store_id": store.store_id,
        "snapshot": store.snapshot,
        "model": record.model,
        "site": record.site,
        "architecture": record.architecture,
        "n_features": record.n_features,
        "k": record.k,
        "rows_seen": record.rows_seen,
        **rows,
        "silent_features": record.figure("dead_features"),
        "silent_share": record.figure("dead_features") / record.n_features,
        "silent_window_rows": record.figure("dead_window_rows"),
        "decoder_cosine": cosine_summary(neighbours),
        "pca_components": config.pca,
        "pca_fve": pca_fve,
        "unexplained_over_pca": (1 - rows["fve"]) / (1 - pca_fve),
        "windows": config.windows,
        "positions": positions_said(store.manifest.policy),
        "text_positions": text.n_positions,
        "text_positions_replaced": text.n_replaced,
        **text.finalize(),
    }


def evaluation_folder(config: EvaluateConfig, snapshot: str) -> Path:
    """Where an evaluation is kept: what it depends on is its name, so that none replaces another.

    >>> config = EvaluateConfig(run=Path("run"), store="store", windows=64)
    >>> evaluation_folder(config, "0123456789abcdef").as_posix()
    'run/evaluations/0123456789abcdef-windows64-pca16'
    """
    return config.run / "evaluations" / f"{snapshot}-windows{config.windows}-pca{config.pca}"


@contextmanager
def kept_beside(folder: Path, kind: str) -> Iterator[Callable[[dict[str, Any]], str | None]]:
    """Hold a folder below a run while figures are made that it will keep; gives what keeps them, and says where.

    Figures of the same kind that are there are replaced. A run's folder that cannot be written to keeps nothing.
    """
    name, run = f"{kind}.json", folder.parent.parent
    if not all(os.access(path, os.W_OK) for path in (run, folder.parent, folder) if path.exists()):
        yield lambda figures: None
        return

    def keep(figures: dict[str, Any]) -> str:
        unseal(place)
        place.publish(name, json_bytes({"format": f"actstore-{kind}", "version": VERSION, **figures}))
        seal_folder(place, kind, name)
        return str(folder / name)

    place = Folder(folder)
    require_unfinished(place, (name,), again=True)
    with place.lock():
        yield keep


def read_evaluation(folder: str | Path, kind: str = EVALUATION) -> dict[str, Any]:
    """The figures that a folder keeps.

    Raises NotAStore when it holds none of the kind, IncompleteStore when they are not finished, DamagedStore when they are
    not those that were sealed."""
    value: dict[str, Any] = open_sealed(folder, kind, "evaluate").record()
    if value.pop("format", None) != f"actstore-{kind}" or value.pop("version", None) != VERSION:
        raise NotAStore(f"{folder}: not of version {VERSION}; run `evaluate` again.")
    return value


def require_heldout(store: ActivationStore) -> None:
    """Raises InputError when a store has nothing to evaluate on."""
    if not store.n_rows(PART):
        raise InputError(f"{store.url}: holds no held-out documents; collect more text, so that some are kept apart.")


def load_same_model(name: str, store: ActivationStore, device: str) -> nn.Module:
    """The model a store was collected from. Raises IdentityMismatch when `name` is another one."""
    model = load_model(name, device, "fp32")
    ours, theirs = model_identity(model).weights_sha256, store.manifest.model.weights_sha256
    if ours != theirs:
        raise IdentityMismatch(
            f"model {name}: has weights {ours[:12]}, {store.url} comes from {theirs[:12]}; name the right one with --model."
        )
    return model


def pca_basis(store: ActivationStore, site: str, n_components: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(d, n) leading principal directions of up to 200,000 training rows, and their mean (d,)."""
    d_model = store.d_model(site)
    n, total, second = 0, np.zeros(d_model), np.zeros((d_model, d_model))
    for shard in store.shards():
        # The first rows of a shard are a uniform sample of it: rows are permuted inside shards.
        x = store.read(shard, paths.acts(site), 0, min(shard.n_rows, 1 + PCA_ROWS // len(store.shards()))).astype(np.float64)
        n, total, second = n + len(x), total + x.sum(axis=0), second + x.T @ x
    mean = total / n
    _, vectors = np.linalg.eigh(second / n - np.outer(mean, mean))
    return vectors[:, ::-1][:, :n_components], mean


def linear_fve(
    store: ActivationStore, site: str, basis: NDArray[np.float64], mean: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(n,) FVE over the held-out rows of projecting on the first 1, 2, … n directions of a basis (d, n) around a mean."""
    n, norm, centred_norm = 0, 0.0, 0.0
    total, along = np.zeros(len(mean)), np.zeros(basis.shape[1])
    for x in heldout_rows(store, site):
        exact = x.astype(np.float64)
        centred = exact - mean
        along += np.square(centred @ basis).sum(axis=0)
        centred_norm += float(np.square(centred).sum())
        n, norm, total = n + len(x), norm + float(np.square(exact).sum()), total + exact.sum(axis=0)
    error = centred_norm - np.cumsum(along)
    fve: NDArray[np.float64] = 1.0 - error / n / (norm / n - float(np.square(total / n).sum()))
    return fve


@torch.no_grad()
def nearest_cosines(directions: Tensor) -> Tensor:
    """(F,) of each direction (F, d), the largest cosine with another one; (0,) where there is no other."""
    unit = directions / directions.norm(dim=1, keepdim=True).clamp_min(1e-12)
    n = len(unit)
    if n < 2:
        return unit.new_zeros(0)
    nearest = unit.new_empty(n)
    for start in range(0, n, max(1, BLOCK_COSINES // n)):
        block = unit[start : start + max(1, BLOCK_COSINES // n)] @ unit.T
        own = torch.arange(len(block), device=unit.device)
        block[own, start + own] = -torch.inf
        nearest[start : start + len(block)] = block.amax(dim=1)
    return nearest


def cosine_summary(nearest: Tensor) -> dict[str, Any]:
    """Mean, quantiles and share above 0.9 of nearest-neighbour cosines. Empty where there are none."""
    if not len(nearest):
        return {}
    values = nearest.double().cpu().numpy()
    quantiles = dict(zip((f"q{100 * q:02.0f}" for q in QUANTILES), np.quantile(values, QUANTILES).tolist(), strict=True))
    return {
        "mean": float(values.mean()),
        "median": quantiles.pop("q50"),
        "max": float(values.max()),
        **quantiles,
        "share_above_0.9": float((values > CLOSE).mean()),
    }


def evaluation_lines(result: dict[str, Any]) -> list[str]:
    """What `evaluate` prints."""
    figures = {
        "variance explained (FVE)": f"{result['fve']:.4f} ({result['pca_components']}-component PCA "
        f"{result['pca_fve']:.4f}; unexplained over the PCA's {result['unexplained_over_pca']:.3f})",
        "active features a row (L0)": f"{result['l0']:.2f}",
        "mean squared error": f"{result['mse']:.4g}",
        "cosine": f"{result['cosine']:.4f}",
        "l2 ratio (shrinkage)": f"{result['l2_ratio']:.4f}",
        "reconstruction bias": _shown(result["relative_reconstruction_bias"]),
        "dead features": f"{result['dead_features']:,} ({result['dead_share']:.1%}), fire in none of these rows",
        "dense features": f"{result['dense_features']:,} ({result['dense_share']:.1%}), fire in more than {DENSE:.0%}",
        "silent features": f"{result['silent_features']:,} ({result['silent_share']:.1%}), "
        f"not in the last {result['silent_window_rows']:,} training rows",
        "log10 of densities": _histogram_line(result["density_histogram"]),
    }
    if cosine := result["decoder_cosine"]:
        figures["nearest decoder direction"] = (
            f"cosine {cosine['mean']:.3f} (median {cosine['median']:.3f}, 95 % below {cosine['q95']:.3f}; "
            f"{cosine['share_above_0.9']:.1%} above {CLOSE})"
        )
    text = [
        ("clean", result["ce_clean"], None, None),
        ("reconstruction", result["ce_sae"], result["delta_ce"], result["kl"]),
        ("mean ablation", result["ce_mean"], result["ce_mean"] - result["ce_clean"], result["kl_mean"]),
        ("zero ablation", result["ce_zero"], result["ce_zero"] - result["ce_clean"], result["kl_zero"]),
    ]
    return [
        f"run {result['run_id']}, store {result['store_id']}: {result['site']}, {result['architecture']}, "
        f"{result['n_features']:,} features",
        f"{result['heldout_rows']:,} held-out rows",
        *(f"  {name:<27} {figure}" for name, figure in figures.items()),
        f"{result['text_tokens']:,} held-out tokens; replaced are {result['text_positions_replaced']:,} of "
        f"{result['text_positions']:,} positions: {result['positions']}",
        f"  {'in nats':<27} {'CE':>9}{'ΔCE':>9}{'KL':>9}",
        *(f"  {name:<27} {ce:>9.4f}{_shown(delta, 9, '+')}{_shown(kl, 9)}".rstrip() for name, ce, delta, kl in text),
        f"  {'CE-loss score':<27} {_shown(result['ce_loss_score'], 9)}    (mean ablation: "
        f"{_shown(result['ce_loss_score_mean'])})",
        f"  {'KL score':<27} {_shown(result['kl_score'], 9)}",
        f"saved: {result['saved'] or 'no, the folder of the run cannot be written to'}",
    ]


def _shown(value: float | None, width: int = 0, sign: str = "") -> str:
    return f"{'' if width else 'none':>{width}}" if value is None else f"{value:>{sign}{width}.4f}"


def _histogram_line(histogram: dict[str, Any]) -> str:
    counts, edges = histogram["counts"], histogram["log10_edges"]
    bars = "".join(BAR[0 if not n else max(1, round(8 * n / max(counts)))] for n in counts)
    return f"{edges[0]:g} |{bars}| {edges[-1]:g}"
