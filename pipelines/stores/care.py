"""In: a store. Out: its faults, a repair of them, or a copy in another encoding; without any model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from actstore.encodings.registry import activation_encodings
from actstore.errors import InputError, NotAStore
from actstore.integrity import Inspection
from actstore.integrity import repair as drop_faults
from actstore.open_place import open_place
from actstore.place import Place
from actstore.recode import recode_store
from pipelines.shared.progress import track


@dataclass(frozen=True)
class RecodeConfig:
    """What `recode` is asked for; the names are the command's options."""

    store: str | Path
    out: str | Path
    encoding: str = "int8"

    def __post_init__(self) -> None:
        if self.encoding not in activation_encodings():
            raise InputError(f"encoding {self.encoding!r}: choose from {', '.join(activation_encodings())}.")


def verify(store: str | Path, level: str) -> list[str]:
    """One line for each fault. Raises NotAStore when there is nothing to verify."""
    inspection = Inspection(_existing(store))
    with track("verify", inspection.n_bytes, "bytes") as progress:
        return [str(fault) for fault in inspection.find(level, progress.advance)]


def repair(store: str | Path, level: str) -> dict[str, Any]:
    """Drop what is damaged; returns what was put back from a copy and which shards have to be computed again."""
    place = _existing(store)
    with track("repair", 0, "bytes") as progress:
        done = drop_faults(place, level, progress.advance, progress.expect)
    values = {**asdict(done), "store": str(store), "shards": [f"segment {s} {part} {n}" for s, part, n in done.shards]}
    if done.faults > len(done.restored):
        values["next"] = "run the command that wrote the store again, with the same arguments"
    return values


def recode(config: RecodeConfig) -> dict[str, Any]:
    """Copy a store into another encoding; returns sizes and each site's unexplained variance."""
    with track("recode", 0, "rows") as progress:
        return recode_store(config.store, config.out, config.encoding, progress.advance, progress.expect)


def _existing(store: str | Path) -> Place:
    place = open_place(store)
    if not {"manifest.json", "commits"} & place.entries():
        raise NotAStore(f"{store}: not a store; pass a folder that `collect` or `encode` wrote.")
    return place
