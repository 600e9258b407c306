"""In: firings of features, a run, the model. Out: what setting the feature to 0 at each does to the prediction made there.

Every firing is a branch of its window (`pipelines.causal.engine.branches`); windows go through the model some at a time,
in the order of the store.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actstore.files import publish_bytes
from pipelines.causal.engine.branches import finish_branches
from pipelines.causal.engine.cut import Cut, cut_at, finish
from pipelines.causal.engine.drawn_firings import DrawnFirings, window_ids
from pipelines.causal.engine.feature_values import feature_values
from pipelines.causal.engine.language_model import Spliced
from pipelines.codes.code_store import CodeStore
from pipelines.metrics.divergence import ROWS, kl, log_probability
from pipelines.models.forward import logits

BATCH_POSITIONS = 4096
"""Positions of the clean texts in one forward pass, and of whole edited texts."""
BLOCK_FIRINGS = 16384
"""Firings between two publications of what was measured, about."""


@dataclass
class Measured:
    """What ablation did at the firings of a batch of n features.

    `kl`, `loss` (n_firings,) float64, in nats, NaN where not yet measured; `done` firings are, in the order of windows.
    `shift` (n, vocabulary) float32 weighted sums of the change of each vocabulary-centred logit at the firing position.
    """

    kl: NDArray[np.float64]
    loss: NDArray[np.float64]
    shift: NDArray[np.float32]
    done: int = 0

    @classmethod
    def empty(cls, n_firings: int, n_features: int, n_vocabulary: int) -> Measured:
        return cls(np.full(n_firings, np.nan), np.full(n_firings, np.nan), np.zeros((n_features, n_vocabulary), np.float32))

    def save(self, path: Path, plan_id: str) -> None:
        buffer = io.BytesIO()
        np.savez(buffer, kl=self.kl, loss=self.loss, shift=self.shift, done=self.done, plan=np.array(plan_id))
        publish_bytes(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path, plan_id: str) -> Measured | None:
        """What was measured so far of this plan; None when nothing was."""
        if not path.exists():
            return None
        with np.load(path, allow_pickle=False) as kept:
            if str(kept["plan"]) != plan_id:
                return None
            return cls(kept["kl"], kept["loss"], kept["shift"], int(kept["done"]))


def measured_bytes(n_firings: int, n_features: int, n_vocabulary: int) -> int:
    """Bytes that `Measured.save` writes, in one batch or several, headers included.

    >>> measured_bytes(64_000, 1_000, 50_257) // 10**6
    202
    """
    return 16 * n_firings + 4 * n_features * n_vocabulary + 4096


@torch.no_grad()
def measure(
    spliced: Spliced, codes: CodeStore, firings: DrawnFirings, so_far: Measured, how: str, commit: Any = None
) -> Iterator[int]:
    """Measure the remaining firings of a batch of features; yields the number measured after each pass.

    Windows go in the order of the store, as many at a time as fit. `commit` is called after about `BLOCK_FIRINGS`.
    """
    order = np.lexsort((firings.position, firings.window, firings.segment))
    _, place = np.unique(firings.feature, return_inverse=True)
    n_texts = max(1, BATCH_POSITIONS // codes.manifest.policy.context)
    last = so_far.done
    for chosen in window_passes(firings, order[so_far.done :], n_texts):
        own = firings.take(chosen)
        ids, text = firing_texts(codes, own)
        kl_, loss, shift = _measured(spliced, torch.from_numpy(ids).to(spliced.lm.device), text, own, how)
        so_far.kl[chosen], so_far.loss[chosen] = kl_, loss
        np.add.at(so_far.shift, place[chosen], own.weight[:, None] * shift)
        so_far.done += len(chosen)
        if commit is not None and (so_far.done - last >= BLOCK_FIRINGS or so_far.done == len(firings)):
            commit()
            last = so_far.done
        yield len(chosen)


@dataclass
class Branches:
    """Edits laid out as (text, branch), padded: `at` (texts, branches) positions, `slot` (n_firings,) each one's branch."""

    text: Tensor
    slot: Tensor
    at: Tensor


def branch_layout(text: NDArray[np.int64], position: NDArray[np.int64], device: str) -> Branches:
    """Lay out edits at (text, position), sorted by text; unused branches stand at position 0."""
    counts = np.bincount(text)
    slot = np.arange(len(text)) - (np.cumsum(counts) - counts)[text]
    at = np.zeros((len(counts), int(counts.max())), np.int64)
    at[text, slot] = position
    return Branches(*(torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in (text, slot, at)))


