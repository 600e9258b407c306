"""The model cut at a site: what texts hold there, and everything that runs on from the cut once other values stand there.

A `Cut` is made by running texts up to the site (`cut_at`), or taken from a recorded run of a whole text (`Trace.cut`).
Edits run on from a cut in two ways, and no block before it runs again. `finish` takes whole edited texts, for edits that may
touch any positions. `pipelines.causal.engine.branches` takes single edited positions of a text.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from pipelines.models.capture import hooked, site_module
from pipelines.models.families.registry import family_of
from pipelines.models.forward import embed, run_blocks
from pipelines.models.key_values import KeyValues
from pipelines.models.sites.registry import kind_of
from pipelines.models.sites.site import Site


@dataclass(frozen=True)
class Cut:
    """Texts cut at a site: the rows `x` (text, position, width) there.

    Where the site is not the stream itself: `before` (text, position, d_model), what entered the site's block, and
    `attn_out` (text, position, d_model), what the block's attention wrote. `earlier`: the keys and values of positions
    before those of the cut; None where the cut begins with the text.
    """

    site: Site
    x: Tensor
    before: Tensor | None = None
    attn_out: Tensor | None = None
    earlier: KeyValues | None = None

    @property
    def first_after(self) -> int:
        """The first block that runs on from the cut."""
        return kind_of(self.site.name).first_after(self.site.layer)

    def take(self, *place: Tensor) -> Cut:
        """Some of the texts, or with a second index some of their positions."""
        before, attn_out = (None if held is None else held[place] for held in (self.before, self.attn_out))
        return Cut(self.site, self.x[place], before, attn_out, self.earlier)

    def with_rows(self, model: nn.Module, edited: Tensor) -> Tensor:
        """The stream that goes on with `edited` rows in place of `x`: n of the texts that were cut, or any n if one was."""
        block = family_of(model).blocks(model)[self.site.layer]
        kind = kind_of(self.site.name)
        return kind.into_stream(family_of(model), block, edited, self.before, self.attn_out)


def cut_at(model: nn.Module, site: Site, ids: Tensor) -> Cut:
    """Run (text, position) token ids up to a site. Raises InputError for a site or layer that the model has not."""
    site_module(model, site)
    kind = kind_of(site.name)
    if kind.is_stream:
        return Cut(site, run_blocks(model, embed(model, ids), 0, kind.first_after(site.layer)))
    before = run_blocks(model, embed(model, ids), 0, site.layer)
    rows: list[Tensor] = []
    attention: list[Tensor] = []
    with hooked(model, site, rows.append), hooked(model, Site("attn_out", site.layer), attention.append):
        run_blocks(model, before, site.layer, site.layer + 1)
    return Cut(site, rows[0], before, attention[0])


def finish(model: nn.Module, cut: Cut, edited: Tensor) -> Tensor:
    """Rows (n, position, width) in place of the site's -> the stream (n, position, d_model) after the last block.

    n is the number of texts that were cut, or anything if one was. Gradients of `edited` are kept where they are asked for.
    """
    return run_blocks(model, cut.with_rows(model, edited), cut.first_after, keys=cut.earlier)
