"""One writer at a time: a lock of the file system, or a lease where the file system has no locks.

A lease is an object `lease/<generation>` that its holder writes again every few seconds. Only creating the next
generation takes it over, and of several who try, one succeeds. No clock is compared with another: who finds a lease
watches it, refuses as soon as it is renewed, and takes the next generation when it has not been for long.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from actstore.errors import LockedStore

if TYPE_CHECKING:
    from actstore.place import Place

LEASES = "lease"
HEARTBEAT_S = 3.0
DEAD_AFTER_S = 60.0
POLL_S = 0.5
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


@contextmanager
def held_lock(path: Path) -> Iterator[bool]:
    """Hold the file lock at `path`, in a folder that is made if need be; gives False when the file system has none.

    The kernel gives the lock back when its process ends, however it ends. Raises LockedStore while another process holds it.
    """
    while True:
        descriptor = _opened_lock(path)
        try:
            works = _flocked(descriptor, path)
            if not works or _is_at(descriptor, path):
                yield works
                return
        finally:
            os.close(descriptor)
        # its last holder has removed the file meanwhile: once more


@contextmanager
def held_file(path: Path) -> Iterator[None]:
    """Write the file `path` alone: holds the lock `.<name>.lock` beside it, which is removed at the end.

    Raises LockedStore while another process holds it. Without locks of the file system nothing is held: the file is
    published whole all the same.
    """
    lock = path.with_name(f".{path.name}.lock")
    try:
        with held_lock(lock):
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
    except LockedStore:
        raise _locked(path) from None


def _opened_lock(path: Path) -> int:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # its folder was removed at this moment
            if not path.parent.exists():
                continue
            raise


def _flocked(descriptor: int, path: Path) -> bool:
    """Take the lock; False when the file system has none. Raises LockedStore."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _locked(path.parent) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def held_lease(place: Place) -> Iterator[None]:
    """Hold and renew the lease of a place until the block ends. Raises LockedStore while another process holds the lease."""
    holder = uuid.uuid4().hex
    name = _taken(place, holder)
    ended = threading.Event()
    thread = threading.Thread(target=_renew, args=(place, name, holder, ended), name="actstore-lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with suppress(Exception):  # it will be found dead
            _beat(place, name, holder, -1)


def _taken(place: Place, holder: str) -> str:
    """Create the next generation of the lease, once the last one was given back or has not been renewed for long."""
    latest = max(_generations(place), default=0)
    if latest:
        _require_given_back_or_dead(place, _name(latest))
    name = _name(latest + 1)
    if not place.create(name, _state(holder, beat=0)):
        raise _locked(place)
    others = _generations(place) - {latest + 1}
    if any(other > latest + 1 for other in others):  # what we watched was long superseded
        place.remove(name)
        raise _locked(place)
    for other in others:
        place.remove(_name(other))
    return name


def _require_given_back_or_dead(place: Place, name: str) -> None:
    try:
        seen = place.read(name)
        deadline = time.monotonic() + DEAD_AFTER_S
        while not _is_given_back(seen) and time.monotonic() < deadline:
            time.sleep(POLL_S)
            now = place.read(name)
            if now != seen and not _is_given_back(now):
                raise _locked(place)
            seen = now
    except FileNotFoundError:  # the next generation has been created
        raise _locked(place) from None


def _renew(place: Place, name: str, holder: str, ended: threading.Event) -> None:
    beat = 0
    while not ended.wait(HEARTBEAT_S):
        beat += 1
        with suppress(Exception):  # a server that does not answer now may answer the next time
            _beat(place, name, holder, beat)


def _beat(place: Place, name: str, holder: str, beat: int) -> None:
    """Say that the holder lives, or with -1 that it has given the lease back; nothing once another has taken it over."""
    if not any(generation > _generation(name) for generation in _generations(place)):
        place.publish(name, _state(holder, beat))


def _generations(place: Place) -> set[int]:
    return {_generation(name) for name in place.names(LEASES) if name[len(LEASES) + 1 :].isdecimal()}


def _generation(name: str) -> int:
    return int(name.removeprefix(f"{LEASES}/"))


def _name(generation: int) -> str:
    return f"{LEASES}/{generation:06d}"


def _state(holder: str, beat: int) -> bytes:
    return json.dumps({"holder": holder, "beat": beat}).encode()


def _is_given_back(state: bytes) -> bool:
    """False also for a state that cannot be read: its holder is watched like any other."""
    try:
        return int(json.loads(state)["beat"]) < 0
    except (ValueError, KeyError, TypeError):
        return False


def _locked(place: Place | Path) -> LockedStore:
    return LockedStore(f"{place}: another process is writing there; wait for it, or stop it.")
