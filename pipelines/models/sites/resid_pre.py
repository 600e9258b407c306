"""The residual stream that enters a block."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines.models.sites.site import SiteKind

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pipelines.models.families.family import Family


class ResidPre(SiteKind):
    name = "resid_pre"
    values_are = "the values of the residual stream"
    reads_input = True
    is_stream = True
    rank = 0

    def module(self, family: Family, block: nn.Module) -> nn.Module:
        return block

    def first_after(self, layer: int) -> int:
        return layer

    def into_stream(
        self, family: Family, block: nn.Module, edited: Tensor, before: Tensor | None, attn_out: Tensor | None
    ) -> Tensor:
        return edited

    def holds(self, writer: str, layer: int, own: int) -> bool:
        return layer < own
