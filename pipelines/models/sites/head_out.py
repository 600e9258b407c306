"""The outputs z of a block's attention heads, before W_O, side by side: n_heads · d_head values."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines.models.sites.site import SiteKind

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pipelines.models.families.family import Family


class HeadOut(SiteKind):
    name = "head_out"
    values_are = "the heads' outputs"
    reads_input = True
    is_collected = False
    in_stream_basis = False
    has_heads = True
    rank = 5

    def module(self, family: Family, block: nn.Module) -> nn.Module:
        return family.heads_together(block)

    def width(self, family: Family, model: nn.Module) -> int:
        n_heads, d_head, _ = family.head_weights(model, 0)[0].shape
        return n_heads * d_head

    def into_stream(
        self, family: Family, block: nn.Module, edited: Tensor, before: Tensor | None, attn_out: Tensor | None
    ) -> Tensor:
        assert before is not None
        return family.after_block(block, before, family.attn_from_heads(block, edited))
