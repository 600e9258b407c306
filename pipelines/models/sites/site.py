"""A site: a kind (which place of a block is read) and the block's number. Each kind has a file of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pipelines.models.families.family import Family


@dataclass(frozen=True)
class Site:
    """Where in the model rows are read: `resid_post` of block `layer` is the residual stream after the block."""

    name: str
    layer: int

    @property
    def label(self) -> str:
        """
        >>> Site("resid_post", 6).label
        'resid_post.6'
        """
        return f"{self.name}.{self.layer}"

    @classmethod
    def parse(cls, label: str) -> Site:
        """
        >>> Site.parse("resid_post.6")
        Site(name='resid_post', layer=6)
        """
        name, _, layer = label.rpartition(".")
        return cls(name, int(layer))


class SiteKind(ABC):
    """A place in every block: which module is read, and how edited values reach the stream.

    A kind is one file of this folder: a concrete subclass. The values below are defaults.
    """

    name: ClassVar[str]
    values_are: ClassVar[str]
    """A few words for the site's values, in the plural."""
    reads_input: ClassVar[bool] = False
    """Whether the module's input is read rather than its output."""
    is_collected: ClassVar[bool] = True
    """Whether rows are collected here."""
    is_patched: ClassVar[bool] = True
    """Whether the site is attributed and patched."""
    is_stream: ClassVar[bool] = False
    """Whether the site is the residual stream between two blocks."""
    in_stream_basis: ClassVar[bool] = True
    """Whether a row is a vector in the residual stream's basis, rather than neurons or heads."""
    has_heads: ClassVar[bool] = False
    """Whether a row holds the attention's heads side by side, each of which is patched on its own."""
    is_signed: ClassVar[bool] = True
    """Whether a coordinate counts as two units, one for each sign."""
    rank: ClassVar[int] = 100
    """Position in lists: smaller ranks first, equal ranks by name."""

    @abstractmethod
    def module(self, family: Family, block: nn.Module) -> nn.Module:
        """The module of a block that is read."""

    def width(self, family: Family, model: nn.Module) -> int:
        """How many numbers a row has."""
        return family.d_model(model)

    def first_after(self, layer: int) -> int:
        """The first block to run after an edit of this site in block `layer`; earlier blocks need not run again."""
        return layer + 1

    @abstractmethod
    def into_stream(
        self, family: Family, block: nn.Module, edited: Tensor, before: Tensor | None, attn_out: Tensor | None
    ) -> Tensor:
        """The stream (…, d_model) that enters block `first_after` once the site holds `edited` (…, width).

        `before` (…, d_model) entered the site's block; `attn_out` (…, d_model) is what its attention wrote. Both may have
        fewer leading dimensions than `edited`, and are None where the site is the stream.
        """

    def holds(self, writer: str, layer: int, own: int) -> bool:
        """Whether the site of block `own` contains what a writer of block `layer` added to the stream.

        Writers are `embedding` (layer -1), `attention` and `mlp`. Neurons and heads contain nothing of the stream.
        """
        return False
