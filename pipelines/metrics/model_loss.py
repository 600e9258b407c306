"""In: a model, windows of text, replacements of one site's activation. Out: each replacement's effect on the predictions.

The activation is replaced at the positions that are kept as rows; all others pass through. Ablations replace the same
positions, so that the scores compare like with like. Sums are float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from actstore.reader import ActivationStore
from actstore.schema import WindowPolicy
from pipelines.metrics.divergence import summed_cross_entropy, summed_kl
from pipelines.models.capture import hooked
from pipelines.models.sites.site import Site
from pipelines.sae.base import Sae
from pipelines.sae.reconstruction_metrics import PART
from pipelines.shared.progress import track
from pipelines.text.windows import Windows

BATCH_WINDOWS, BATCH_POSITIONS = 16, 2048
"""Limits of one forward pass: 2,048 positions take 0.4 GB of logits for GPT-2, and a few copies are alive at once."""

Replace = Callable[[Tensor], Tensor]
"""Maps rows (n, d_model) to the rows that replace them."""
Batch = tuple[Windows, NDArray[np.int64]]
"""The windows of a segment, and the numbers of those in the batch."""


@dataclass
class TextMetrics:
    """Sums, in nats, over the `n_targets` positions that have a next token: the cross-entropy of the clean model (`clean`)
    and of each replacement, and KL(clean ‖ replaced) of each (`divergence`).

    The activation was replaced at `n_replaced` of all `n_positions`.
    """

    n_targets: int = 0
    n_positions: int = 0
    n_replaced: int = 0
    clean: float = 0.0
    cross_entropy: dict[str, float] = field(default_factory=dict)
    divergence: dict[str, float] = field(default_factory=dict)

    def update(self, clean: Tensor, replaced: Mapping[str, Callable[[], Tensor]], targets: Tensor) -> None:
        """Add log-probabilities (n, vocabulary) of n targets. Those of the replacements are computed one after another."""
        self.n_targets += len(targets)
        self.clean += summed_cross_entropy(clean, targets)
        for name, compute in replaced.items():
            changed = compute()
            self.cross_entropy[name] = self.cross_entropy.get(name, 0.0) + summed_cross_entropy(changed, targets)
            self.divergence[name] = self.divergence.get(name, 0.0) + summed_kl(clean, changed)
            del changed  # before the next one is computed

    def merge(self, other: TextMetrics) -> None:
        """Add the sums over another part of the text."""
        for name in ("n_targets", "n_positions", "n_replaced", "clean"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for sums, added in ((self.cross_entropy, other.cross_entropy), (self.divergence, other.divergence)):
            for name, value in added.items():
                sums[name] = sums.get(name, 0.0) + value

    def finalize(self, name: str = "sae") -> dict[str, Any]:
        """The figures of one replacement, measured against those named `zero` and `mean`.

        delta_ce = CE_sae − CE_clean; ce_loss_score = (CE_zero − CE_sae) / (CE_zero − CE_clean); ce_loss_score_mean is the
        same with mean ablation; kl_score = (KL_zero − KL_sae) / KL_zero. Zero ablation can be worse than uniform, which
        raises a score: read ce_loss_score beside delta_ce and ce_loss_score_mean. A score is None where the ablation changes
        nothing.
        """
        n = max(self.n_targets, 1)
        clean, ce, zero, mean = self.clean / n, *(self.cross_entropy[key] / n for key in (name, "zero", "mean"))
        kl, kl_zero, kl_mean = (self.divergence[key] / n for key in (name, "zero", "mean"))
        return {
            "text_tokens": self.n_targets,
            "ce_clean": clean,
            "ce_sae": ce,
            "delta_ce": ce - clean,
            "ce_zero": zero,
            "ce_mean": mean,
            "ce_loss_score": _ratio(zero - ce, zero - clean),
            "ce_loss_score_mean": _ratio(mean - ce, mean - clean),
            "kl": kl,
            "kl_zero": kl_zero,
            "kl_mean": kl_mean,
            "kl_score": _ratio(kl_zero - kl, kl_zero),
        }


def text_metrics(
    model: nn.Module, site: Site, batches: Iterable[Batch], replacements: Mapping[str, Replace], device: str
) -> TextMetrics:
    """Run the model on windows, once unchanged and once with each replacement."""
    sums = TextMetrics()
    for windows, chosen in batches:
        inputs, kept = windows.batch(chosen)
        ids, mask = torch.from_numpy(inputs).to(device), torch.from_numpy(kept).to(device)
        n_real = torch.from_numpy(windows.n_tokens[chosen] + int(windows.policy.bos))
        real = torch.arange(1, ids.shape[1]) < n_real[:, None]
        with torch.inference_mode():
            clean = _log_probabilities(model, ids, real)
            changed = {name: _with_replaced(model, site, ids, real, mask, replace) for name, replace in replacements.items()}
            sums.update(clean, changed, ids[:, 1:][real.to(device)])
        sums.n_positions += int(n_real.sum())
        sums.n_replaced += int(mask.sum())
    return sums


def heldout_text(
    model: nn.Module,
    store: ActivationStore,
    site: Site,
    replacements: Mapping[str, Replace],
    n_windows: int,
    device: str,
) -> TextMetrics:
    """`text_metrics` of `n_windows` held-out windows, spread evenly over the split.

    Two replacements are added: `zero` sets the site to zero, `mean` to its mean over the training rows.
    """
    mean = torch.from_numpy(store.statistics(site.label).mean).float().to(device)
    with_ablations = {**replacements, "zero": torch.zeros_like, "mean": lambda rows: mean.expand_as(rows)}
    batch_windows = max(1, min(BATCH_WINDOWS, BATCH_POSITIONS // store.manifest.policy.context))
    batches = window_batches(heldout_windows(store), n_windows, batch_windows)
    sums = TextMetrics()
    with track("evaluate", len(batches), "batches") as progress:
        for batch in batches:
            sums.merge(text_metrics(model, site, [batch], with_ablations, device))
            progress.advance(1)
    return sums


def reconstructing(sae: Sae) -> Replace:
    """The replacement of rows by their reconstructions."""
    return lambda rows: sae.reconstruct(sae.codes(rows))


def positions_said(policy: WindowPolicy) -> str:
    """The replaced positions, in words: those that are kept as rows."""
    return "all" if policy.keep_special else "all but the first of a window and separators"


def heldout_windows(store: ActivationStore) -> list[Windows]:
    """The held-out windows of every segment."""
    return [Windows.open(store, segment.index, PART) for segment in store.segments]


def window_batches(segments: list[Windows], n_windows: int, batch_windows: int = BATCH_WINDOWS) -> list[Batch]:
    """`n_windows` windows spread evenly over the split (all if there are fewer), in batches within one segment."""
    bounds = np.cumsum([0, *map(len, segments)])
    chosen = np.linspace(0, bounds[-1] - 1, min(n_windows, int(bounds[-1]))).astype(np.int64)
    by_segment = [chosen[(chosen >= first) & (chosen < last)] - first for first, last in pairwise(bounds.tolist())]
    return [
        (windows, numbers[start : start + batch_windows])
        for windows, numbers in zip(segments, by_segment, strict=True)
        for start in range(0, len(numbers), batch_windows)
    ]


def _with_replaced(
    model: nn.Module, site: Site, ids: Tensor, real: Tensor, mask: Tensor, replace: Replace
) -> Callable[[], Tensor]:
    def edit(activation: Tensor) -> Tensor:
        changed = activation.clone()
        changed[mask] = replace(activation[mask]).to(changed.dtype)
        return changed

    def compute() -> Tensor:
        with hooked(model, site, edit):
            return _log_probabilities(model, ids, real)

    return compute


def _log_probabilities(model: nn.Module, ids: Tensor, real: Tensor) -> Tensor:
    """(n_targets, vocabulary) log-probabilities of the next token at every position that has one."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return torch.log_softmax(logits[real.to(logits.device)].float(), dim=-1)


def _ratio(numerator: float, denominator: float) -> float | None:
    """The ratio; None where the ablation changes nothing and a score has no meaning."""
    return numerator / denominator if denominator else None
