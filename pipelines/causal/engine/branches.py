"""The model cut at a site: text run up to it once, and any number of edited rows run on from there.

Rows are edited in two ways. `finish` takes whole edited texts, for edits that may touch any positions. `finish_branches`
takes single edited positions: each is a *branch* of the text, which sees the clean text before it and itself. As a
decoder looks only backwards, that is the exact forward pass at the edited position, for one position's work in place of
a whole text's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.causal.engine.stream_edits import first_after, is_stream, stream_with
from pipelines.models.forward import embed, run_blocks
from pipelines.models.sites import Site, blocks_of, hooked, site_module
from pipelines.sae.base import Codes


@dataclass(frozen=True)
class Reading:
    """Texts run up to a site: the rows `x` (text, position, width) there.

    Where the site is not the stream itself: `before` (text, position, d_model), what entered the site's block, and
    `attn_out`, what the block's attention wrote.
    """

    site: Site
    x: Tensor
    before: Tensor | None = None
    attn_out: Tensor | None = None

    def take(self, *place: Tensor) -> Reading:
        """Some of the texts, or with a second index some of their positions."""
        recorded = (None if found is None else found[place] for found in (self.before, self.attn_out))
        return Reading(self.site, self.x[place], *recorded)

    def with_rows(self, model: nn.Module, edited: Tensor) -> Tensor:
        """The stream that goes on with `edited` rows in place of `x`: n of the texts read, or any n if one was."""
        return stream_with(model, self.site, edited, self.before, self.attn_out)


def read_site(model: nn.Module, site: Site, ids: Tensor) -> Reading:
    """Run (text, position) token ids up to a site. Raises InputError for a layer that the model has not."""
    site_module(model, site)
    if is_stream(site):
        return Reading(site, run_blocks(model, embed(model, ids), 0, first_after(site)))
    before = run_blocks(model, embed(model, ids), 0, site.layer)
    found: list[Tensor] = []
    attention: list[Tensor] = []
    with hooked(model, site, found.append), hooked(model, Site("attn_out", site.layer), attention.append):
        run_blocks(model, before, site.layer, site.layer + 1)
    return Reading(site, found[0], before, attention[0])


def finish(model: nn.Module, reading: Reading, edited: Tensor) -> Tensor:
    """Rows (n, position, width) in place of the site's -> the stream (n, position, d_model) after the last block.

    n is the number of texts read, or anything if one was.
    """
    return run_blocks(model, reading.with_rows(model, edited), first_after(reading.site))


def finish_branches(model: nn.Module, reading: Reading, change: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """The stream after the last block: clean (text, position, d_model), and of each branch (text, branch, d_model).

    Branch b of text t is its position `at[t, b]` with `change[t, b]` (width,) added to the site's row there; other
    branches and later positions do not exist for it.
    """
    n_texts, n_positions = reading.x.shape[:2]
    text = torch.arange(n_texts, device=at.device)[:, None]
    before = torch.arange(n_positions, device=at.device) < at[..., None]
    itself = torch.eye(at.shape[1], dtype=torch.bool, device=at.device).expand(n_texts, -1, -1)
    allowed = torch.cat([before, itself], dim=2)[:, None]
    mask = torch.zeros(allowed.shape, dtype=change.dtype, device=at.device).masked_fill_(
        ~allowed, torch.finfo(change.dtype).min
    )
    rows = reading.take(text, at)
    clean, branch = reading.with_rows(model, reading.x), rows.with_rows(model, rows.x + change)
    first = first_after(reading.site)
    for layer, block in enumerate(list(blocks_of(model))[first:], start=first):
        seen = _Seen()
        clean = _run_seen(model, clean, layer, seen)
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
    if not len(features):
        return codes.values.new_zeros(active.n_rows, 0)
    order = torch.argsort(features)
    place = torch.searchsorted(features[order], active.features).clamp_max(len(features) - 1)
    hit = features[order][place] == active.features
    values = codes.values.new_zeros(active.n_rows, len(features))
    values[active.rows[hit], order[place[hit]]] = codes.values[hit]
    return values
