"""The neurons of a block's MLP, after their non-linearity."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines.models.sites.site import SiteKind

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pipelines.models.families.family import Family


class MlpHidden(SiteKind):
    name = "mlp_hidden"
    values_are = "the MLP's neurons"
    reads_input = True
    is_patched = False
    in_stream_basis = False
    is_signed = False
    rank = 4

    def module(self, family: Family, block: nn.Module) -> nn.Module:
        return family.neurons_together(block)

    def width(self, family: Family, model: nn.Module) -> int:
        return family.n_neurons(model)

    def into_stream(
        self, family: Family, block: nn.Module, edited: Tensor, before: Tensor | None, attn_out: Tensor | None
    ) -> Tensor:
        assert before is not None
        assert attn_out is not None
        return family.after_block(block, before, attn_out, family.mlp_from_neurons(block, edited))
