"""`zarr.json` of an array that anyone may have written: accepted only as the writers of a store or an analysis write it.

Zarr knows codecs that run code or unfold without end, and types that hold Python objects; here only what is written is
read: format 3, whole numbers and floats, the codecs of CODECS, and shapes whose bytes the stored ones can give.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta

from actstore.checked_json import checked, parse_json
from actstore.errors import DamagedStore

CODECS = ("bytes", "blosc", "crc32c", "sharding_indexed")
MOST_DIMENSIONS = 4

Length = Annotated[int, Meta(ge=0, le=1 << 40)]
ChunkLength = Annotated[int, Meta(ge=1, le=1 << 40)]
DataType = Literal[
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64"
]


@dataclass(frozen=True)
class ChunkShape:
    """The configuration of a regular grid."""

    chunk_shape: list[ChunkLength]


@dataclass(frozen=True)
class ChunkGrid:
    """How an array is cut into objects."""

    name: Literal["regular"]
    configuration: ChunkShape


@dataclass(frozen=True)
class Separator:
    """The configuration of Zarr's default chunk keys."""

    separator: Literal["/"]


@dataclass(frozen=True)
class ChunkKeys:
    """How the objects of an array are called: `c/0/0`."""

    name: Literal["default"]
    configuration: Separator


@dataclass(frozen=True)
class ArrayMetadata:
    """The metadata of an array."""

    zarr_format: Literal[3]
    node_type: Literal["array"]
    shape: list[Length]
    data_type: DataType
    chunk_grid: ChunkGrid
    chunk_key_encoding: ChunkKeys
    fill_value: bool | int | float
    codecs: list[dict[str, Any]]
    attributes: dict[str, Any]
    dimension_names: list[str | None] | None = None
    storage_transformers: list[Any] | None = None

    @property
    def grid(self) -> tuple[int, ...]:
        """How many objects lie along each dimension."""
        object_shape = self.chunk_grid.configuration.chunk_shape
        return tuple(-(-n // own) for n, own in zip(self.shape, object_shape, strict=True))

    @property
    def n_objects(self) -> int:
        """Objects in which the chunks lie."""
        return math.prod(self.grid)

    @property
    def n_bytes(self) -> int:
        """Bytes of the whole array in memory."""
        return math.prod(self.shape) * np.dtype(self.data_type).itemsize


def parse_array_metadata(data: bytes, where: str, compressor: str) -> ArrayMetadata:
    """Raises DamagedStore for a `zarr.json` that is not one of an array that is written with Blosc's `compressor`."""
    found = checked(parse_json(data, where), ArrayMetadata, where)
    objects = found.chunk_grid.configuration.chunk_shape
    if found.fill_value != 0:
        raise _refused(where, f"fill value {str(found.fill_value)[:40]}")
    if not 1 <= len(found.shape) <= MOST_DIMENSIONS or len(objects) != len(found.shape) or found.storage_transformers:
        raise _refused(where, f"an array of shape {found.shape} in objects of {objects}")
    chunks = _inner_chunks(found.codecs, objects, where, compressor)
    for n, of_object, of_chunk in zip(found.shape, objects, chunks, strict=True):
        # as arrays are cut: no chunk is longer than the array, no object reaches a chunk beyond its end
        if of_chunk > max(n, 1) or of_object % of_chunk or of_object >= max(n, 1) + of_chunk:
            raise _refused(where, f"shape {found.shape} in objects of {objects}, chunks of {chunks}")
    return found


def _inner_chunks(codecs: list[dict[str, Any]], object_shape: list[int], where: str, compressor: str) -> list[int]:
    """The shape of the smallest chunks; checks the names and settings of all codecs on the way."""
    names = [codec.get("name") for codec in codecs]
    for name in names:
        if name not in CODECS:
            raise _refused(where, f"codec {str(name)[:40]!r}; only {', '.join(CODECS)} are read")
    if names == ["sharding_indexed"]:
        inside = codecs[0].get("configuration")
        inside = inside if isinstance(inside, dict) else {}
        own = checked(inside.get("codecs"), list[dict[str, Any]], where)
        index = [codec.get("name") for codec in checked(inside.get("index_codecs"), list[dict[str, Any]], where)]
        shape = checked(inside.get("chunk_shape"), list[ChunkLength], where)
        if index == ["bytes", "crc32c"] and len(shape) == len(object_shape) and _is_plain(own, compressor):
            return shape
    elif _is_plain(codecs, compressor):
        return object_shape
    raise _refused(where, f"codecs {', '.join(map(str, names))} in another order or with other settings")


def _is_plain(codecs: list[dict[str, Any]], compressor: str) -> bool:
    """Whether these are bytes, then blosc with this compressor, then crc32c."""
    settings = codecs[1].get("configuration") if len(codecs) > 1 else None
    return (
        [codec.get("name") for codec in codecs] == ["bytes", "blosc", "crc32c"]
        and isinstance(settings, dict)
        and settings.get("cname") == compressor
    )


def _refused(where: str, what: str) -> DamagedStore:
    return DamagedStore(f"{where}: {what}: no array of ours has this; get the files again, or make them anew.")
