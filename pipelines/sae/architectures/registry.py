"""The architectures by name. A new one is one file of this package: a concrete subclass of `Sae` with a name."""

from __future__ import annotations

from functools import cache

import torch

import pipelines.sae.architectures
from actstore.errors import InputError
from actstore.folder_registry import classes_in
from pipelines.sae.base import Sae
from pipelines.sae.tensor_file import Form, forms_of


@cache
def architectures() -> dict[str, type[Sae]]:
    """Every architecture by its name.

    >>> architectures()["topk"].__name__
    'TopKSae'
    """
    kinds = classes_in(pipelines.sae.architectures, Sae)  # type: ignore[type-abstract]
    return {kind.architecture: kind for kind in kinds if "architecture" in vars(kind)}


def make(name: str, d_model: int, n_features: int, k: int, *, seed: int = 0) -> Sae:
    """A new SAE of the architecture `name`. Raises InputError for an unknown name or a k outside 1..n_features.

    >>> make("topk", 4, 8, 2).architecture
    'topk'
    """
    known = architectures()
    if name not in known:
        raise InputError(f"architecture {name!r}: there is none of that name; choose one of {', '.join(sorted(known))}.")
    return known[name](d_model, n_features, k, seed=seed)


def forms(name: str, d_model: int, n_features: int, k: int) -> dict[str, Form]:
    """The tensors of an SAE of the architecture `name`, without allocating any. Raises what `make` does.

    >>> forms("topk", 4, 8, 2)["W_dec"]
    ('float32', (8, 4))
    """
    with torch.device("meta"):
        return forms_of(make(name, d_model, n_features, k).state_dict())
