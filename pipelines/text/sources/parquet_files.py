"""Records of .parquet files: a piece is a row group."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actstore.errors import InputError
from pipelines.shared.error_line import first_line
from pipelines.text.document import Document, documents_of
from pipelines.text.sources.records import conversation, no_column, not_text, text_pieces_of

BATCH_RECORDS = 64


@dataclass(frozen=True)
class ParquetPiece:
    """One row group of a .parquet file."""

    path: Path
    name: str
    row_group: int
    column: str

    def documents(self) -> Iterator[Document]:
        import pyarrow.parquet

        with _parquet_errors(self.path), pyarrow.parquet.ParquetFile(self.path) as file:
            keys = _keys_of(file.schema_arrow, self.column)
            if keys is None:
                raise no_column(self.column, file.schema_arrow.names, self.path)
            batches = file.iter_batches(BATCH_RECORDS, [self.row_group], columns=[".".join(keys)])
            index = 0
            for batch in batches:
                for value in _values(batch, keys):
                    name = f"{self.name}:{index}"
                    yield from documents_of(name, self._text(value, name))
                    index += 1

    def _text(self, value: Any, name: str) -> Iterator[str]:
        """The text of an Arrow scalar, in pieces."""
        import pyarrow

        where = f"{self.path}: {name}"
        while isinstance(value, pyarrow.DictionaryScalar | pyarrow.ExtensionScalar):
            value = value.value
        if not value.is_valid:
            return
        if isinstance(value, pyarrow.BinaryScalar):  # text, too
            yield from text_pieces_of(memoryview(value.as_buffer()), self.column, where)
        elif isinstance(value, pyarrow.ListScalar) and (text := conversation(value.as_py())) is not None:
            yield text
        else:
            raise not_text(self.column, str(value.type), where, has_keys=isinstance(value, pyarrow.StructScalar))


def parquet_pieces(path: Path, name: str, column: str) -> list[ParquetPiece]:
    import pyarrow.parquet

    with _parquet_errors(path):
        n_groups = pyarrow.parquet.read_metadata(path).num_row_groups
    return [ParquetPiece(path, f"{name}:{group}", group, column) for group in range(n_groups)]


def _keys_of(schema: Any, column: str) -> list[str] | None:
    """The keys that lead to a column: itself, or those of a path into structs; None where there is none."""
    if schema.names.count(column) == 1:
        return [column]
    first, *rest = column.split(".")
    if not rest or schema.names.count(first) != 1:
        return None
    kind = schema.field(first).type
    for key in rest:
        if not hasattr(kind, "get_field_index") or kind.get_field_index(key) < 0:
            return None
        kind = kind.field(key).type
    return [first, *rest]


def _values(batch: Any, keys: list[str]) -> Any:
    """The column of a batch that keys lead to; a null on the way is a null."""
    import pyarrow.compute

    column = batch.column(keys[0])
    return pyarrow.compute.struct_field(column, keys[1:]) if len(keys) > 1 else column


@contextmanager
def _parquet_errors(path: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable parquet file ({first_line(error)}); restore it from a copy.") from error
