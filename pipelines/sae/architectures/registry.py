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
    package = pipelines.sae.architectures
    modules = [import_module(f"{package.__name__}.{module.name}") for module in pkgutil.iter_modules(package.__path__)]
    values = [value for module in modules for value in vars(module).values()]
    classes = [value for value in values if isinstance(value, type) and issubclass(value, Sae)]
    return {own.architecture: own for own in classes if not isabstract(own) and "architecture" in vars(own)}


def make(name: str, d_model: int, n_features: int, k: int, *, seed: int = 0) -> Sae:
    """A new SAE of the architecture `name`. Raises InputError when there is none, or when k does not fit.

    >>> make("topk", 4, 8, 2).architecture
    'topk'
    """
    known = architectures()
    if name not in known:
        raise InputError(f"architecture {name!r}: there is none of that name; choose one of {', '.join(sorted(known))}.")
    return known[name](d_model, n_features, k, seed=seed)
