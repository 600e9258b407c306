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
from pipelines.capture import Site
from pipelines.causal.forward import embed, logits, run_blocks
from pipelines.causal.interventions import Trace, logits_after, reading
from pipelines.causal.metrics import Figure
from pipelines.sae.base import Sae

ZERO = 1e-6
"""A gradient below it everywhere is rounding: KL's at the clean run is 1e-8 in fp32, a log-probability's 1e-3 and more."""


def gradients(model: nn.Module, run: Trace, sites: list[Site], figure: Figure, at: int = -1) -> dict[str, Tensor]:
    """∂figure/∂activation (position, width) at each site's label, all by one forward and one backward pass.

    Raises InputError when that is zero everywhere, as KL's is at the clean run. No hook is left behind.
    """
    held: dict[str, Tensor] = {}

    def keep(label: str) -> Callable[[Tensor], None]:
        def read(activation: Tensor) -> None:
            activation.retain_grad()
            held[label] = activation

        return read

    with torch.enable_grad(), ExitStack() as hooks:
        for site in sites:
            hooks.enter_context(reading(model, site, keep(site.label)))
        start = embed(model, run.ids[None]).detach().requires_grad_()
        figure(logits(model, run_blocks(model, start)[:, at])).sum().backward()
    found = {label: _gradient(activation) for label, activation in held.items()}
    require_gradient(found)
    return found


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
            figure(logits_after(model, run, site, points, at)).sum().backward()
        total += _gradient(points, keep_batch=True).sum(dim=0)
    return total / steps


def activation_effects(run: Trace, other: Trace, site: Site, gradient: Tensor, n_heads: int = 1) -> Tensor:
    """(n_heads, position) estimated change of the metric when `other`'s activation takes the place of `run`'s, there.

    With `n_heads` > 1 the site's values are cut into heads, as `head_out` has them.
    """
    products = (other.at(site) - run.at(site)) * gradient
    return products.reshape(len(products), n_heads, -1).sum(dim=2).T


def feature_effects(change: Tensor, sae: Sae, gradient: Tensor) -> Tensor:
    """(position, n_features) estimated change of the figure when the codes change by `change` (position, n_features), each
    alone; minus the codes themselves is an ablation. `gradient` (position, d_model) is that of the SAE's site."""
    return change * (gradient @ sae.W_dec.T.to(gradient.dtype))


def require_gradient(found: dict[str, Tensor]) -> None:
    """Raises InputError when a metric's gradient is zero (up to rounding) at all sites."""
    if max(float(gradient.abs().max()) for gradient in found.values()) < ZERO:
        raise InputError(
            "the metric's gradient is zero at this run, as that of KL is at the clean one: a linear estimate would call "
            "every part inert; take integrated gradients (--steps 16), or another metric."
        )


def _gradient(activation: Tensor, *, keep_batch: bool = False) -> Tensor:
    assert activation.grad is not None
    return activation.grad if keep_batch else activation.grad[0]
