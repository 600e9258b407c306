"""In: what actstore wrote. Out: its faults; of a store, a repair of them, or a copy in another encoding. Loads no model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from actstore import paths
from actstore.encodings.registry import activation_encodings
from actstore.errors import InputError, NotAStore, StoreError
from actstore.files import file_sha256
from actstore.folder import Folder
from actstore.integrity import Fault, Inspection
from actstore.integrity import repair as drop_faults
from actstore.kind import found, not_a
from actstore.open_place import open_place
from actstore.place import Place
from actstore.recode import recode_store
from actstore.sealed_folder import folder_faults
from pipelines.sae.run_record import RECORD as RUN_RECORD
from pipelines.sae.run_record import WEIGHTS, read_run_record
from pipelines.shared.progress import Tracker, track
from pipelines.stores.listing import homes


@dataclass(frozen=True)
class RecodeConfig:
    """What `recode` is asked for; the names are the command's options."""

    store: str | Path
    out: str | Path
    encoding: str = "int8"

    def __post_init__(self) -> None:
        if self.encoding not in activation_encodings():
            raise InputError(f"encoding {self.encoding!r}: choose from {', '.join(activation_encodings())}.")


def verify(path: str | Path, level: str) -> list[str]:
    """One line for each fault of what lies at a place; of a folder, also of all that lies below it.

    Raises NotAStore when there is nothing to verify.
    """
    place = open_place(path)
    things = [(place, found(place).kind)] if not isinstance(place, Folder) else list(_below(place))
    there = found(place)
    is_remains = not there.kind and there.words.startswith("holds ")
    if (is_remains or not any(kind for _, kind in things)) and paths.COMMITS not in place.entries():
        raise NotAStore(f"{path}: {there.words}; pass a folder that actstore wrote, or one that holds such folders.")
    lines = []
    with track("verify", 0, "bytes") as progress:
        for own, kind in things:
            prefix = "" if own.url == place.url else f"{Path(own.url).relative_to(place.url)}: "
            lines += [f"{prefix}{fault}" for fault in _faults(own, kind, level, progress)]
    return lines


def what_is_damaged(path: str | Path) -> str:
    """How what lies at a place can be mended: `a store`, `results`, or `several` things in a folder."""
    place = open_place(path)
    kind = found(place).kind
    if paths.COMMITS in place.entries() or kind in ("activations", "codes"):
        return "a store"
    return "results" if kind else "several"


def _below(place: Folder) -> Iterator[tuple[Place, str]]:
    """(place, kind) of the folder and all below it; a store whose manifest is lost or damaged is a store all the same."""
    if paths.COMMITS in place.entries():
        yield place, "activations"
    elif place.path.is_dir():
        for folder, kind in homes(place.path):
            yield Folder(folder), kind


def _faults(place: Place, kind: str, level: str, progress: Tracker) -> list[Fault]:
    if kind in ("activations", "codes") or paths.COMMITS in place.entries():
        inspection = Inspection(place)
        progress.expect(inspection.n_bytes)
        return inspection.find(level, progress.advance)
    if kind == "run":
        return list(_run_faults(Path(place.url), level))
    if level != "meta":
        progress.expect(sum(place.names().values()))
    return folder_faults(place, level, progress.advance)


def _run_faults(run: Path, level: str) -> Iterator[Fault]:
    """A run's record carries its own hash and that of its weights."""
    try:
        record = read_run_record(run)
    except StoreError as error:
        yield Fault(RUN_RECORD, str(error).removeprefix(f"{run / RUN_RECORD}: ").removeprefix(f"{run}: "))
        return
    if not (run / WEIGHTS).exists():
        yield Fault(WEIGHTS, "missing")
    elif level != "meta" and file_sha256(run / WEIGHTS) != record.sae_sha256:
        yield Fault(WEIGHTS, "is not the file of weights that was written")


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
    if not {paths.MANIFEST, paths.COMMITS} & place.entries():
        raise not_a(store, "a store", "pass a folder that `collect` or `encode` wrote.")
    return place
