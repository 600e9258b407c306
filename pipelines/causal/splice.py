"""The model cut at a site: text run up to it once, and any number of edited rows run on from there.

Rows are edited in two ways. `finish` takes whole edited texts, for edits that may touch any positions. `finish_branches`
takes single edited positions: each is a *branch* of the text, which sees the clean text before it and itself. As a
decoder looks only backwards, that is the exact forward pass at the edited position, for one position's work in place of
a whole text's.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.capture import Site, blocks_of, hooked, site_module
from pipelines.causal.forward import embed, run_blocks
from pipelines.sae.base import Codes

STREAM_SITES = {"resid_pre": 0, "resid_post": 1}
"""Sites that are the residual stream itself, and after how many more blocks than their layer: no block runs twice."""


@dataclass(frozen=True)
class Reading:
    """Texts run up to a site: the rows `x` (text, position, d_model) there, and `entry`, the input of block `first`,
    from which what is edited is run on."""

    x: Tensor
    entry: Tensor
    first: int
    site: Site


def read_site(model: nn.Module, site: Site, ids: Tensor) -> Reading:
    """Run (text, position) token ids up to a site. Raises InputError for a layer that the model has not."""
    site_module(model, site)
    if site.name in STREAM_SITES:
        first = site.layer + STREAM_SITES[site.name]
        x = run_blocks(model, embed(model, ids), 0, first)
        return Reading(x, x, first, site)
    entry = run_blocks(model, embed(model, ids), 0, site.layer)
    found: list[Tensor] = []
    with hooked(model, site, found.append):
        run_blocks(model, entry, site.layer, site.layer + 1)
    return Reading(found[0], entry, site.layer, site)


def finish(model: nn.Module, reading: Reading, edited: Tensor) -> Tensor:
    """Rows (n, position, d_model) in place of the site's -> the stream (n, position, d_model) after the last block.

    n is the number of texts read, or anything if one was.
    """
    if reading.site.name in STREAM_SITES:
        return run_blocks(model, edited, reading.first)
    entry = reading.entry.expand(len(edited), -1, -1)
    with hooked(model, reading.site, lambda _: edited):
        after = run_blocks(model, entry, reading.first, reading.first + 1)
    return run_blocks(model, after, reading.first + 1)


def finish_branches(model: nn.Module, reading: Reading, change: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """The stream after the last block: clean (text, position, d_model), and of each branch (text, branch, d_model).

    Branch b of text t is its position `at[t, b]` with `change[t, b]` (d_model,) added to the site's row there; other
    branches and later positions do not exist for it.
    """
    n_texts, n_positions = reading.entry.shape[:2]
    text = torch.arange(n_texts, device=at.device)[:, None]
    before = torch.arange(n_positions, device=at.device) < at[..., None]
    itself = torch.eye(at.shape[1], dtype=torch.bool, device=at.device).expand(n_texts, -1, -1)
    allowed = torch.cat([before, itself], dim=2)[:, None]
    mask = torch.zeros(allowed.shape, dtype=change.dtype, device=at.device).masked_fill_(
        ~allowed, torch.finfo(change.dtype).min
    )
    clean, branch = reading.entry, reading.entry[text, at]
    is_stream = reading.site.name in STREAM_SITES
    if is_stream:
        branch = branch + change
    for layer, block in enumerate(list(blocks_of(model))[reading.first :], start=reading.first):
        seen = _Seen()
        clean = _run_seen(model, clean, layer, seen)
        adds = not is_stream and layer == reading.first
        with hooked(model, reading.site, lambda activation: activation + change) if adds else nullcontext():
            found: Any = block(branch, attention_mask=mask, past_key_values=seen, use_cache=True, position_ids=at)
        branch = found[0] if isinstance(found, tuple) else found
    return clean, branch


def _run_seen(model: nn.Module, hidden: Tensor, layer: int, seen: _Seen) -> Tensor:
    """One block on clean texts, its keys and values remembered for the branches."""
    module: Any = blocks_of(model)[layer]
    handle = module.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "past_key_values": seen, "use_cache": True}), with_kwargs=True
    )
    try:
        return run_blocks(model, hidden, layer, layer + 1)
    finally:
        handle.remove()


class _Seen:
    """What a block's attention calls its cache: the clean texts' keys and values, which branches see beside their own."""

    def __init__(self) -> None:
        self._clean: tuple[Tensor, Tensor] | None = None

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """(text, head, position, width) keys and values as the attention is to use them."""
        if self._clean is None:
            self._clean = keys, values
            return keys, values
        return torch.cat([self._clean[0], keys], dim=2), torch.cat([self._clean[1], values], dim=2)


def feature_values(codes: Codes, features: Tensor) -> Tensor:
    """(n_rows, len(features)) what chosen features have in the codes of n rows; 0 where one does not fire."""
    active = codes.active
    order = torch.argsort(features)
    place = torch.searchsorted(features[order], active.features).clamp_max(len(features) - 1)
    hit = features[order][place] == active.features
    values = codes.values.new_zeros(active.n_rows, len(features))
    values[active.rows[hit], order[place[hit]]] = codes.values[hit]
    return values
