"""In: two runs of texts of equal length. Out: what putting one's activations into the other does, place by place.

Denoising puts the clean run's activation into the corrupt run and asks what restores the answer; noising puts the corrupt
run's into the clean one and asks what breaks it (Meng et al. 2022; Heimersheim and Nanda 2024, "How to use and interpret
activation patching").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from actstore.errors import InputError
from pipelines.causal.engine.answer_metrics import Figure
from pipelines.causal.engine.language_model import Prompt
from pipelines.causal.engine.trace import Trace, after_edits, edited_logits, row_edited_logits
from pipelines.models.capture import require_patched
from pipelines.models.families.registry import family_of
from pipelines.models.forward import blocks_of, logits
from pipelines.models.sites.registry import kind_of
from pipelines.models.sites.site import Site
from pipelines.sae.base import Sae

Build = Callable[[Tensor], Tensor]
DIRECTIONS = ("denoising", "noising")


@dataclass(frozen=True)
class Pair:
    """A clean and a corrupt run of equal length, which of them is patched, and the position whose logits are measured."""

    clean: Trace
    corrupt: Trace
    direction: str = "denoising"
    at: int = -1

    def __post_init__(self) -> None:
        if self.direction not in DIRECTIONS:
            raise InputError(f"direction {self.direction!r}: known are {' and '.join(DIRECTIONS)}.")
        if len(self.clean) != len(self.corrupt):
            raise InputError(
                f"the clean text has {len(self.clean)} tokens, the corrupt one {len(self.corrupt)}: positions cannot be "
                "compared; change one text until they agree."
            )

    @property
    def into(self) -> Trace:
        """The run that is patched."""
        return self.corrupt if self.direction == "denoising" else self.clean

    @property
    def source(self) -> Trace:
        """The run that patches."""
        return self.clean if self.direction == "denoising" else self.corrupt


@dataclass(frozen=True)
class Grid:
    """`values` (rows, positions + 1): the metric with one row's activation patched at each position, and at all of them.

    NaN where nothing is patched: a position that is no row, for SAE features.
    """

    rows: tuple[str, ...]
    values: Tensor


def require_equal_length(clean: Prompt, corrupt: Prompt) -> None:
    """Raises InputError, with both tokenisations, when two prompts have different numbers of tokens."""
    if len(clean) != len(corrupt):
        shown = [f"{len(prompt)} tokens " + "|".join(map(repr, prompt.texts)) for prompt in (clean, corrupt)]
        raise InputError(
            f"the prompts differ in length, so that positions cannot be compared: clean {shown[0]}; corrupt {shown[1]}; "
            "change one until they agree."
        )


@torch.no_grad()
def run_logits(model: nn.Module, run: Trace, at: int = -1) -> Tensor:
    """(vocabulary,) logits of a traced text as it is."""
    return logits(model, run.streams[-1, at])


def patch_activation(
    model: nn.Module, pair: Pair, site: Site, positions: list[int] | None = None, heads: list[int] | None = None
) -> Tensor:
    """(vocabulary,) logits with one site's activation patched, at some positions (all), of some heads (all)."""
    require_patched(model, site)
    base, source = pair.into.at(site), pair.source.at(site)
    place = torch.zeros(len(base), dtype=torch.bool, device=base.device)
    place[slice(None) if positions is None else positions] = True
    own = torch.ones(base.shape[1], dtype=torch.bool, device=base.device)
    if heads is not None:
        head = torch.arange(base.shape[1], device=base.device) * n_heads_at(model, site) // base.shape[1]
        own = torch.isin(head, torch.tensor(heads, device=base.device))
    return after_edits(model, pair.into, site, torch.where(place[:, None] & own, source, base)[None], pair.at)[0]


def patch_grid(model: nn.Module, pair: Pair, site: str, figure: Figure) -> Grid:
    """Every layer of a site (every head of each, where the site has heads) at every position and at all positions."""
    n_columns = len(pair.clean) + 1
    names, values = [], []
    for layer in range(len(blocks_of(model))):
        place = require_patched(model, Site(site, layer))
        n_heads = n_heads_at(model, place)
        names += row_names(model, place)
        head, column = _all_cells(n_heads, n_columns)
        values.append(patch_cells(model, pair, place, head, column, figure).reshape(n_heads, n_columns))
    return Grid(tuple(names), torch.cat(values))


