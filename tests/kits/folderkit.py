"""One more file in a registry that is a folder, for the length of a test."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any


@contextmanager
def file_added(package: ModuleType, listing: Callable[..., Any], folder: Path, name: str, text: str) -> Iterator[None]:
    """While the block runs, the module `name` with this source lies in `package`, whose `listing` is a cached function."""
    (folder / f"{name}.py").write_text(text, encoding="utf-8")
    own = list(package.__path__)
    package.__path__ = [*own, str(folder)]
    listing.cache_clear()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        package.__path__ = own
        sys.modules.pop(f"{package.__name__}.{name}", None)
        vars(package).pop(name, None)
        listing.cache_clear()  # type: ignore[attr-defined]
