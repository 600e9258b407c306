"""The decoder families by name. A new family is one file of this package: a concrete subclass of `Family`."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn

import pipelines.models.families as package
from actstore.errors import InputError
from actstore.folder_registry import classes_in
from pipelines.models.families.family import Family


def families() -> dict[str, Family]:
    """Every family by the `model_type` of its configuration, in the order of names.

    >>> families()["gpt2"].model_type
    'gpt2'
    """
    return _families(tuple(package.__path__))


def family_of(model: nn.Module) -> Family:
    """The family of a loaded model. Raises InputError, with the known families, for a model of another family."""
    config: Any = getattr(model, "config", None)
    model_type = getattr(config, "model_type", type(model).__name__)
    if model_type not in families():
        raise InputError(f"model: is a {model_type}; known are {', '.join(families())} of transformers.")
    return families()[model_type]


@cache
def _families(_: tuple[str, ...]) -> dict[str, Family]:
    """Cached by the package's path: after a folder is appended to the path, families are listed anew."""
    known = [kind() for kind in classes_in(package, Family)]  # type: ignore[type-abstract]
    return {family.model_type: family for family in sorted(known, key=lambda family: family.model_type)}
