"""The arrays of an analysis, opened for reading: each one's metadata and objects are checked before anything is decoded."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property
from itertools import product
from typing import Any, Literal

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.storage import LocalStore, ObjectStore, WrapperStore

from actstore import paths
from actstore.array_metadata import parse_array_metadata
from actstore.errors import DamagedStore
from actstore.folder import Folder
from actstore.open_place import open_place
from actstore.place import Place

METADATA = "zarr.json"
COMPRESSOR: Literal["lz4"] = "lz4"
MOST_RATIO = 256
"""Bytes that one stored byte may unfold to: lz4 gives at most 255."""
Shape = tuple[int | None, ...]
"""A shape that an array must have; None for a length that may be any."""


class StoredArray:
    """One array, read in part or whole. Raises DamagedStore for what cannot be decoded."""

    def __init__(self, where: str, array: Any):
        self._where, self._array = where, array
        self.shape: tuple[int, ...] = tuple(array.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, selection: Any) -> NDArray[Any]:
        return self._read(lambda: self._array[selection])

    def take(self, places: NDArray[np.int64]) -> NDArray[Any]:
        """The entries at some places of the first dimension."""
        return self._read(lambda: self._array.oindex[places])

    def _read(self, read: Callable[[], Any]) -> NDArray[Any]:
        try:
            return np.asarray(read())
        except (ValueError, RuntimeError, TypeError, KeyError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DamagedStore(f"{self._where}: cannot be read ({reason}); `verify` names what is damaged.") from error


class StoredArrays:
    """All arrays below `data.zarr` of a place.

    `there` are the objects of the place with their lengths, and `read` gives one of them: those of a sealed folder once
    it is finished, those of the place until then.
    """

    def __init__(self, place: Place, there: Mapping[str, int] | None = None, read: Callable[[str], bytes] | None = None):
        self._place = place
        self._there = place.names(paths.DATA) if there is None else there
        self._read = read or place.read
        self._store = _NothingMissing(_store(place))

    def __contains__(self, name: str) -> bool:
        return f"{paths.DATA}/{name}/{METADATA}" in self._there

    def where(self, name: str) -> str:
        """An array or a group as errors name it."""
        return f"{self._place}/{paths.DATA}/{name}"

    @cached_property
    def _groups(self) -> dict[str, list[str]]:
        groups: dict[str, list[str]] = {}
        for name in sorted(self._there):
            path, _, last = name.removeprefix(f"{paths.DATA}/").rpartition("/")
            if last == METADATA and name.startswith(f"{paths.DATA}/"):
                group, _, own = path.rpartition("/")
                groups.setdefault(group, []).append(own)
        return groups

    def names(self, group: str) -> list[str]:
        """The names of the arrays and groups directly in a group."""
        return self._groups.get(group, [])

    def array(self, name: str, shape: Shape | None = None) -> StoredArray:
        """An array, which must have a shape. Raises KeyError when there is none of that name, DamagedStore for one that
        is not as `analyze` writes it."""
        own, where = f"{paths.DATA}/{name}", self.where(name)
        if name not in self:
            if any(other.startswith(f"{own}/") for other in self._there):
                raise DamagedStore(f"{where}: has no {METADATA}, which `analyze` writes; restore it from a copy.")
            raise KeyError(name)
        found = parse_array_metadata(self._read(f"{own}/{METADATA}"), f"{where}/{METADATA}", COMPRESSOR)
        if shape is not None and not _fits(found.shape, shape):
            asked = " x ".join("any" if n is None else str(n) for n in shape)
            raise DamagedStore(
                f"{where}: has shape {found.shape}, the analysis' record says {asked}; restore it from a copy."
            )
        n_objects = math.prod(found.grid)
        if n_objects > len(self._there):
            raise DamagedStore(f"{where}: {n_objects:,} objects, not all of them are there; restore it from a copy.")
        stored = [
            self._there.get("/".join([own, "c", *map(str, place)])) for place in product(*(range(n) for n in found.grid))
        ]
        if None in stored:
            raise DamagedStore(
                f"{where}: {stored.count(None):,} of {n_objects:,} objects are missing; restore it from a copy."
            )
        n_stored = sum(n for n in stored if n is not None)
        if found.n_bytes > MOST_RATIO * n_stored:
            raise DamagedStore(
                f"{where}: {n_stored:,} stored bytes cannot unfold to the {found.n_bytes:,} of shape {found.shape}; "
                "restore it from a copy."
            )
        try:
            array = zarr.open_array(self._store, path=name, mode="r", zarr_format=3)
        except (ValueError, TypeError, KeyError, OverflowError, OSError) as error:
            raise DamagedStore(f"{where}: cannot be opened ({str(error)[:200]}); restore it from a copy.") from error
        if tuple(array.shape) != tuple(found.shape) or array.dtype != np.dtype(found.data_type):
            raise DamagedStore(f"{where}: {METADATA} changed while it was read; run the command again.")
        return StoredArray(where, array)

    def whole(self, name: str, shape: Shape | None = None) -> NDArray[Any]:
        """All of an array. Raises as `array` does."""
        return self.array(name, shape)[...]


class _NothingMissing(WrapperStore[Any]):
    """A store whose absent objects are errors: to Zarr, a chunk that is missing holds zeros."""

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        found = await super().get(key, prototype, byte_range)
        if found is None:
            raise FileNotFoundError(2, "missing", key)
        return found


def _store(place: Place) -> Any:
    if isinstance(place, Folder):
        return LocalStore(place.path / paths.DATA, read_only=True)
    data: Any = open_place(f"{place.url}/{paths.DATA}")
    return ObjectStore(data.objects, read_only=True)


def _fits(found: list[int], shape: Shape) -> bool:
    return len(found) == len(shape) and all(asked in (None, own) for own, asked in zip(found, shape, strict=True))
