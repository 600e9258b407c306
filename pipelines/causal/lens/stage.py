"""In: a run, the model, a store. Out: which tokens a feature's direction promotes by the direct path alone.

The weight of a token is its column of W_U (γ ⊙ (d − mean d)) / σ, less the mean over the vocabulary: what adding the
decoder direction d once to the stream does to the token's logit, if nothing after the site reacts to it and the final
LayerNorm's scale stays at σ. Blocks after the site may do more, or the opposite: `ablate` and `effects` measure that.

σ is the mean over sampled rows of the store of the final LayerNorm's scale √(variance + ε), from the model run on their
windows. It is one positive number for all features: it sets the unit (logits per unit of activation), no order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actstore.errors import InputError
from actstore.reader import ActivationStore
from pipelines.causal.engine.language_model import LanguageModel, Spliced, open_spliced, open_store
from pipelines.metrics.model_loss import Batch, window_batches
from pipelines.models.families.registry import family_of
from pipelines.models.forward import embed, run_blocks, unembedding
from pipelines.models.sites.registry import kind_of
from pipelines.shared.visible_text import visible
from pipelines.text.windows import Windows

SORTS = ("kurtosis", "skew", "peak", "id")
BLOCK_WEIGHTS = 1 << 25
"""Logit weights in memory at a time: 0.27 GB in float64."""
DIRECT = "direct path only"


@dataclass(frozen=True)
class LensConfig:
    """What `lens` is asked for; the names are the command's options."""

    run: Path
    feature: int | None = None
    top: int = 10
    sort: str = "kurtosis"
    windows: int = 64
    store: str | None = None
    model: str | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.sort not in SORTS:
            raise InputError(f"sort {self.sort!r}: choose one of {', '.join(SORTS)}.")
        if self.top < 1 or self.windows < 1:
            raise InputError(f"top {self.top}, windows {self.windows}: need at least 1.")


def lens(config: LensConfig) -> dict[str, Any]:
    """The tokens one feature promotes and suppresses, or a table of all features with the shape of their weights."""
    spliced = open_spliced(config.run, config.store, config.model, config.device)
    _require_stream_width(spliced)
    store = open_store(config.run, spliced.record, config.store)
    if config.feature is not None:
        spliced.require_feature(config.feature)
    sigma = mean_scale(spliced.lm, train_batches(store, config.windows))
    head = {
        "run_id": spliced.record.run_id,
        "site": spliced.record.site,
        "path": DIRECT,
        "mean_scale": sigma,
        "windows": config.windows,
    }
    if config.feature is not None:
        return {**head, "feature": config.feature, **_card(spliced, config.feature, sigma, config.top)}
    rows = lens_table(spliced, sigma)
    if config.sort != "id":
        rows.sort(key=lambda row: -row[config.sort])
    return {**head, "sort": config.sort, "features": rows[: config.top]}


def _require_stream_width(spliced: Spliced) -> None:
    kind = kind_of(spliced.site.name)
    if not kind.in_stream_basis:
        raise InputError(
            f"site {spliced.site.label}: its directions are of {kind.values_are}, the lens projects those of the residual "
            "stream; take a run on another site, or `effects`, which takes this one."
        )


@torch.no_grad()
def logit_weights(lm: LanguageModel, directions: Tensor, scale: float) -> Tensor:
    """(n, vocabulary) float64 logit weights of directions (n, d_model) through the final LayerNorm at a fixed scale.

    W_U (γ ⊙ (d − mean d)) / scale, without the LayerNorm's bias, less each direction's mean over the vocabulary. Direct
    path only. Source: nostalgebraist 2020, the logit lens; Bricken et al. 2023 for features.
    """
    family, model = family_of(lm.model), lm.model
    weights = family.final_linear(model, directions) @ family.unembedding(model).double().T / scale
    return weights - weights.mean(dim=1, keepdim=True)


def shape_of(weights: Tensor) -> tuple[Tensor, Tensor]:
    """(skew, excess kurtosis), (n,) each, of weights (n, vocabulary): moments m3 / m2^1.5 and m4 / m2² − 3.

    A feature of few tokens has a long tail and so a large kurtosis; a normal distribution has 0 of both.
    """
    centred = weights - weights.mean(dim=1, keepdim=True)
    second, third, fourth = (centred.pow(power).mean(dim=1) for power in (2, 3, 4))
    second = second.clamp_min(torch.finfo(second.dtype).tiny)
    return third / second**1.5, fourth / second**2 - 3


