"""In: token windows and a language model. Out: the activations at named sites, without running what is not needed.

A site is a name and a layer (`resid_post.6`). One small table says how a family of decoders names its parts;
another says which part of a block each site reads. Blocks after the last wanted one and the LM head are not run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from actstore.errors import InputError


@dataclass(frozen=True)
class Family:
    """Where a decoder family keeps its parts: of the model, and of a block.

    Of a block: attention, what puts its heads' outputs together, the LayerNorm before the MLP, the MLP.
    """

    tokens: str
    positions: str
    blocks: str
    final_norm: str
    unembedding: str
    attention: str
    head_outputs: str
    mlp_norm: str
    mlp: str
    mlp_down: str
    """The matrix that brings the MLP's neurons back to d_model."""


FAMILIES = {
    "gpt2": Family(
        tokens="transformer.wte",
        positions="transformer.wpe",
        blocks="transformer.h",
        final_norm="transformer.ln_f",
        unembedding="lm_head",
        attention="attn",
        head_outputs="attn.c_proj",
        mlp_norm="ln_2",
        mlp="mlp",
        mlp_down="mlp.c_proj",
    )
}
"""By `config.model_type`; another decoder is another line here."""

MLP_HIDDEN = "mlp_hidden"
SITES: dict[str, tuple[Callable[[nn.Module, Family], nn.Module], bool]] = {
    "resid_pre": (lambda block, family: block, True),
    "resid_post": (lambda block, family: block, False),
    "attn_out": (lambda block, family: attrgetter(family.attention)(block), False),
    "mlp_out": (lambda block, family: attrgetter(family.mlp)(block), False),
    MLP_HIDDEN: (lambda block, family: attrgetter(family.mlp_down)(block), True),
}
"""Site name -> (which module of a block, whether its input is read and not its output). `mlp_hidden` are the MLP's neurons
after their non-linearity."""


@dataclass(frozen=True)
class Site:
    """Where in the model rows are read: `resid_post` of block `layer` is the residual stream after it."""

    name: str
    layer: int

    @property
    def label(self) -> str:
        return f"{self.name}.{self.layer}"

    @classmethod
    def parse(cls, label: str) -> Site:
        name, _, layer = label.rpartition(".")
        return cls(name, int(layer))


class _Captured(Exception):
    """The last wanted site has been read: the rest of the forward pass is not needed."""


def family_of(model: nn.Module) -> Family:
    """Where a model of a known family keeps its parts."""
    config: Any = model.config
    return FAMILIES[config.model_type]


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks of a model of a known family."""
    blocks: nn.ModuleList = attrgetter(family_of(model).blocks)(model)
    return blocks


def site_module(model: nn.Module, site: Site) -> tuple[nn.Module, bool]:
    """The module a site reads and whether it reads the input. Raises InputError for a layer the model has not."""
    blocks = blocks_of(model)
    if site.name not in SITES:
        raise InputError(f"site {site.name!r}: known sites are {', '.join(SITES)}.")
    if not 0 <= site.layer < len(blocks):
        raise InputError(f"layer {site.layer}: the model has {len(blocks)} blocks; choose 0 to {len(blocks) - 1}.")
    choose, reads_input = SITES[site.name]
    return choose(blocks[site.layer], family_of(model)), reads_input


def site_width(model: nn.Module, site: Site) -> int:
    """How many numbers a row of a site has: d_model, or the MLP's neurons."""
    config: Any = model.config
    d_model: int = config.hidden_size
    return d_model if site.name != MLP_HIDDEN else int(getattr(config, "n_inner", None) or 4 * d_model)


@contextmanager
def hooked(model: nn.Module, site: Site, edit: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Call `edit` with the site's activation (batch, position, d_model) in every forward pass of the block.

    What it returns replaces the activation; None leaves it. No hook is left behind, also after an exception.
    """
    module, reads_input = site_module(model, site)

    def on_input(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if args:
            replaced = edit(args[0])
            return None if replaced is None else ((replaced, *args[1:]), kwargs)
        replaced = edit(kwargs["hidden_states"])
        return None if replaced is None else (args, {**kwargs, "hidden_states": replaced})

    def on_output(_: nn.Module, args: Any, output: Any) -> Any:
        # A transformers block gives a tensor or, in older versions and for attention, a tuple that begins with it.
        replaced = edit(output[0] if isinstance(output, tuple) else output)
        if replaced is None:
            return None
        return (replaced, *output[1:]) if isinstance(output, tuple) else replaced

    if reads_input:
        handle = module.register_forward_pre_hook(on_input, with_kwargs=True)
    else:
        handle = module.register_forward_hook(on_output)
    try:
        yield
    finally:
        handle.remove()


def capture(model: nn.Module, sites: list[Site], input_ids: Tensor) -> dict[str, Tensor]:
    """Activations (batch, position, d_model) at each site's label, in the model's dtype and on its device.

    The forward pass ends as soon as the last site has been read.
    """
    found: dict[str, Tensor] = {}

    def keep(label: str) -> Callable[[Tensor], None]:
        def read(activation: Tensor) -> None:
            found[label] = activation
            if len(found) == len(sites):
                raise _Captured

        return read

    with torch.inference_mode(), ExitStack() as hooks, suppress(_Captured):
        for site in sites:
            hooks.enter_context(hooked(model, site, keep(site.label)))
        model(input_ids=input_ids, use_cache=False)
    return found
