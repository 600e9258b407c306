"""What a `zarr.json` may say before Zarr is asked to read the array: Zarr v3, plain numbers, codecs that only unpack bytes.

Metadata of a stranger can name a codec that runs code (`pickle`, by Zarr v2 and numcodecs), an object dtype, or a shape
that no memory holds. So an array is looked at here first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np

from actstore.checked_json import parse_json
from actstore.errors import DamagedStore
from actstore.schema import NUMBERS

CODECS = frozenset({"bytes", "blosc", "crc32c", "sharding_indexed"})
DTYPES = frozenset(NUMBERS) | {"bool"}
MOST_DIMENSIONS = 4


class ArrayMetadata(msgspec.Struct, frozen=True):
    """The shape, dtype and chunk shape of an array of Zarr v3."""

    zarr_format: int
    node_type: str
    shape: list[int]
    data_type: str
    chunk_grid: dict[str, Any]
    codecs: list[Any]

    @property
    def chunk_shape(self) -> list[int]:
        return [int(n) for n in self.chunk_grid["configuration"]["chunk_shape"]]

    @property
    def n_bytes(self) -> int:
        """Bytes of the whole array in memory."""
        return int(np.prod([float(n) for n in self.shape])) * np.dtype(self.data_type).itemsize

    @property
    def n_objects(self) -> int:
        """Objects in which the chunks lie; one of shape () or with a dimension of 0 has at least one, or none."""
        return int(np.prod([-(-n // max(chunk, 1)) for n, chunk in zip(self.shape, self.chunk_shape, strict=True)]))


def array_metadata(data: bytes, where: str) -> ArrayMetadata:
    """What an array's `zarr.json` says. Raises DamagedStore, naming what is wrong, for what no store of ours has."""
    value = parse_json(data, where)
    try:
        metadata = msgspec.convert(value, ArrayMetadata, strict=True)
        chunks = metadata.chunk_shape
        codecs = set(_codec_names(metadata.codecs))
    except (msgspec.ValidationError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise DamagedStore(f"{where}: not the metadata of an array of Zarr v3 ({error}); restore it from a copy.") from error
    what = ""
    if metadata.zarr_format != 3 or metadata.node_type != "array":
        what = f"{metadata.node_type} of Zarr format {metadata.zarr_format}, not an array of format 3"
    elif metadata.data_type not in DTYPES:
        what = f"data type {metadata.data_type!r}; only plain numbers are read"
    elif codecs - CODECS:
        what = f"codec {min(codecs - CODECS)!r}; only {', '.join(sorted(CODECS))} are read"
    elif len(chunks) != len(metadata.shape) or len(chunks) > MOST_DIMENSIONS or min([1, *chunks]) < 1:
        what = f"shape {metadata.shape} in chunks of {chunks}"
    elif not all(0 <= n <= 1 << 53 for n in metadata.shape):
        what = f"shape {metadata.shape}"
    if what:
        raise DamagedStore(f"{where}: {what}; restore it from a copy.")
    return metadata


def _codec_names(codecs: list[Any]) -> Iterator[str]:
    """The names of codecs, those inside shards too."""
    for codec in codecs:
        if isinstance(codec, str):
            yield codec
            continue
        yield str(codec["name"])
        configuration = codec.get("configuration") or {}
        for inner in ("codecs", "index_codecs"):
            yield from _codec_names(configuration.get(inner, []))
