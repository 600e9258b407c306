"""The arrays of an analysis as they are written, a Zarr group in a folder or a bucket; sparse tables in tiles, as read."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import scipy.sparse as sp
import zarr
from numpy.typing import NDArray
from zarr.errors import ContainsGroupError

from actstore import paths
from actstore.errors import DamagedStore
from actstore.folder import Folder
from actstore.open_place import open_place
from actstore.place import Place
from pipelines.analysis.stored_arrays import COMPRESSOR, StoredArrays

CHUNK_ENTRIES, OBJECT_CHUNKS = 1 << 16, 64
LOADED_ENTRIES = 1 << 25
"""Most entries of a table that is read whole when most of its rows are needed: about 400 MB."""


def open_arrays(place: Place, mode: Any) -> zarr.Group:
    """The Zarr group of an analysis, to write to. Several may ask for it with mode "a" at once: one of them creates it."""
    where: Any
    if isinstance(place, Folder):
        where = place.path / paths.DATA
    else:
        data: Any = open_place(f"{place.url}/{paths.DATA}")
        where = zarr.storage.ObjectStore(data.objects)
    try:
        return zarr.open_group(where, mode=mode, zarr_format=3)
    except ContainsGroupError:  # not there when it was looked for, there when it was to be created
        return zarr.open_group(where, mode="r+", zarr_format=3)


def create_arrays(url: str, group: str, arrays: dict[str, NDArray[Any]], chunk_bytes: int = 0) -> None:
    """Write whole arrays below a group of the analysis at `url`; arrays of the same names are replaced.

    Long columns are cut into chunks of 65,536 entries, which lie 64 in an object; others by rows, at most `chunk_bytes` a
    chunk when given.
    """
    root = open_arrays(open_place(url), "a")
    for name, array in arrays.items():
        array = np.ascontiguousarray(array)
        rows = max(1, chunk_bytes // max(array.nbytes // max(len(array), 1), 1)) if chunk_bytes else CHUNK_ENTRIES
        written = _create_array(root, f"{group}/{name}", array.shape, array.dtype, rows)
        if array.size:
            written[...] = array


def _create_array(root: zarr.Group, name: str, shape: tuple[int, ...], dtype: Any, rows: int) -> Any:
    chunk = (max(1, min(rows, shape[0])), *(max(n, 1) for n in shape[1:]))
    n_chunks = -(-shape[0] // chunk[0])
    return root.create_array(
        name,
        shape=shape,
        dtype=dtype,
        chunks=chunk,
        shards=(chunk[0] * min(OBJECT_CHUNKS, n_chunks), *chunk[1:]) if n_chunks > 1 else None,
        compressors=[zarr.codecs.BloscCodec(cname=COMPRESSOR, shuffle="shuffle"), zarr.codecs.Crc32cCodec()],
        overwrite=True,
        config={"write_empty_chunks": True},  # so that a chunk that is absent is one that was lost
    )


class ColumnWriter:
    """Long columns of the same, known length, written piece by piece, in order; holds at most one object's entries.

    The bytes on disk are those that `create_arrays` writes for the whole columns.
    """

    def __init__(self, url: str, group: str, dtypes: dict[str, Any], n_entries: int):
        root = open_arrays(open_place(url), "a")
        self._arrays = {
            name: _create_array(root, f"{group}/{name}", (n_entries,), dtype, CHUNK_ENTRIES)
            for name, dtype in dtypes.items()
        }
        self._room = min(n_entries, OBJECT_CHUNKS * CHUNK_ENTRIES)
        self._held = {name: np.empty(self._room, dtype) for name, dtype in dtypes.items()}
        self._n_held, self._n_written, self._n_entries = 0, 0, n_entries

    def add(self, **pieces: NDArray[Any]) -> None:
        """The next entries of each column."""
        (n_new,) = {len(piece) for piece in pieces.values()}
        place = 0
        while place < n_new:
            n = min(n_new - place, self._room - self._n_held)
            for name, piece in pieces.items():
                self._held[name][self._n_held : self._n_held + n] = piece[place : place + n]
            place, self._n_held = place + n, self._n_held + n
            if self._n_held == self._room or self._n_written + self._n_held == self._n_entries:
                self._flush()

    def _flush(self) -> None:
        entries = slice(self._n_written, self._n_written + self._n_held)
        for name, held in self._held.items():
            self._arrays[name][entries] = held[: self._n_held]
        self._n_written, self._n_held = entries.stop, 0


class SparseRows:
    """A sparse matrix kept in tiles of rows, each as CSR: a row is read alone.

    Raises KeyError when the analysis has no such table, DamagedStore when its parts do not fit together.
    """

    def __init__(self, arrays: StoredArrays, group: str, n_rows: int, n_columns: int):
        self._arrays, self._group, self.n_columns = arrays, group, n_columns
        self._first: NDArray[np.int64] = arrays.whole(f"{group}/tile_starts", (None,)).astype(np.int64)
        if not _are_starts(self._first, n_rows):
            raise self._damaged("tile_starts", f"do not lead from 0 to {n_rows:,} rows")
        self._tile = lru_cache(maxsize=64)(self._open_tile)
        self._in_memory = False

    def load(self) -> None:
        """Read each tile whole at its first use, unless the table has more than LOADED_ENTRIES entries."""
        n_entries = sum(len(self._arrays.array(self._name(tile, "columns"))) for tile in range(self.n_tiles))
        if n_entries <= LOADED_ENTRIES and not self._in_memory:
            self._in_memory = True
            self._tile.cache_clear()

    @property
    def n_tiles(self) -> int:
        return len(self._first) - 1

    def _name(self, tile: int, array: str) -> str:
        return f"{self._group}/tiles/{tile:06d}/{array}"

    def _damaged(self, name: str, what: str) -> DamagedStore:
        return DamagedStore(f"{self._arrays.where(f'{self._group}/{name}')}: {what}; restore it from a copy.")

    def _open_tile(self, tile: int) -> tuple[NDArray[np.int64], dict[str, Any]]:
        n_rows = int(self._first[tile + 1] - self._first[tile])
        names = self._arrays.names(f"{self._group}/tiles/{tile:06d}")
        if not {"starts", "columns"} <= set(names):
            raise self._damaged(f"tiles/{tile:06d}", "its starts or columns are missing")
        starts = self._arrays.whole(self._name(tile, "starts"), (n_rows + 1,)).astype(np.int64)
        arrays: dict[str, Any] = {name: self._arrays.array(self._name(tile, name)) for name in names if name != "starts"}
        n_entries = len(arrays["columns"])
        if not _are_starts(starts, n_entries):
            raise self._damaged(f"tiles/{tile:06d}/starts", f"do not lead from 0 to {n_entries:,} entries")
        for name, array in arrays.items():
            if array.shape != (n_entries,):
                raise self._damaged(f"tiles/{tile:06d}/{name}", f"has shape {array.shape}, {n_entries:,} entries are needed")
        if self._in_memory:
            arrays = {name: array[:] for name, array in arrays.items()}
        return starts, arrays

    def _checked(self, tile: int, columns: NDArray[Any]) -> NDArray[np.int64]:
        """Column numbers that were read. Raises DamagedStore for one that the table does not have."""
        columns = columns.astype(np.int64)
        if len(columns) and not (columns.min() >= 0 and columns.max() < self.n_columns):
            raise self._damaged(f"tiles/{tile:06d}/columns", f"name columns beyond the {self.n_columns:,} there are")
        return columns

    def row(self, row: int, name: str = "count") -> tuple[NDArray[Any], NDArray[Any]]:
        """(columns, values) of one row, columns rising."""
        tile = int(np.searchsorted(self._first, row, side="right")) - 1
        starts, arrays = self._tile(tile)
        first, last = (int(n) for n in starts[row - self._first[tile] : row - self._first[tile] + 2])
        return self._checked(tile, arrays["columns"][first:last]), arrays[name][first:last]

    def column(self, column: int, name: str = "count") -> tuple[NDArray[np.int64], NDArray[Any]]:
        """(rows, values) of one column, rows rising: scans the column numbers, and reads only the values that belong to the
        column."""
        rows, values = [], []
        for tile in range(self.n_tiles):
            starts, arrays = self._tile(tile)
            places = np.flatnonzero(arrays["columns"][:] == column)
            if len(places):
                rows.append(self._first[tile] + np.searchsorted(starts, places, side="right") - 1)
                values.append(arrays[name].take(places))
        return np.concatenate([np.empty(0, np.int64), *rows]), np.concatenate(values or [np.empty(0, np.int64)])

    def tiles(self, name: str = "count") -> Iterator[tuple[slice, sp.csr_array]]:
        """(rows, CSR of them) tile after tile."""
        for tile in range(self.n_tiles):
            starts, arrays = self._open_tile(tile)
            rows = slice(int(self._first[tile]), int(self._first[tile + 1]))
            parts = (arrays[name][:], self._checked(tile, arrays["columns"][:]), starts)
            yield rows, sp.csr_array(parts, shape=(rows.stop - rows.start, self.n_columns))

    def whole(self, name: str = "count") -> sp.csr_array:
        """All rows as one CSR of int64 or float64."""
        joined = sp.csr_array(sp.vstack([tile for _, tile in self.tiles(name)], format="csr"))
        return joined.astype(np.float64 if joined.dtype.kind == "f" else np.int64)


def _are_starts(starts: NDArray[np.int64], last: int) -> bool:
    """Whether these are the places at which parts of a list of `last` entries begin, and its end."""
    return len(starts) > 0 and starts[0] == 0 and starts[-1] == last and bool((np.diff(starts) >= 0).all())
