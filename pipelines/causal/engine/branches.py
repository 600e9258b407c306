"""Single edited positions of texts, run on from a cut: the exact forward pass for one position's work each.

A *branch* is one position of a text with another row at the site: it sees the clean text before it and itself. As a decoder
looks only backwards, the branch is the exact forward pass at the edited position, for one position's work in place of a
whole text's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipelines.causal.engine.cut import Cut
from pipelines.models.families.registry import family_of
from pipelines.models.forward import blocks_of, run_blocks
from pipelines.models.key_values import KeyValues


def finish_branches(model: nn.Module, cut: Cut, change: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """The stream after the last block: clean (text, position, d_model), and of each branch (text, branch, d_model).

    Branch b of text t is its position `at[t, b]` with `change[t, b]` (width,) added to the site's row there; other
    branches and later positions do not exist for the branch. The cut begins with its texts.
    """
    n_texts, n_positions = cut.x.shape[:2]
    text = torch.arange(n_texts, device=at.device)[:, None]
    before = torch.arange(n_positions, device=at.device) < at[..., None]
    itself = torch.eye(at.shape[1], dtype=torch.bool, device=at.device).expand(n_texts, -1, -1)
    allowed = torch.cat([before, itself], dim=2)[:, None]
    mask = torch.zeros(allowed.shape, dtype=change.dtype, device=at.device).masked_fill_(
        ~allowed, torch.finfo(change.dtype).min
    )
    rows = cut.take(text, at)
    clean, branch = cut.with_rows(model, cut.x), rows.with_rows(model, rows.x + change)
    for layer in range(cut.first_after, len(blocks_of(model))):
        keys = KeyValues()  # a block's own: those of all blocks would be held for nothing
        clean = run_blocks(model, clean, layer, layer + 1, keys)
        branch = family_of(model).run_block(model, layer, branch, mask, at, keys.until())
    return clean, branch
