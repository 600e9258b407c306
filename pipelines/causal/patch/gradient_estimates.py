"""In: a run, what would take the place of its activations. Out: a linear estimate of what each patch would do.

One backward pass gives the gradient of a metric m at every site, and the effect of putting a' in the place of a is about
(a' − a) · ∂m/∂a, for all sites, heads and features at once (Nanda 2023, "Attribution patching"; Syed et al. 2023). For SAE
features the codes are the leaves and the error term is constant: x = Σ code_f · W_dec,f + b_dec + error, so that
∂m/∂code_f = W_dec,f · ∂m/∂x.

At the clean point the gradient of KL(clean ‖ ·) is zero, since KL has its minimum there: KL needs integrated gradients, the
gradient's mean on the way from the other activation to this one (Sundararajan et al. 2017; Marks et al. 2024).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from actstore.errors import InputError
from pipelines.causal.engine.answer_metrics import Divergence, Figure
from pipelines.causal.engine.trace import Trace, logits_after
from pipelines.causal.patch.patch_grid import run_logits
from pipelines.models.capture import hooked
from pipelines.models.forward import embed, logits, run_blocks
from pipelines.models.sites.site import Site
from pipelines.sae.base import Sae


def gradients(model: nn.Module, run: Trace, sites: list[Site], figure: Figure, at: int = -1) -> dict[str, Tensor]:
    """∂figure/∂activation (position, width) at each site's label, all by one forward and one backward pass.

    Raises InputError for KL at the clean run, where it is zero everywhere. No hook is left behind.
    """
    require_slope(model, run, figure, at)
    held: dict[str, Tensor] = {}

    def keep(label: str) -> Callable[[Tensor], None]:
        def read(activation: Tensor) -> None:
            held[label] = activation

        return read

    with torch.enable_grad(), ExitStack() as hooks:
        for site in sites:
            hooks.enter_context(hooked(model, site, keep(site.label)))
        start = embed(model, run.ids[None]).detach().requires_grad_()
        total = figure(logits(model, run_blocks(model, start)[:, at])).sum()
        slopes = torch.autograd.grad(total, list(held.values()))  # not backward(): weights keep no gradients
    return {label: slope[0] for label, slope in zip(held, slopes, strict=True)}


def integrated_gradients(
    model: nn.Module, run: Trace, site: Site, other: Tensor, figure: Figure, steps: int = 16, at: int = -1
) -> Tensor:
    """The gradient's mean (position, width) over `steps` points between `other` (position, width) and the site's activation.

    The points are the midpoints of equal parts. The mean times (a − other), summed, is the metric's difference between the
    two ends up to O(1/steps²), which single gradients do not have; that says nothing of one feature alone.
    """
    if steps < 1:
        raise InputError(f"steps {steps}: need at least 1.")
    base = run.at(site)
    weights = ((torch.arange(steps, device=base.device, dtype=base.dtype) + 0.5) / steps)[:, None, None]
    total = torch.zeros_like(base)
    for part in weights.split(max(1, 2048 // len(run))):
        with torch.enable_grad():
            points = (other + part * (base - other)).detach().requires_grad_()
            (slope,) = torch.autograd.grad(figure(logits_after(model, run, site, points, at)).sum(), points)
        total += slope.sum(dim=0)
    return total / steps


def activation_effects(run: Trace, other: Trace, site: Site, gradient: Tensor, n_heads: int = 1) -> Tensor:
    """(n_heads, position) estimated change of the metric when `other`'s activation takes the place of `run`'s, there.

    With `n_heads` > 1 the site's values are cut into heads, as `head_out` has them.
    """
    products = (other.at(site) - run.at(site)) * gradient
    return products.reshape(len(products), n_heads, -1).sum(dim=2).T


@torch.no_grad()
def feature_effects(change: Tensor, sae: Sae, gradient: Tensor) -> Tensor:
    """(position, n_features) estimated change of the figure when the codes change by `change` (position, n_features), each
    alone; minus the codes themselves is an ablation. `gradient` (position, d_model) is that of the SAE's site."""
    return change * (gradient @ sae.W_dec.T.to(gradient.dtype))


def require_slope(model: nn.Module, run: Trace, figure: Figure, at: int = -1) -> None:
    """Raises InputError for KL at its own reference, where it has its least value and no slope."""
    if isinstance(figure, Divergence) and float(figure(run_logits(model, run, at))) == 0:
        raise InputError(
            "the gradient of KL is zero at the clean run, where KL has its minimum: a linear estimate would call every part "
            "inert; take integrated gradients (--steps 16), or another metric."
        )