def patch_cells(model: nn.Module, pair: Pair, site: Site, head: Tensor, column: Tensor, figure: Figure) -> Tensor:
    """(n,) the figure after each of n patches: of `head[i]` (0 where the site has none) at position `column[i]`, where the
    number of positions means all of them."""
    base, source = pair.into.at(site), pair.source.at(site)
    width = base.shape[1]
    head_of = torch.arange(width, device=base.device) * n_heads_at(model, site) // width
    head, column = head.to(base.device), column.to(base.device)

    def row(number: Tensor) -> Tensor:
        own = head_of == head[number, None]
        return torch.where(own, source[column[number]], base[column[number]])

    def whole(number: Tensor) -> Tensor:
        return torch.where((head_of == head[number, None])[:, None], source, base)

    return _measured(model, pair.into, site, column, row, whole, figure, pair.at)


def feature_grid(
    model: nn.Module, run: Trace, site: Site, sae: Sae, features: list[int], change: Tensor, kept: Tensor, figure: Figure,
    at: int = -1,
) -> Grid:  # fmt: skip
    """Features of an SAE at every position and at all: their codes changed by `change` (position, n_features).

    `kept` (position,): which positions the SAE reads; the others pass through, and are NaN.
    """
    n_columns = len(run) + 1
    number, column = _all_cells(len(features), n_columns)
    chosen = torch.tensor(features)[number]
    values = feature_cells(model, run, site, sae, change, chosen, column, figure, at).reshape(len(features), n_columns)
    values[:, :-1][:, ~kept.cpu()] = torch.nan
    return Grid(tuple(f"feature {feature}" for feature in features), values)


def feature_cells(
    model: nn.Module, run: Trace, site: Site, sae: Sae, change: Tensor, feature: Tensor, column: Tensor, figure: Figure,
    at: int = -1,
) -> Tensor:  # fmt: skip
    """(n,) the figure after each of n edits of one feature at one position (their number: at all positions).

    x + change · W_dec of that feature: its own code changes, the SAE's error and all else stays.
    """
    base = run.at(site)
    feature, column = feature.to(base.device), column.to(base.device)

    directions = sae.W_dec.to(base.dtype)

    def row(number: Tensor) -> Tensor:
        place, own = column[number], feature[number]
        return base[place] + change[place, own][:, None] * directions[own]

    def whole(number: Tensor) -> Tensor:
        own = feature[number]
        return base + change[:, own].T[:, :, None] * directions[own][:, None]

    return _measured(model, run, site, column, row, whole, figure, at)


@torch.no_grad()
def dense_codes(sae: Sae, x: Tensor, kept: Tensor) -> Tensor:
    """(position, n_features) codes of a site's activation (position, d_model), zero at positions the SAE does not read."""
    codes = x.new_zeros(len(x), sae.n_features)
    values, indices = sae.encode(x[kept].to(sae.W_dec.dtype))
    dense = x.new_zeros(len(values), sae.n_features)
    codes[kept] = dense.scatter_add(1, indices, values.to(x.dtype))
    return codes


def n_heads_at(model: nn.Module, site: Site) -> int:
    """The number of heads that a site's values are cut into; 1 for a site without heads."""
    return family_of(model).n_heads(model) if kind_of(site.name).has_heads else 1


def row_names(model: nn.Module, site: Site) -> list[str]:
    """What a site's rows of a grid are called: `L0H0` and so on where the site has heads, else the site's label."""
    if not kind_of(site.name).has_heads:
        return [site.label]
    return [f"L{site.layer}H{head}" for head in range(n_heads_at(model, site))]


def _all_cells(n_rows: int, n_columns: int) -> tuple[Tensor, Tensor]:
    """(row, column) of every cell, row by row."""
    number = torch.arange(n_rows * n_columns)
    return number // n_columns, number % n_columns


@torch.no_grad()
def _measured(
    model: nn.Module, into: Trace, site: Site, column: Tensor, row: Build, whole: Build, figure: Figure, at: int
) -> Tensor:
    """(n,) the figure after each of n edits, float64, on the CPU: at one position `column`, or at all for their number.

    `row` gives the edited activations (m, width) of some edits by number, `whole` those of all positions.
    """
    figures = torch.zeros(len(column), dtype=torch.float64)
    is_single = column < len(into)
    ones, alls = is_single.nonzero()[:, 0], (~is_single).nonzero()[:, 0]
    for number, batch in row_edited_logits(model, into, site, column[ones], lambda n: row(ones[n]), at):
        figures[ones[number].cpu()] = figure(batch).cpu()
    for first, stop, batch in edited_logits(model, into, site, len(alls), lambda a, b: whole(alls[a:b]), at):
        figures[alls[first:stop].cpu()] = figure(batch).cpu()
    return figures
