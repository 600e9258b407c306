"""What a block's attention adds to the residual stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines.models.sites.site import SiteKind

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pipelines.models.families.family import Family


class AttnOut(SiteKind):
    name = "attn_out"
    values_are = "the attention's outputs"

    rank = 2

    def module(self, family: Family, block: nn.Module) -> nn.Module:
        return family.attention(block)

    def into_stream(
        self, family: Family, block: nn.Module, edited: Tensor, before: Tensor | None, attn_out: Tensor | None
    ) -> Tensor:
        assert before is not None
        return family.after_block(block, before, edited)

    def holds(self, writer: str, layer: int, own: int) -> bool:
        return layer == own and writer == "attention"
