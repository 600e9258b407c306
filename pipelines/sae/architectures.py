"""The architectures by name."""

from __future__ import annotations

from actstore.errors import InputError
from pipelines.sae.base import Sae
from pipelines.sae.topk import TopKSae

ARCHITECTURES: dict[str, type[Sae]] = {kind.architecture: kind for kind in (TopKSae,)}


def make(architecture: str, d_model: int, n_features: int, k: int, *, seed: int = 0) -> Sae:
    """An SAE at its start. Raises InputError for a name that is none of `ARCHITECTURES`."""
    if architecture not in ARCHITECTURES:
        raise InputError(f"architecture {architecture!r}: choose from {', '.join(ARCHITECTURES)}.")
    return ARCHITECTURES[architecture](d_model, n_features, k, seed=seed)
