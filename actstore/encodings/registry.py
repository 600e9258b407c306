"""The encodings by name. A new one is one file of this package: a module that has an `ENCODING`."""

from __future__ import annotations

from functools import cache

import actstore.encodings
from actstore.encodings.base import Encoding
from actstore.folder_registry import modules_of


@cache
def encodings() -> dict[str, Encoding]:
    """Every encoding by its name.

    >>> encodings()["fp16"].largest
    65504.0
    """
    kinds = [module.ENCODING for module in modules_of(actstore.encodings) if hasattr(module, "ENCODING")]
    return {kind.name: kind for kind in kinds}


@cache
def activation_encodings() -> tuple[str, ...]:
    """The names that `collect --encoding` offers, in the order in which they are offered.

    >>> activation_encodings()
    ('fp16', 'fp32', 'bf16', 'int8')
    """
    places = [(kind.offered, kind.name) for kind in encodings().values() if kind.offered is not None]
    return tuple(name for _, name in sorted(places))


def computed_encodings() -> tuple[str, ...]:
    """The offered names whose rows are computed, and cannot be handed out as kept.

    >>> computed_encodings()
    ('int8',)
    """
    return tuple(name for name in activation_encodings() if encoding_of(name).float_dtype is None)


def encoding_of(name: str) -> Encoding:
    """The encoding that a manifest names."""
    return encodings()[name]
