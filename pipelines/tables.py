"""Records and columns as Parquet."""

from __future__ import annotations

import io
from typing import Any

from numpy.typing import NDArray


def parquet_bytes(table: list[dict[str, Any]] | dict[str, NDArray]) -> bytes:
    """A Parquet file of records, a row each and a column a key, or of columns; pandas, polars and DuckDB open it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(pa.table(table) if isinstance(table, dict) else pa.Table.from_pylist(table), sink, compression="zstd")
    return sink.getvalue()
