"""The architectures by name. A new one is one file of this package: a concrete subclass of Sae that has a name."""

from __future__ import annotations

import pkgutil
from functools import cache
from importlib import import_module
from inspect import isabstract

import pipelines.sae.architectures
from actstore.errors import InputError
from pipelines.sae.base import Sae


@cache
def architectures() -> dict[str, type[Sae]]:
    """Every architecture by its name.

    >>> architectures()["topk"].__name__
    'TopKSae'
    """
    modules = [
        import_module(f"{pipelines.sae.architectures.__name__}.{module.name}")
        for module in pkgutil.iter_modules(pipelines.sae.architectures.__path__)
    ]
    classes = [value for module in modules for value in vars(module).values() if isinstance(value, type)]
    return {c.architecture: c for c in classes if issubclass(c, Sae) and not isabstract(c) and "architecture" in vars(c)}


def make(name: str, d_model: int, n_features: int, k: int, *, seed: int = 0) -> Sae:
    """A new SAE of the architecture `name`. Raises InputError when there is none, or when k does not fit.

    >>> make("topk", 4, 8, 2).architecture
    'topk'
    """
    found = architectures()
    if name not in found:
        raise InputError(f"architecture {name!r}: there is none of that name; choose one of {', '.join(sorted(found))}.")
    return found[name](d_model, n_features, k, seed=seed)
