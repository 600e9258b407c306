"""A folder of results, finished by its seal: `seal.json`, which lists every object with its length and sha256.

The seal is written last and removed first, so that a folder that lacks one is not finished. Opening compares what lies
there with the list by names and lengths, which takes one listing; `folder_faults` compares everything. What was added to
the folder later is none of it, except below the folders that are sealed as a whole: nothing may be added there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from actstore.checked_json import Count, Hex64, checked, parse_json
from actstore.errors import DamagedStore, IncompleteStore, OutputExists
from actstore.files import object_entry, parse_record, record_bytes
from actstore.folder import LOCK, is_temporary
from actstore.integrity import Fault, read_in_pieces
from actstore.kind import SEAL, found, kind_words, not_a
from actstore.lease import LEASES
from actstore.open_place import open_place
from actstore.place import Place

REMEDY = "restore it from a copy, or make it again at another --out."

_PART = r"(?!\.{0,2}(?:/|\Z))[^/\\\x00-\x1f\x7f]+"
ObjectName = Annotated[str, Meta(pattern=rf"^{_PART}(?:/{_PART})*\Z", max_length=1024)]
"""The name of an object below a folder: never above it, with `/`."""


@dataclass(frozen=True)
class SealedObject:
    """What is sealed of one object."""

    bytes: Count
    sha256: Hex64


@dataclass(frozen=True)
class FolderSeal:
    """What `seal.json` says: the kind of the folder, its main record, every object, and the folders that are whole."""

    format: Literal["actstore-seal"]
    version: Literal[1]
    kind: str
    record: ObjectName
    objects: dict[ObjectName, SealedObject]
    whole: list[ObjectName]


class SealedFolder:
    """A finished folder: what its seal lists is there, at its lengths.

    Raises IncompleteStore for a folder without a seal, DamagedStore for one that differs from its seal.
    """

    def __init__(self, place: Place):
        self.place = place
        self.seal = read_folder_seal(place)
        self.there = place.names()
        if faults := _faults_of_names(self.seal, self.there):
            raise DamagedStore(f"{place}/{faults[0]}{_more(len(faults))}; {REMEDY}")

    def read(self, name: str) -> bytes:
        """A whole object of the seal. Raises DamagedStore when its bytes are not those that were sealed, or for another."""
        sealed = self.seal.objects.get(name)
        if sealed is None:
            raise DamagedStore(f"{self.place}/{name}: is no object of {SEAL}; {REMEDY}")
        data = self.place.read(name)
        if object_entry(data) != asdict(sealed):
            raise DamagedStore(f"{self.place}/{name}: is not the object that was sealed; {REMEDY}")
        return data

    def record(self) -> Any:
        """The value of the main record, as parsed from JSON."""
        return parse_json(self.read(self.seal.record), f"{self.place}/{self.seal.record}")


def read_folder_seal(place: Place) -> FolderSeal:
    """Raises IncompleteStore when there is none, DamagedStore when it was changed."""
    try:
        data = place.read(SEAL)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise IncompleteStore(f"{place}: is not finished (no {SEAL}); run the command that writes it again.") from error
    where = f"{place}/{SEAL}"
    try:
        return checked(parse_record(data, where), FolderSeal, where)
    except DamagedStore as error:
        raise DamagedStore(f"{str(error).split('; ')[0]}; {REMEDY}") from error


def open_sealed(url: str | Path | Place, kind: str, command: str) -> SealedFolder:
    """A finished folder of a kind. Raises NotAStore, naming what lies there, when that is something else than what
    `command` writes, and what SealedFolder raises."""
    place = open_place(url)
    if found(place).kind != kind:
        raise not_a(place, f"{kind_words(kind)} (no {kind}.json)", f"pass what `{command}` wrote.")
    return SealedFolder(place)


def is_sealed(url: str | Path | Place) -> bool:
    """Whether a place is finished: it holds a seal, a good one or not."""
    return open_place(url).exists(SEAL)


def seal_folder(
    place: Place, kind: str, record: str, names: Collection[str] | None = None, whole: Collection[str] = ()
) -> None:
    """Write the seal of a folder that is complete: of all that lies there, or of `names`. The caller holds the lock."""
    if names is None:
        names = [name for name in place.names() if name != SEAL and not is_of_lock(name)]
    with ThreadPoolExecutor(place.readers) as pool:
        entries = list(pool.map(partial(_entry_of, place), sorted(names)))
    objects = dict(zip(sorted(names), entries, strict=True))
    _publish(place, FolderSeal("actstore-seal", 1, kind, record, objects, list(whole)))


def unseal(place: Place) -> None:
    """Say that a folder is not finished, before anything of it is changed."""
    place.remove(SEAL)


def add_object(place: Place, name: str, data: bytes) -> None:
    """Put one more object into a sealed folder, or another in its place. At no moment is the seal wrong."""
    seal = read_folder_seal(place)
    stated = object_entry(data)
    entry = SealedObject(stated["bytes"], stated["sha256"])
    if seal.objects.get(name) == entry:
        return
    others = {key: value for key, value in seal.objects.items() if key != name}
    if len(others) < len(seal.objects):
        _publish(place, _with(seal, others))
    place.publish(name, data)
    _publish(place, _with(seal, {**others, name: entry}))


@contextmanager
def results_folder(out: str | Path, own: Collection[str]) -> Iterator[Place]:
    """Hold a place alone while its results are made; the block ends with `seal_folder`.

    `own` are the first parts of the names that the block may write. What an interrupted command left of these is removed
    first, and a block that fails leaves none of them. Raises OutputExists when anything else lies there, LockedStore while
    another process writes there.
    """
    place = open_place(out)
    require_unfinished(place, own)
    with place.lock():
        require_unfinished(place, own)
        _clear(place, own)
        try:
            yield place
        except BaseException:
            _clear(place, own)
            raise


def require_unfinished(url: str | Path | Place, own: Collection[str], again: bool = False) -> None:
    """Raises OutputExists when a place holds anything but what a command that writes `own` left when it was interrupted, or,
    with `again`, when it had finished."""
    place = open_place(url)
    entries = contents(place)
    if SEAL in entries and not again:
        raise OutputExists(f"{place}: exists; choose another --out, or move it away.")
    if entries - {SEAL} - set(own):
        raise OutputExists(f"{place}: exists{_count(entries)}; choose another --out, or move it away.")


def contents(place: Place) -> set[str]:
    """What lies directly at a place, without its lock and what was being published when a writer was killed."""
    return {name for name in place.entries() if not is_of_lock(name) and not is_temporary(name)}


def is_of_lock(name: str) -> bool:
    """Whether an object belongs to the lock of its place, and is none of its contents."""
    return name.split("/")[0] in (LOCK, LEASES)


def folder_faults(place: Place, level: str, progress: Callable[[int], object] = lambda n: None) -> list[Fault]:
    """Every object that differs from the seal; at level `meta` by name and length alone. The seal itself is one, too."""
    try:
        seal = read_folder_seal(place)
    except (DamagedStore, IncompleteStore) as error:
        return [Fault(SEAL, str(error).removeprefix(f"{place}/{SEAL}: ").removeprefix(f"{place}: "))]
    there = place.names()
    faults = _faults_of_names(seal, there)
    at_fault = {fault.name for fault in faults}

    def changed(name: str) -> Fault | None:
        try:
            own = _entry_of(place, name)
        except OSError as error:
            return Fault(name, str(error.strerror or error))
        progress(own.bytes)
        if own.sha256 == seal.objects[name].sha256:
            return None
        return Fault(name, f"sha256 {own.sha256[:12]}, {seal.objects[name].sha256[:12]} was sealed")

    if level != "meta":
        with ThreadPoolExecutor(place.readers) as pool:
            names = [name for name in sorted(seal.objects) if name not in at_fault]
            faults += [fault for fault in pool.map(changed, names) if fault is not None]
    return faults


def _faults_of_names(seal: FolderSeal, there: dict[str, int]) -> list[Fault]:
    faults = []
    for name, entry in sorted(seal.objects.items()):
        if name not in there:
            faults.append(Fault(name, "missing"))
        elif there[name] != entry.bytes:
            faults.append(Fault(name, f"{there[name]:,} bytes, {entry.bytes:,} were sealed"))
    whole = tuple(f"{folder}/" for folder in seal.whole)
    added = sorted(name for name in there if name.startswith(whole) and name not in seal.objects) if whole else []
    if seal.record not in seal.objects:
        faults.append(Fault(SEAL, f"does not list the record {seal.record}"))
    return faults + [Fault(name, "was added after the folder was sealed") for name in added]


def _entry_of(place: Place, name: str) -> SealedObject:
    digest, n_bytes = hashlib.sha256(), place.n_bytes(name)
    if n_bytes is None:
        raise FileNotFoundError(2, "No such object", f"{place}/{name}")
    for piece in read_in_pieces(place, name, n_bytes):
        digest.update(piece)
    return SealedObject(n_bytes, digest.hexdigest())


def _publish(place: Place, seal: FolderSeal) -> None:
    place.publish(SEAL, record_bytes(asdict(seal)))


def _with(seal: FolderSeal, objects: dict[str, SealedObject]) -> FolderSeal:
    return FolderSeal(seal.format, seal.version, seal.kind, seal.record, objects, seal.whole)


def _clear(place: Place, own: Collection[str]) -> None:
    """Remove what a command wrote, its seal first."""
    unseal(place)
    for name in place.names():
        if name.split("/")[0] in own:
            place.remove(name)
    place.clear_leftovers()


def _more(n_faults: int) -> str:
    return f" (and {n_faults - 1:,} more faults)" if n_faults > 1 else ""


def _count(entries: set[str]) -> str:
    return "" if entries == {"."} else f" ({len(entries)} entries)"
