"""Records as Parquet."""

from __future__ import annotations

import io
from typing import Any


def parquet_bytes(rows: list[dict[str, Any]]) -> bytes:
    """A Parquet file with a row a record and a column a key; pandas, polars and DuckDB open it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()
