"""Registries that are folders: what lies in a package is offered, and no list of names is kept anywhere."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from types import ModuleType


def modules_of(package: ModuleType) -> list[ModuleType]:
    """Every module of a package, imported, by rising name.

    >>> import pipelines.sae.architectures
    >>> [module.__name__.rpartition(".")[2] for module in modules_of(pipelines.sae.architectures)][:2]
    ['batchtopk', 'gated']
    """
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    return [import_module(f"{package.__name__}.{name}") for name in names]
