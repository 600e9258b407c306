"""In: token windows and a language model. Out: the activations at named sites.

The forward pass ends at the last wanted site: later blocks and the LM head are not run. `hooked` reads or edits one site
in any forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from actstore.errors import InputError
from pipelines.models.families.registry import family_of
from pipelines.models.sites.registry import collected_names, kind_of, patched_names
from pipelines.models.sites.site import Site


class _Captured(Exception):
    """Raised once the last wanted site has been read, to end the forward pass."""


def require_collected(model: nn.Module, site: Site) -> Site:
    """The site. Raises InputError if no rows are collected there, or if the model lacks the layer."""
    if site.name not in collected_names():
        raise InputError(f"site {site.name!r}: known sites are {', '.join(collected_names())}.")
    return _require_layer(model, site)


def require_patched(model: nn.Module, site: Site) -> Site:
    """The site. Raises InputError if it is neither attributed nor patched, or if the model lacks the layer."""
    if site.name in collected_names() and not kind_of(site.name).is_patched:
        raise InputError(
            f"site {site.label}: {kind_of(site.name).values_are} are neither attributed nor patched; `ablate`, `steer` and "
            "`effects` take this run, `attribute` and `patch` one of another site."
        )
    if site.name not in patched_names():
        raise InputError(f"site {site.name!r}: known sites are {', '.join(patched_names())}.")
    return _require_layer(model, site)


def _require_layer(model: nn.Module, site: Site) -> Site:
    n_blocks = len(family_of(model).blocks(model))
    if not 0 <= site.layer < n_blocks:
        raise InputError(f"layer {site.layer}: the model has {n_blocks} blocks; choose 0 to {n_blocks - 1}.")
    return site


def site_module(model: nn.Module, site: Site) -> tuple[nn.Module, bool]:
    """The module that a site reads, and whether its input is read. Raises InputError for an unknown site or layer."""
    kind, family = kind_of(site.name), family_of(model)
    block = family.blocks(model)[_require_layer(model, site).layer]
    return kind.module(family, block), kind.reads_input


def site_width(model: nn.Module, site: Site) -> int:
    """How many numbers a row of the site has."""
    return kind_of(site.name).width(family_of(model), model)


@contextmanager
def hooked(model: nn.Module, site: Site, edit: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Call `edit` with the site's activation (batch, position, width) in every forward pass of the block.

    The return value of `edit` replaces the activation; None leaves the activation as it is. The hook is removed at the
    end, also after an exception.
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
        # A transformers block returns a tensor; attention and older blocks return a tuple whose first item is that tensor.
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
    """Activations (batch, position, width) by the site's label, in the model's dtype and on its device.

    The forward pass ends as soon as the last site has been read. Raises InputError for a site at which no rows are
    collected, or if the model lacks the layer.
    """
    activations: dict[str, Tensor] = {}

    def keep(label: str) -> Callable[[Tensor], None]:
        def read(activation: Tensor) -> None:
            activations[label] = activation
            if len(activations) == len(sites):
                raise _Captured

        return read

    with torch.inference_mode(), ExitStack() as hooks, suppress(_Captured):
        for site in sites:
            hooks.enter_context(hooked(model, require_collected(model, site), keep(site.label)))
        model(input_ids=input_ids, use_cache=False)
    return activations
