"""In: a text run once, other values for one site's activation. Out: the logits after each, many in one batch.

An edited run differs from the recorded one only after the edit, so it starts at the patched block's recorded input, and
the unembedding is computed only where logits are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipelines.causal.engine.cut import Cut, finish
from pipelines.models.capture import hooked
from pipelines.models.forward import blocks_of, embed, logits, run_blocks
from pipelines.models.key_values import KeyValues
from pipelines.models.sites.registry import kind_of, patched_names
from pipelines.models.sites.site import Site

BATCH_POSITIONS = 2048
"""At most in one forward pass: the MLPs of GPT-2 small take 25 MB for them, and larger batches gain nothing."""


@dataclass(frozen=True)
class Trace:
    """What one run of a text left at every site that is patched.

    `streams` (n_layers + 1, position, d_model) is what enters each block and what leaves the last. `held`: by the names of
    the sites that are not the stream between blocks, (n_layers, position, width of the site). `keys`: what attention read,
    so that an edited run need not begin at the first position.
    """

    ids: Tensor
    streams: Tensor
    held: dict[str, Tensor]
    keys: KeyValues

    def __len__(self) -> int:
        return len(self.ids)

    def at(self, site: Site) -> Tensor:
        """The activation (position, width) of a site."""
        kind = kind_of(site.name)
        return self.streams[kind.first_after(site.layer)] if kind.is_stream else self.held[site.name][site.layer]

    def cut(self, site: Site, start: int = 0) -> Cut:
        """The run cut at a site, as one text of the positions from `start` on."""
        own = (self.at(site), self.streams[site.layer], self.held["attn_out"][site.layer])
        x, before, attn_out = (part[None, start:] for part in own)
        return Cut(site, x, before, attn_out, self.keys.until(start) if start else None)


@torch.no_grad()
def trace(model: nn.Module, ids: Tensor) -> Trace:
    """Run a text (position,) once and keep what every site held. No hook is left behind, also after an exception."""
    names = [name for name in patched_names() if not kind_of(name).is_stream]
    parts: dict[str, list[Tensor]] = {name: [] for name in (*names, "resid_post")}

    def keep(own: list[Tensor]) -> Callable[[Tensor], None]:
        return lambda activation: own.append(activation[0])

    with ExitStack() as hooks:
        for name, own in parts.items():
            for layer in range(len(blocks_of(model))):
                hooks.enter_context(hooked(model, Site(name, layer), keep(own)))
        start, keys = embed(model, ids[None]), KeyValues()
        run_blocks(model, start, keys=keys)
    streams = torch.stack([start[0], *parts.pop("resid_post")])
    return Trace(ids, streams, {name: torch.stack(own) for name, own in parts.items()}, keys)


def logits_after(
    model: nn.Module, run: Trace, site: Site, edited: Tensor, at: int | Tensor | None = -1, start: int = 0
) -> Tensor:
    """Logits of a traced text once a site's activation is `edited` (n, position, width), with gradients of `edited`.

    With a `start`, `edited` is of the positions from there on, where alone anything can change. `at` is the position whose
    logits are wanted, one for all or one for each (n,): gives (n, vocabulary). With None, those of all positions from
    `start` on: (n, position, vocabulary).
    """
    last = finish(model, run.cut(site, start), edited)
    if at is None:
        return logits(model, last)
    if isinstance(at, int):
        return logits(model, last[:, at % len(run) - start])
    return logits(model, last[torch.arange(len(last), device=last.device), at % len(run) - start])


@torch.no_grad()
def edited_logits(
    model: nn.Module,
    run: Trace,
    site: Site,
    n: int,
    build: Callable[[int, int], Tensor],
    at: int | Tensor | None = -1,
    batch_positions: int = BATCH_POSITIONS,
) -> Iterator[tuple[int, int, Tensor]]:
    """`logits_after` of n edits in batches of bounded memory: (first, stop, logits) of each batch.

    `build(first, stop)` gives the edits first … stop - 1 as (stop - first, position, width) when their turn comes.
    """
    step = max(1, batch_positions // len(run))
    for first in range(0, n, step):
        stop = min(first + step, n)
        where = at[first:stop] if isinstance(at, Tensor) else at
        yield first, stop, logits_after(model, run, site, build(first, stop), where)


def after_edits(model: nn.Module, run: Trace, site: Site, edited: Tensor, at: int | Tensor | None = -1) -> Tensor:
    """`logits_after` of edits (n, position, width) in batches of bounded memory, without gradients."""
    batches = edited_logits(model, run, site, len(edited), lambda first, stop: edited[first:stop], at)
    return torch.cat([batch for _, _, batch in batches])


@torch.no_grad()
def row_edited_logits(
    model: nn.Module,
    run: Trace,
    site: Site,
    positions: Tensor,
    rows: Callable[[Tensor], Tensor],
    at: int = -1,
    batch_positions: int = BATCH_POSITIONS,
) -> Iterator[tuple[Tensor, Tensor]]:
    """`logits_after` of n edits at one position each, `positions` (n,): (numbers of the edits, logits) of each batch.

    `rows(numbers)` gives the activations (m, width) that they put there. Edits are taken by position, and a batch begins at
    its first one: what comes before has the keys and values of the traced run.
    """
    base, at = run.at(site), at % len(run)
    order = positions.argsort(stable=True)
    first = 0
    while first < len(order):
        start = min(int(positions[order[first]]), at)
        numbers = order[first : first + max(1, batch_positions // (len(run) - start))]
        edited = base[start:].repeat(len(numbers), 1, 1)
        edited[torch.arange(len(numbers), device=base.device), positions[numbers] - start] = rows(numbers)
        yield numbers, logits_after(model, run, site, edited, at, start)
        first += len(numbers)


def after_row_edits(model: nn.Module, run: Trace, site: Site, positions: Tensor, rows: Tensor, at: int = -1) -> Tensor:
    """(n, vocabulary) of n edits that each replace the activation at one position: `positions` (n,), `rows` (n, width)."""
    batches = list(row_edited_logits(model, run, site, positions, lambda numbers: rows[numbers], at))
    back = torch.cat([numbers for numbers, _ in batches]).argsort()
    return torch.cat([batch for _, batch in batches])[back]
