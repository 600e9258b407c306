"""Registries that are folders: what lies in a package is offered, and no list of names is kept anywhere.

The folders of `package.__path__` are listed: a folder appended there takes part as well.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from inspect import isabstract
from types import ModuleType
from typing import TypeVar

Kind = TypeVar("Kind")


def modules_of(package: ModuleType) -> list[ModuleType]:
    """Every module of a package, imported, in the order of names.

    >>> import actstore.encodings
    >>> [module.__name__ for module in modules_of(actstore.encodings)][:2]
    ['actstore.encodings.base', 'actstore.encodings.bf16']
    """
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    return [import_module(f"{package.__name__}.{name}") for name in names]


def classes_in(package: ModuleType, base: type[Kind]) -> list[type[Kind]]:
    """Concrete subclasses of `base` that the modules of a package define, in the order of modules."""
    return [
        value
        for module in modules_of(package)
        for value in vars(module).values()
        if isinstance(value, type)
        and value.__module__ == module.__name__
        and issubclass(value, base)
        and not isabstract(value)
    ]
