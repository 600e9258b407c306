"""Records and columns as Parquet."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

if TYPE_CHECKING:
    import pyarrow as pa


def parquet_bytes(table: list[dict[str, Any]] | dict[str, NDArray] | pa.Table) -> bytes:
    """A Parquet file, for pandas, polars or DuckDB, of records (a row each, a column per key), columns or a table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not isinstance(table, pa.Table):
        table = pa.table(table) if isinstance(table, dict) else pa.Table.from_pylist(table)
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()
