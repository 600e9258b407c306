"""Arrays as the bytes of Zarr v3 objects, and back. Pure: nothing here reads or writes a place.

zarr-python makes every object, in memory, and reads the tables. Chunks of row arrays are taken out of their shard
directly, by the shard's index: a tenth of the time, and each chunk's crc32c is checked where its rows are used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import google_crc32c
import numpy as np
import zarr
from numcodecs import blosc
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, BloscShuffle, Crc32cCodec
from zarr.core.array_spec import ArrayConfigParams
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.errors import BaseZarrError
from zarr.storage import MemoryStore

from actstore import paths
from actstore.array_metadata import parse_array_metadata
from actstore.dimensions import row_dimensions, table_dimensions
from actstore.errors import DamagedStore
from actstore.files import Entry, object_entry
from actstore.layout import Layout
from actstore.schema import TABLE_CHUNK, Manifest, RowArray
from actstore.segment_record import SegmentRecord

TABLE_COMPRESSOR: Literal["zstd"] = "zstd"
ALL_CHUNKS: ArrayConfigParams = {"write_empty_chunks": True}
"""Chunks of zeros are written too, since a missing chunk counts as a fault."""
CRC_BYTES = 4
ABSENT = np.iinfo(np.uint64).max


class Unreadable(Exception):
    """The bytes are not those of a writer; the message says what is wrong with them."""


def segment_objects(manifest: Manifest, segment: SegmentRecord, tables: dict[str, NDArray[Any]]) -> dict[str, bytes]:
    """Every object that a segment has before its first row, by its name in the store: groups, tables, array metadata.

    Metadata of arrays lie below `data.zarr/segments/0000/`, and the groups above them are part of it, since a Zarr
    library that walks the store needs them.
    """
    row_arrays = [
        (f"{part}/{array.name}", array, record.layout, record.n_rows)
        for part, record in segment.parts.items()
        for array in manifest.arrays
    ]
    d_model = manifest.model.d_model
    dimensions = {name: table_dimensions(name, values.shape, d_model) for name, values in tables.items()}
    dimensions |= {name: row_dimensions(array.name, array.width, d_model) for name, array, _, _ in row_arrays}
    return group_objects(paths.segment_group(segment.index), tables, row_arrays, dimensions)


def group_objects(
    group: str,
    tables: dict[str, NDArray[Any]],
    row_arrays: list[tuple[str, RowArray, Layout, int]],
    dimensions: Mapping[str, tuple[str, ...]],
) -> dict[str, bytes]:
    """The objects of a group in `data.zarr`: whole tables, and the metadata of row arrays (name, array, layout, rows).

    `dimensions` names the axes of each. A group `rows` says that its arrays are coordinates: what xarray calls the
    values that tell where a row stands.
    """
    memory: dict[str, Buffer] = {}
    coordinates = {"coordinates": " ".join(name.rpartition("/")[2] for name in paths.ROW_PLACES)}
    for part in sorted({name.removesuffix(paths.WINDOW) for name in dimensions if name.endswith(f"/{paths.WINDOW}")}):
        where = f"{group}/{part}{paths.WINDOW.rpartition('/')[0]}"
        zarr.create_group(MemoryStore(memory), path=where, zarr_format=3, attributes=coordinates)
    for name, values in tables.items():
        table = zarr.create_array(
            store=MemoryStore(memory),
            name=f"{group}/{name}",
            shape=values.shape,
            chunks=tuple(min(TABLE_CHUNK, max(n, 1)) for n in values.shape),
            dtype=values.dtype,
            compressors=_compressors(True, values.dtype.itemsize),
            dimension_names=dimensions[name],
            config=ALL_CHUNKS,
        )
        table[...] = values
    for name, array, layout, n_rows in row_arrays:
        _create_row_array(memory, f"{group}/{name}", array, layout, n_rows, dimensions[name])
    return {f"{paths.DATA}/{name}": data for name, data in _objects(memory).items()}


def read_table(objects: dict[str, bytes], places: NDArray[np.int64] | None = None) -> NDArray[Any]:
    """A table from its objects, named relative to its folder (`zarr.json`, `c/0`, ...). Raises Unreadable.

    With `places`, only the values there of a table of one dimension: the objects of other chunks are not needed.
    """
    buffer = default_buffer_prototype().buffer
    try:
        if "zarr.json" not in objects:
            raise Unreadable("no record names such a table")
        metadata = parse_array_metadata(objects["zarr.json"], "zarr.json", TABLE_COMPRESSOR)
        if metadata.n_objects != len(objects) - 1 and places is None:
            raise Unreadable(f"shape {metadata.shape} needs {metadata.n_objects} objects, {len(objects) - 1} were committed")
        if max(chunks := metadata.chunk_grid.configuration.chunk_shape) > TABLE_CHUNK:
            raise Unreadable(f"chunks of {chunks} values; a table has {TABLE_CHUNK:,} at most")
        memory = MemoryStore({name: buffer.from_bytes(data) for name, data in objects.items()})
        table = zarr.open_array(memory, mode="r", zarr_format=3)
        return np.asarray(table[...] if places is None else table.vindex[places])
    except (ValueError, TypeError, IndexError, OSError, RuntimeError, KeyError, BaseZarrError, DamagedStore) as error:
        raise Unreadable(str(error)) from error


def shard_object(array: RowArray, layout: Layout, kept: NDArray[Any]) -> bytes:
    """The one object of a shard: its chunks, each with its crc32c, and the index. `kept` is (rows of the shard, width)."""
    memory: dict[str, Buffer] = {}
    _create_row_array(memory, "", array, layout, len(kept), None)[...] = kept
    return next(data for name, data in _objects(memory).items() if name != "zarr.json")


def shard_entry(data: bytes, layout: Layout, n_rows: int) -> Entry:
    """The entry of a shard's object that holds `n_rows` rows: with the stored crc32c of each chunk that holds rows.

    A chunk's own crc32c tells that it is whole; that it is the one that was committed, only this copy of it tells.
    """
    index = read_index(data[-index_bytes(layout) :], -(-n_rows // layout.chunk_rows))
    ends = [int(offset) + int(length) for offset, length in index.tolist()]
    return {**object_entry(data), "chunk_crc32c": "".join(data[end - CRC_BYTES : end].hex() for end in ends)}


def index_bytes(layout: Layout) -> int:
    """Length of a shard's index: offset and length of every chunk, and a crc32c."""
    return 16 * (layout.shard_rows // layout.chunk_rows) + CRC_BYTES


def read_index(data: bytes, n_chunks: int, *, may_be_absent: bool = False) -> NDArray[np.uint64]:
    """(n_chunks, 2): offset and length of each of the first chunks, those that hold rows. Raises Unreadable.

    With `may_be_absent`, chunks that are not there are left out, as those behind the last row may be.
    """
    if _crc(np.frombuffer(data, np.uint8)[:-CRC_BYTES]) != data[-CRC_BYTES:]:
        raise Unreadable("the crc32c of the shard's index does not match")
    index = np.frombuffer(data, "<u8", count=(len(data) - CRC_BYTES) // 8).reshape(-1, 2)[:n_chunks]
    is_there = (index != ABSENT).any(axis=1)
    if not is_there.all() and not may_be_absent:
        raise Unreadable("a chunk that holds rows is absent from the shard's index")
    return np.asarray(index[is_there], np.uint64)


def neighbours(chunks: list[tuple[int, int]], most_bytes: int, most_chunks: int) -> Iterator[list[tuple[int, int]]]:
    """(offset, length) of the adjacent chunks that one read asks for, read after read.

    >>> list(neighbours([(0, 4), (4, 4), (8, 4), (20, 4)], most_bytes=8, most_chunks=9))
    [[(0, 4), (4, 4)], [(8, 4)], [(20, 4)]]
    """
    together: list[tuple[int, int]] = []
    for offset, length in chunks:
        is_next = together and offset == sum(together[-1]) and len(together) < most_chunks
        if not (is_next and offset + length - together[0][0] <= most_bytes):
            if together:
                yield together
            together = []
        together.append((offset, length))
    if together:
        yield together


def check_chunk(data: NDArray[np.uint8], stored: bytes, committed: bytes) -> None:
    """Raises Unreadable when a chunk's bytes do not have the crc32c that follows them, or that is not the committed one."""
    if _crc(data) != stored:
        raise Unreadable("the crc32c of a chunk does not match")
    if stored != committed:
        raise Unreadable(f"another chunk lies there: its crc32c is {stored.hex()}, {committed.hex()} was committed")


def unpack_chunk(data: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    """Decompress a chunk's checked bytes into `out`. Raises Unreadable."""
    try:
        _, n_unpacked, _, n_packed = np.frombuffer(data[:16], "<u4").tolist()  # Blosc's header
        if (n_packed, n_unpacked) != (data.nbytes, out.nbytes):
            raise Unreadable(
                f"a chunk of {data.nbytes:,} bytes, to be unpacked to {out.nbytes:,}, says {n_packed:,} and {n_unpacked:,}"
            )
        blosc.decompress(data, out)
    except (ValueError, RuntimeError) as error:
        raise Unreadable(f"a chunk does not decompress ({error})") from error


def _crc(data: NDArray[np.uint8]) -> bytes:
    return int(google_crc32c.value(data)).to_bytes(CRC_BYTES, "little")


def _create_row_array(
    memory: dict[str, Buffer], name: str, array: RowArray, layout: Layout, n_rows: int, dimensions: tuple[str, ...] | None
) -> Any:
    return zarr.create_array(
        store=MemoryStore(memory),
        name=name,
        shape=(n_rows, *array.tail),
        chunks=(layout.chunk_rows, *array.tail),
        shards=(layout.shard_rows, *array.tail),
        dtype=array.dtype,
        fill_value=_no_row_value(np.dtype(array.dtype)),
        compressors=_compressors(array.kept_as.compressed, np.dtype(array.dtype).itemsize),
        dimension_names=dimensions,
        config=ALL_CHUNKS,
    )


def _no_row_value(dtype: np.dtype[Any]) -> float:
    """NaN, the largest unsigned (for bf16 a NaN as well) or the smallest signed integer, which no row has: what lies
    behind the rows of a short last shard."""
    if dtype.kind == "f":
        return float("nan")
    return int(np.iinfo(dtype).min or np.iinfo(dtype).max)


def _compressors(compressed: bool, itemsize: int) -> list[Any]:
    blosc_codec = (
        [BloscCodec(typesize=itemsize, cname=TABLE_COMPRESSOR, clevel=1, shuffle=BloscShuffle.shuffle)] if compressed else []
    )
    return [*blosc_codec, Crc32cCodec()]


def _objects(memory: dict[str, Buffer]) -> dict[str, bytes]:
    return {name: buffer.to_bytes() for name, buffer in memory.items()}
