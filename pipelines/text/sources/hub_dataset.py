"""Datasets of the hub, or folders that the `datasets` library reads: streamed, in their own order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from actstore.errors import InputError
from pipelines.shared.error_line import first_line
from pipelines.shared.hub_connection import go_offline_if_unreachable
from pipelines.text.document import Document, documents_of
from pipelines.text.sources.records import text_pieces_of, value_at


@dataclass(frozen=True)
class HubPiece:
    """A split of a dataset, streamed; its network errors come out as one line."""

    name: str
    config: str | None
    split: str
    column: str

    def documents(self) -> Iterator[Document]:
        with _hub_errors(self.name):
            import datasets

            stream = datasets.load_dataset(self.name, self.config, split=self.split, streaming=True)
            for index, record in enumerate(stream):
                name = f"{self.name}:{self.split}:{index}"
                value = value_at(record, self.column, self.name)
                yield from documents_of(name, text_pieces_of(value, self.column, name))


def hub_piece(location: str, column: str) -> tuple[HubPiece, str]:
    """The documents of `owner/name[:config][:split]`, and the dataset's fingerprint."""
    name, *rest = location.split(":")
    config = rest[0] if len(rest) > 1 else None
    split = rest[-1] if rest else "train"
    if not Path(name).exists():
        go_offline_if_unreachable()
    with _hub_errors(name):
        import datasets

        builder = datasets.load_dataset_builder(name, config)
        fingerprint = hashlib.sha256(f"{builder.config_id} {builder.hash}".encode()).hexdigest()
    return HubPiece(name, config, split, column), fingerprint


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """Whatever the hub client raises becomes one line; our own errors pass through."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = first_line(error)
        raise InputError(
            f"corpus hf:{name}: cannot be streamed ({reason}); check the name and the network, or use local files."
        ) from error
