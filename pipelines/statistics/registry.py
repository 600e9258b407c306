"""The statistics by name. A new one is one file of `of_codes/`: a concrete subclass of Statistic that has a name."""

from __future__ import annotations

import pkgutil
from functools import cache
from importlib import import_module
from inspect import isabstract

import pipelines.statistics.of_codes
from pipelines.statistics.statistic import Statistic


@cache
def statistics() -> dict[str, type[Statistic]]:
    """Every statistic by its name, in the order of names.

    >>> statistics()["counts"].__name__
    'FeatureCounts'
    """
    modules = [
        import_module(f"{pipelines.statistics.of_codes.__name__}.{module.name}")
        for module in pkgutil.iter_modules(pipelines.statistics.of_codes.__path__)
    ]
    classes = [value for module in modules for value in vars(module).values() if isinstance(value, type)]
    named = [c for c in classes if issubclass(c, Statistic) and not isabstract(c) and "name" in vars(c)]
    return {c.name: c for c in sorted(named, key=lambda c: c.name)}
