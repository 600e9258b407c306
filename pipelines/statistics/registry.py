"""The statistics by name. A new one is one file of `of_codes/`: a concrete subclass of Statistic that has a name."""

from __future__ import annotations

from functools import cache

import pipelines.statistics.of_codes
from actstore.folder_registry import classes_in
from pipelines.statistics.statistic import Statistic


@cache
def statistics() -> dict[str, type[Statistic]]:
    """Every statistic by its name, in the order of names.

    >>> statistics()["counts"].__name__
    'FeatureCounts'
    """
    kinds = classes_in(pipelines.statistics.of_codes, Statistic)  # type: ignore[type-abstract]
    named = [kind for kind in kinds if "name" in vars(kind)]
    return {kind.name: kind for kind in sorted(named, key=lambda kind: kind.name)}
