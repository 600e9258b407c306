"""The kinds of site by name. A new kind is one file of this package: a concrete subclass of `SiteKind`."""

from __future__ import annotations

from functools import cache

import pipelines.models.sites as package
from actstore.errors import InputError
from actstore.folder_registry import classes_in
from pipelines.models.sites.site import SiteKind


def site_kinds() -> dict[str, SiteKind]:
    """Every kind of site by its name, in the order of lists.

    >>> list(site_kinds())[:2]
    ['resid_pre', 'resid_post']
    """
    return _kinds(tuple(package.__path__))


def kind_of(name: str) -> SiteKind:
    """The kind called `name`. Raises InputError, with the known names, where there is none."""
    if name not in site_kinds():
        raise InputError(f"site {name!r}: known sites are {', '.join(site_kinds())}.")
    return site_kinds()[name]


def collected_names() -> tuple[str, ...]:
    """The sites at which rows are collected.

    >>> collected_names()
    ('resid_pre', 'resid_post', 'attn_out', 'mlp_out', 'mlp_hidden')
    """
    return tuple(name for name, kind in site_kinds().items() if kind.is_collected)


def patched_names() -> tuple[str, ...]:
    """The sites that are attributed and patched.

    >>> patched_names()
    ('resid_pre', 'resid_post', 'attn_out', 'mlp_out', 'head_out')
    """
    return tuple(name for name, kind in site_kinds().items() if kind.is_patched)


@cache
def _kinds(_: tuple[str, ...]) -> dict[str, SiteKind]:
    """Cached by the package's path: after a folder is appended to the path, kinds are listed anew."""
    kinds = [kind() for kind in classes_in(package, SiteKind)]  # type: ignore[type-abstract]
    return {kind.name: kind for kind in sorted(kinds, key=lambda kind: (kind.rank, kind.name))}
