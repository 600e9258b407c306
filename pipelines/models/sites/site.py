"""A site: which place of a block is read (a kind), and of which block. What is known of a kind is said by its own file."""

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
    """A place of every block: which module is read, and what follows where other values stand there.

    A kind is one file of this folder: a concrete subclass. The values below hold where a kind does not say otherwise.
    """

    name: ClassVar[str]
    values_are: ClassVar[str]
    """What the site's values are, in a few words, in the plural."""
    reads_input: ClassVar[bool] = False
    """Whether the module's input is read, and not its output."""
    is_collected: ClassVar[bool] = True
    """Whether rows are collected here."""
    is_patched: ClassVar[bool] = True
    """Whether the site is attributed and patched."""
    is_stream: ClassVar[bool] = False
    """Whether the site is the residual stream between two blocks."""
    in_stream_basis: ClassVar[bool] = True
    """Whether the values are directions of the residual stream, and not neurons or heads."""
    has_heads: ClassVar[bool] = False
    """Whether a row is cut into the attention's heads, side by side, each patched on its own."""
    is_signed: ClassVar[bool] = True
    """Whether a value counts in both signs."""
    rank: ClassVar[int] = 100
    """Where the name stands in lists: smaller ones first, equal ones by name."""

    @abstractmethod
    def module(self, family: Family, block: nn.Module) -> nn.Module:
        """The module of a block that is read."""

    def width(self, family: Family, model: nn.Module) -> int:
        """How many numbers a row has."""
        return family.d_model(model)

    def first_after(self, layer: int) -> int:
        """The first block that a stream enters with an edit of the site of block `layer` in it: no block runs twice."""
        return layer + 1

    @abstractmethod
    def into_stream(
        self, family: Family, block: nn.Module, edited: Tensor, before: Tensor | None, attn_out: Tensor | None
    ) -> Tensor:
        """The stream (…, d_model) that enters block `first_after` once the site holds `edited` (…, width).

        `before` (…, d_model) is what entered the site's block, `attn_out` (…, d_model) what its attention wrote; both may
        have fewer leading dimensions than `edited`, and are None where the site is the stream.
        """

    def holds(self, writer: str, layer: int, own: int) -> bool:
        """Whether what a writer of block `layer` wrote to the stream is part of what the site of block `own` holds.

        Writers are `embedding` (its layer is -1), `attention` and `mlp`. Neurons and heads hold nothing that was written.
        """
        return False
