"""The residual stream that leaves a block."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines.models.sites.site import SiteKind

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pipelines.models.families.family import Family


class ResidPost(SiteKind):
    name = "resid_post"
    values_are = "the values of the residual stream"
    is_stream = True
    rank = 1

    def module(self, family: Family, block: nn.Module) -> nn.Module:
        return block

    def into_stream(
        self, family: Family, block: nn.Module, edited: Tensor, before: Tensor | None, attn_out: Tensor | None
    ) -> Tensor:
        return edited

    def holds(self, writer: str, layer: int, own: int) -> bool:
        return layer <= own