def _measured(
    spliced: Spliced, ids: Tensor, text: NDArray[np.int64], own: DrawnFirings, how: str
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float32]]:
    """(KL, rise of the loss, change of every centred logit (n, vocabulary)) of each firing's ablation."""
    reading = cut_at(spliced.lm.model, spliced.site, ids)
    change = ablation_changes(spliced, reading, text, own.position, own.feature)
    layout = branch_layout(text, own.position, spliced.lm.device)
    tokens = torch.from_numpy(own.next_token).to(ids.device)
    clean, ablated = predicted(spliced, reading, change, layout)
    moved = (change != 0).any(dim=1)
    loss_, shift_, kl_ = [], [], []
    for p, q, target, alive in zip(*(x.split(ROWS) for x in (clean, ablated, tokens, moved)), strict=True):
        before, after = (logits(spliced.lm.model, hidden) for hidden in (p, q))
        after = torch.where(alive[:, None], after, before)  # a feature that does not fire here changes nothing
        kl_.append(kl(before, after))
        log_p, log_q = (log_probability(x, target) for x in (before, after))
        loss_.append(log_p - log_q)
        difference = after - before
        shift_.append((difference - difference.mean(dim=1, keepdim=True)).float())
    divergence, loss = torch.cat(kl_), torch.cat(loss_)
    if how == "later":
        divergence, loss = _later(spliced, reading, ids, change, text, own)
    return divergence.cpu().numpy(), loss.cpu().numpy(), torch.cat(shift_).cpu().numpy()


def ablation_changes(
    spliced: Spliced, reading: Cut, text: NDArray[np.int64], position: NDArray[np.int64], feature: NDArray[np.int64]
) -> Tensor:
    """(n, d_model) what setting a feature to 0 adds to the row at (text, position): −code · W_dec, the code anew."""
    device = reading.x.device
    t, p, f = (torch.from_numpy(a).to(device) for a in (text, position, feature))
    places, back = torch.unique(t * reading.x.shape[1] + p, return_inverse=True)
    rows = reading.x.flatten(0, 1)[places]
    chosen, column = torch.unique(f, return_inverse=True)
    values = feature_values(spliced.sae.codes(rows), chosen)[back, column]
    return -values[:, None] * spliced.sae.W_dec[f]


def predicted(spliced: Spliced, reading: Cut, change: Tensor, layout: Branches) -> tuple[Tensor, Tensor]:
    """(n, d_model) each, after the last block at each edit's position: without it, and with `change` (n, d_model)."""
    padded = change.new_zeros(len(reading.x), layout.at.shape[1], change.shape[1])
    padded[layout.text, layout.slot] = change
    clean, branches = finish_branches(spliced.lm.model, reading, padded, layout.at)
    return clean[layout.text, layout.at[layout.text, layout.slot]], branches[layout.text, layout.slot]


def _later(
    spliced: Spliced, reading: Cut, ids: Tensor, change: Tensor, text: NDArray[np.int64], own: DrawnFirings
) -> tuple[Tensor, Tensor]:
    """(KL, rise of the loss), (n,) each: means over the firing position and all later ones of the text."""
    model, n_positions = spliced.lm.model, ids.shape[1]
    n = max(1, BATCH_POSITIONS // n_positions)
    kl_, loss_ = [], []
    real = torch.from_numpy(own.n_real).to(ids.device)
    for start in range(0, len(text), n):
        t = torch.from_numpy(text[start : start + n]).to(ids.device)
        at = torch.from_numpy(own.position[start : start + n]).to(ids.device)
        part = reading.take(t)
        edited = part.x.clone()
        edited[torch.arange(len(t)), at] += change[start : start + n]
        clean, ablated = finish(model, part, part.x), finish(model, part, edited)
        place = torch.arange(n_positions - 1, device=ids.device)
        counted = (place >= at[:, None]) & (place + 1 < real[start : start + n, None])
        item, position = counted.nonzero().T
        sums = torch.zeros(2, len(t), dtype=torch.float64, device=ids.device)
        for i, p in zip(item.split(ROWS), position.split(ROWS), strict=True):
            before, after = logits(model, clean[i, p]), logits(model, ablated[i, p])
            target = ids[t[i], p + 1]
            log_p, log_q = (log_probability(x, target) for x in (before, after))
            sums[0].index_add_(0, i, kl(before, after))
            sums[1].index_add_(0, i, log_p - log_q)
        divergence, loss = sums / counted.sum(dim=1)
        kl_.append(divergence)
        loss_.append(loss)
    return torch.cat(kl_), torch.cat(loss_)


def firing_texts(codes: CodeStore, own: DrawnFirings) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(texts, context) token ids of the windows of some firings in order, and which of them each firing stands in."""
    starts = np.r_[True, (np.diff(own.window) != 0) | (np.diff(own.segment) != 0)]
    text = np.cumsum(starts) - 1
    segment, window = own.segment[starts], own.window[starts]
    ids = np.empty((len(window), codes.manifest.policy.context), np.int64)
    for number in np.unique(segment).tolist():
        ids[segment == number] = window_ids(codes, number, window[segment == number])
    return ids, text


def window_passes(firings: DrawnFirings, rest: NDArray[np.int64], n_texts: int) -> Iterator[NDArray[np.int64]]:
    """Numbers of firings from `rest`, which is sorted by window: those of `n_texts` whole windows at a time."""
    if not len(rest):
        return
    new = np.r_[True, (np.diff(firings.window[rest]) != 0) | (np.diff(firings.segment[rest]) != 0)]
    number = np.cumsum(new) - 1
    bounds = np.searchsorted(number, np.arange(0, number[-1] + 1 + n_texts, n_texts))
    for start, stop in pairwise(bounds.tolist()):
        yield rest[start:stop]
