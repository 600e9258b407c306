"""The place that a path or a URL names."""

from __future__ import annotations

from pathlib import Path

from actstore.errors import InputError
from actstore.folder import Folder
from actstore.place import Place

BUCKET_SCHEMES = ("s3", "gs", "az")


def absolute(url: str | Path) -> str:
    """The name of a place for a process with another working folder."""
    return str(url) if "://" in str(url) else str(Path(url).absolute())


def open_place(url: str | Path | Place) -> Place:
    """The place a path, a URL such as s3://bucket/prefix, or a place names. Raises InputError for an unknown scheme."""
    if isinstance(url, Place):
        return url
    scheme, separator, _ = str(url).partition("://")
    if not separator:
        return Folder(url)
    if scheme not in BUCKET_SCHEMES:
        raise InputError(f"{url}: scheme {scheme!r} is not known; use a path or one of {', '.join(BUCKET_SCHEMES)}.")
    from actstore.bucket import Bucket

    return Bucket(str(url))
