"""In: other values for what a site holds. Out: the residual stream with them in it, and the first block that it enters.

A block's output is its input + attention + MLP, so an edit needs no more of its block than what comes after it: the stream
that entered the block and what its attention wrote are taken as recorded.
"""

from __future__ import annotations

from torch import Tensor, nn

from actstore.errors import InputError
from pipelines.models.forward import heads_together, neurons_together, run_mlp
from pipelines.models.sites import MLP_HIDDEN, SITES, Site, blocks_of

HEADS = "head_out"
"""The site of attention heads: z before W_O, one head beside the other (n_heads · d_head values)."""
PATCH_SITES = (*(name for name in SITES if name != MLP_HIDDEN), HEADS)
"""Sites that a trace records, and so those that are attributed and patched."""


def is_stream(site: Site) -> bool:
    """Whether the site is the residual stream itself."""
    return site.name in ("resid_pre", "resid_post")


def first_after(site: Site) -> int:
    """The first block that a stream enters with an edit of the site in it: none runs twice."""
    return site.layer + (site.name != "resid_pre")


def stream_with(
    model: nn.Module, site: Site, edited: Tensor, before: Tensor | None = None, attn_out: Tensor | None = None
) -> Tensor:
    """The stream (…, d_model) that enters block `first_after(site)` once the site holds `edited` (…, width).

    `before` (…, d_model) is what entered the site's block, and `attn_out` what its attention wrote; both may have fewer
    leading dimensions than `edited`. Neither is needed where the site is the stream, nor `attn_out` in the attention.
    """
    if is_stream(site):
        return edited
    assert before is not None
    if site.name in ("mlp_out", MLP_HIDDEN):
        assert attn_out is not None
        return before + attn_out + (neurons_together(model, site.layer)(edited) if site.name == MLP_HIDDEN else edited)
    written = heads_together(model, site.layer)(edited) if site.name == HEADS else edited
    return run_mlp(model, site.layer, written + before)


def require_patch_site(model: nn.Module, site: Site) -> Site:
    """Raises InputError for a site that is neither attributed nor patched, or a layer that the model has not."""
    n_layers = len(blocks_of(model))
    if site.name == MLP_HIDDEN:
        raise InputError(
            f"site {site.label}: the MLP's neurons are neither attributed nor patched; `ablate`, `steer` and `effects` "
            "take this run, `attribute` and `patch` one of another site."
        )
    if site.name not in PATCH_SITES:
        raise InputError(f"site {site.name!r}: known sites are {', '.join(PATCH_SITES)}.")
    if not 0 <= site.layer < n_layers:
        raise InputError(f"layer {site.layer}: the model has {n_layers} blocks; choose 0 to {n_layers - 1}.")
    return site
