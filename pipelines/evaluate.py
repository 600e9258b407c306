"""In: a run and a store. Out: how well the SAE explains rows and text it was not trained on.

Rows: the held-out split. Text: the held-out windows through the language model, with the site's activation replaced
by its reconstruction at the positions that are kept as rows; all other positions pass through. Definitions are the
field's, written out in docs/GLOSSARY.md; sums are float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from actstore.errors import IdentityMismatch, InputError
from actstore.reader import ActivationStore
from pipelines.capture import Site, choose_device, hooked, load_model, model_identity
from pipelines.progress import track
from pipelines.sae.base import Sae
from pipelines.sae.checkpoint import load_run, require_match
from pipelines.windows import Windows

PART = "heldout"
BATCH_ROWS = 8192
BATCH_WINDOWS, BATCH_POSITIONS = 16, 2048
"""At most, of one forward pass: 2,048 positions are 0.4 GB of logits for GPT-2, a few copies of which are alive at once."""
PCA_ROWS = 200_000


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
    """Every figure of one SAE as plain values. Raises InputError when the store holds no held-out rows."""
    store = ActivationStore(config.store)
    sae, record = load_run(config.run)
    require_match(config.run, record, store)
    if not store.n_rows(PART):
        raise InputError(f"{store.url}: holds no held-out documents; collect more text, so that some are kept apart.")
    if config.pca >= record.d_model:
        raise InputError(
            f"pca {config.pca}: rows have {record.d_model} dimensions; choose --pca {record.d_model - 1} or less."
        )
    device = choose_device(config.device)
    rows = evaluate_rows(sae.to(device), store, record.site)
    basis, mean = pca_basis(store, record.site, config.pca)
    pca_fve = linear_fve(store, record.site, basis, mean)
    model = load_model(config.model or record.model, device, "fp32")
    require_same_model(model, store, config.model or record.model)
    text = evaluate_text(sae, model, store, Site.parse(record.site), config.windows, device)
    return {
        "run_id": record.run_id,
        "store_id": store.store_id,
        "site": record.site,
        **rows,
        "pca_components": config.pca,
        "pca_fve": pca_fve,
        "unexplained_over_pca": (1 - rows["fve"]) / (1 - pca_fve),
        "dead_features": record.metrics["dead_features"],
        "dead_share": record.metrics["dead_features"] / record.n_features,
        "dead_window_rows": record.metrics["dead_window_rows"],
        **text,
    }


def require_same_model(model: nn.Module, store: ActivationStore, name: str) -> None:
    """Raises IdentityMismatch when a loaded model is not the one a store was collected from."""
    ours, theirs = model_identity(model).weights_sha256, store.manifest.model.weights_sha256
    if ours != theirs:
        raise IdentityMismatch(
            f"model {name}: has weights {ours[:12]}, {store.url} comes from {theirs[:12]}; name the right one with --model."
        )


def evaluate_rows(sae: Sae, store: ActivationStore, site: str) -> dict[str, float]:
    """FVE, MSE, L0, cosine, shrinkage and the share of features that never fire, over the held-out rows.

    fve = 1 − E‖x−x̂‖² / (E‖x‖² − ‖E x‖²); l2_ratio = mean ‖x̂‖/‖x‖; cosine = mean cos(x, x̂).
    """
    device = sae.W_dec.device
    n, firings = 0, 0
    error = norm = cosine = ratio = 0.0
    total = np.zeros(sae.d_model)
    fired = torch.zeros(sae.n_features, dtype=torch.bool, device=device)
    for x in _held_out_rows(store, site):
        batch = torch.from_numpy(x).to(device)
        with torch.inference_mode():
            reconstruction, values, indices = sae(batch)
        fired[indices[values > 0]] = True
        exact, guess = batch.double(), reconstruction.double()
        n += len(x)
        firings += int((values > 0).sum())
        error += float((exact - guess).square().sum())
        norm += float(exact.square().sum())
        total += exact.sum(dim=0).cpu().numpy()
        cosine += float(torch.nn.functional.cosine_similarity(exact, guess).sum())
        ratio += float((guess.norm(dim=1) / exact.norm(dim=1).clamp_min(1e-12)).sum())
    variance = norm / n - float(np.square(total / n).sum())
    if variance <= 0:
        raise InputError(f"{store.url}: its {n} held-out rows do not vary; collect more text.")
    return {
        "heldout_rows": n,
        "fve": 1.0 - error / n / variance,
        "mse": error / n / sae.d_model,
        "l0": firings / n,
        "cosine": cosine / n,
        "l2_ratio": ratio / n,
        "never_fired_heldout": float((~fired).float().mean()),
    }


def pca_basis(store: ActivationStore, site: str, n_components: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(d, n) leading principal directions of up to 200,000 training rows, and their mean (d,)."""
    d_model = store.d_model(site)
    n, total, second = 0, np.zeros(d_model), np.zeros((d_model, d_model))
    for shard in store.shards():
        # The first rows of a shard are a uniform sample of it: rows are permuted inside shards.
        x = store.read(shard, f"acts/{site}", 0, min(shard.n_rows, 1 + PCA_ROWS // len(store.shards()))).astype(np.float64)
        n, total, second = n + len(x), total + x.sum(axis=0), second + x.T @ x
    mean = total / n
    _, vectors = np.linalg.eigh(second / n - np.outer(mean, mean))
    return vectors[:, ::-1][:, :n_components], mean


def linear_fve(store: ActivationStore, site: str, basis: NDArray[np.float64], mean: NDArray[np.float64]) -> float:
    """FVE of the projection on a basis (d, n) around a mean, over the held-out rows."""
    n, error, norm, total = 0, 0.0, 0.0, np.zeros(len(mean))
    for x in _held_out_rows(store, site):
        exact = x.astype(np.float64)
        centred = exact - mean
        error += float(np.square(centred - (centred @ basis) @ basis.T).sum())
        n, norm, total = n + len(x), norm + float(np.square(exact).sum()), total + exact.sum(axis=0)
    return 1.0 - error / n / (norm / n - float(np.square(total / n).sum()))


def _held_out_rows(store: ActivationStore, site: str) -> Any:
    for shard in store.shards(PART):
        for start in range(0, shard.n_rows, BATCH_ROWS):
            yield store.read(shard, f"acts/{site}", start, min(start + BATCH_ROWS, shard.n_rows))


def evaluate_text(
    sae: Sae, model: nn.Module, store: ActivationStore, site: Site, n_windows: int, device: str
) -> dict[str, float | None]:
    """Next-token cross-entropy (nats) with the site's activation kept, reconstructed, zeroed, or set to its mean.

    delta_ce = CE_sae − CE_clean; ce_loss_score = (CE_zero − CE_sae) / (CE_zero − CE_clean); kl = mean
    KL(clean ‖ sae) over the same positions. Zero ablation can be worse than uniform, so the mean's score is beside it.
    """
    mean = store.statistics(site.label).mean
    mean_row = torch.from_numpy(mean).float().to(device)

    def reconstruct(rows: Tensor) -> Tensor:
        replaced: Tensor = sae(rows)[0]
        return replaced

    replacements: dict[str, Callable[[Tensor], Tensor]] = {
        "sae": reconstruct,
        "zero": torch.zeros_like,
        "mean": lambda rows: mean_row.expand_as(rows),
    }
    sums = dict.fromkeys(("clean", *replacements, "kl"), 0.0)
    n_targets = 0
    batch_windows = max(1, min(BATCH_WINDOWS, BATCH_POSITIONS // store.manifest.policy.context))
    batches = _window_batches(held_out_windows(store), n_windows, batch_windows)
    with track("evaluate", len(batches), "batches") as progress, torch.inference_mode():
        for windows, chosen in batches:
            inputs, kept = windows.batch(chosen)
            ids, mask = torch.from_numpy(inputs).to(device), torch.from_numpy(kept).to(device)
            lead = int(windows.policy.bos)
            real = torch.arange(1, ids.shape[1]) < torch.from_numpy(windows.n_tokens[chosen] + lead)[:, None]
            targets = ids[:, 1:][real.to(device)]
            clean = _log_probabilities(model, ids, real)
            sums["clean"] += _cross_entropy(clean, targets)
            for name, replace in replacements.items():
                with hooked(model, site, _replacing(mask, replace)):
                    changed = _log_probabilities(model, ids, real)
                sums[name] += _cross_entropy(changed, targets)
                if name == "sae":
                    sums["kl"] += float((clean.exp() * (clean - changed)).sum(dim=1).double().sum())
            n_targets += len(targets)
            progress.advance(1)
    clean_ce, sae_ce, zero_ce, mean_ce, kl = (sums[name] / n_targets for name in ("clean", "sae", "zero", "mean", "kl"))
    return {
        "text_tokens": n_targets,
        "ce_clean": clean_ce,
        "ce_sae": sae_ce,
        "delta_ce": sae_ce - clean_ce,
        "ce_zero": zero_ce,
        "ce_mean": mean_ce,
        "ce_loss_score": _ratio(zero_ce - sae_ce, zero_ce - clean_ce),
        "ce_loss_score_mean": _ratio(mean_ce - sae_ce, mean_ce - clean_ce),
        "kl": kl,
    }


def held_out_windows(store: ActivationStore) -> list[Windows]:
    """The held-out windows of every segment."""
    return [
        Windows(
            store.table(segment.index, "tokens/ids"),
            store.table(segment.index, f"{PART}/windows/token_start"),
            store.table(segment.index, f"{PART}/windows/n_tokens").astype(np.int64),
            store.manifest.policy,
        )
        for segment in store.segments
    ]


def _window_batches(
    segments: list[Windows], n_windows: int, batch_windows: int = BATCH_WINDOWS
) -> list[tuple[Windows, NDArray[np.int64]]]:
    """`n_windows` windows spread evenly over the split (all, if there are fewer), in batches of one segment each."""
    bounds = np.cumsum([0, *map(len, segments)])
    chosen = np.linspace(0, bounds[-1] - 1, min(n_windows, int(bounds[-1]))).astype(np.int64)
    own = [chosen[(chosen >= first) & (chosen < last)] - first for first, last in pairwise(bounds.tolist())]
    return [
        (windows, mine[start : start + batch_windows])
        for windows, mine in zip(segments, own, strict=True)
        for start in range(0, len(mine), batch_windows)
    ]


def _replacing(mask: Tensor, replace: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def edit(activation: Tensor) -> Tensor:
        changed = activation.clone()
        changed[mask] = replace(activation[mask])
        return changed

    return edit


def _log_probabilities(model: nn.Module, ids: Tensor, real: Tensor) -> Tensor:
    """(n_targets, vocabulary) log-probabilities of the next token at every position that has one."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return torch.log_softmax(logits[real.to(logits.device)].float(), dim=-1)


def _cross_entropy(log_probabilities: Tensor, targets: Tensor) -> float:
    return float(-log_probabilities.gather(1, targets[:, None]).double().sum())


def _ratio(numerator: float, denominator: float) -> float | None:
    """None where the ablation changes nothing, and a score has no meaning."""
    return numerator / denominator if denominator else None