@torch.no_grad()
def mean_scale(lm: LanguageModel, batches: list[Batch]) -> float:
    """Mean of √(variance + ε), the final LayerNorm's scale, over the rows of some windows."""
    total, n = 0.0, 0
    for windows, chosen in batches:
        inputs, kept = windows.batch(chosen)
        hidden = run_blocks(lm.model, embed(lm.model, torch.from_numpy(inputs).to(lm.device)))
        rows = hidden[torch.from_numpy(kept).to(lm.device)]
        total += float(family_of(lm.model).final_scale(lm.model, rows).sum())
        n += len(rows)
    if not n:
        raise InputError("lens: the store's windows hold no row to measure the final LayerNorm's scale on.")
    return total / n


def train_batches(store: ActivationStore, n_windows: int) -> list[Batch]:
    """Training windows spread evenly over a store."""
    tables = [Windows.open(store, segment.index, "train") for segment in store.segments]
    return window_batches(tables, n_windows)


def lens_table(spliced: Spliced, sigma: float, n_tokens: int = 3) -> list[dict[str, Any]]:
    """Every feature's skew, kurtosis, largest weight, and most promoted and suppressed tokens, by id."""
    text = spliced.lm.codec.token_text
    rows = []
    for first, weights in _blocks(spliced, sigma):
        skew, kurtosis = shape_of(weights)
        high, low = torch.topk(weights, n_tokens, dim=1), torch.topk(-weights, n_tokens, dim=1)
        for i in range(len(weights)):
            rows.append(
                {
                    "feature": first + i,
                    "skew": float(skew[i]),
                    "kurtosis": float(kurtosis[i]),
                    "peak": float(weights[i].abs().max()),
                    "promoted": [text(t) for t in high.indices[i].tolist()],
                    "suppressed": [text(t) for t in low.indices[i].tolist()],
                }
            )
    return rows


def _blocks(spliced: Spliced, sigma: float) -> Iterator[tuple[int, Tensor]]:
    """(first feature, logit weights) of all features, some at a time."""
    directions = spliced.sae.W_dec
    step = max(1, BLOCK_WEIGHTS // len(unembedding(spliced.lm.model)))
    for first in range(0, len(directions), step):
        yield first, logit_weights(spliced.lm, directions[first : first + step], sigma)


def _card(spliced: Spliced, feature: int, sigma: float, top: int) -> dict[str, Any]:
    text = spliced.lm.codec.token_text
    weights = logit_weights(spliced.lm, spliced.sae.W_dec[feature : feature + 1], sigma)
    skew, kurtosis = shape_of(weights)

    def tokens(found: Any, sign: float) -> list[dict[str, Any]]:
        pairs = zip(found.indices.tolist(), found.values.tolist(), strict=True)
        return [{"token": token, "text": text(token), "weight": sign * value} for token, value in pairs]

    n = min(top, weights.shape[1])
    return {
        "skew": float(skew[0]),
        "kurtosis": float(kurtosis[0]),
        "promoted": tokens(torch.topk(weights[0], n), 1.0),
        "suppressed": tokens(torch.topk(-weights[0], n), -1.0),
    }


def lens_lines(result: dict[str, Any]) -> list[str]:
    """A feature's tokens in two columns, or the table of features."""
    head = f"{result['site']}, {result['path']}; logits per unit of activation, at the mean scale {result['mean_scale']:.3f}"
    if "feature" in result:
        lines = [f"feature {result['feature']}: {head}", f"skew {result['skew']:.2f}, kurtosis {result['kurtosis']:.2f}"]
        lines.append(f"  {'promoted':<30}suppressed")
        for up, down in zip(result["promoted"], result["suppressed"], strict=True):
            left, right = (f"{t['weight']:>+8.4f} {visible(t['text'])!r}" for t in (up, down))
            lines.append(f"  {left:<30}{right}")
        return lines
    lines = [head, f"{'feature':>7} {'skew':>7} {'kurtosis':>9} {'peak':>8}  {'promoted':<40} suppressed"]
    for row in result["features"]:
        up, down = ("  ".join(repr(visible(text)) for text in row[key]) for key in ("promoted", "suppressed"))
        lines.append(f"{row['feature']:>7} {row['skew']:>7.2f} {row['kurtosis']:>9.2f} {row['peak']:>8.4f}  {up:<40} {down}")
    return lines
