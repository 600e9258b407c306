"""Registries that are folders: what lies in a package is offered, and no list of names is kept anywhere."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from types import ModuleType


def modules_of(package: ModuleType) -> list[ModuleType]:
    """Every module of a package, imported, by rising name.

    >>> import pipelines.shared
    >>> [module.__name__ for module in modules_of(pipelines.shared)][:2]
    ['pipelines.shared.cluster', 'pipelines.shared.environment']
    """
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    return [import_module(f"{package.__name__}.{name}") for name in names]
