"""In: a package whose files register by lying there. Out: the concrete classes that they define."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from inspect import isabstract
from types import ModuleType
from typing import TypeVar

Kind = TypeVar("Kind")


def classes_in(package: ModuleType, base: type[Kind]) -> list[type[Kind]]:
    """Concrete subclasses of `base` that the modules of a package define, in the order of modules.

    The folders of `package.__path__` are listed: a folder appended there takes part as well.
    """
    modules = [import_module(f"{package.__name__}.{entry.name}") for entry in pkgutil.iter_modules(package.__path__)]
    return [
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type)
        and value.__module__ == module.__name__
        and issubclass(value, base)
        and not isabstract(value)
    ]
