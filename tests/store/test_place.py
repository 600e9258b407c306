"""What a place promises: an object is there whole or not at all, one of many creates it, one process at a time writes."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from forkkit import PROCESSES
from storekit import StoreSpec, create_in_turn, hold_lease_and_hang, publish_and_die, write_store

from actstore import lease
from actstore.errors import InputError, LockedStore, NoSpace
from actstore.folder import Folder
from actstore.integrity import find_faults
from actstore.lease import held_lease
from actstore.open_place import absolute, open_place
from actstore.writer import StoreWriter

SPEC = StoreSpec(n_documents=5)


@pytest.fixture
def place(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "place")


def no_os_error(number: int) -> Any:
    """A call of the system that this file system does not have."""

    def call(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


# Objects


def test_what_was_published_is_read_back(place: Folder) -> None:
    for name, data in {"a": b"", "b/c": b"one", "b/d/e": bytes(range(256))}.items():
        place.publish(name, data)
        assert place.read(name) == data
        assert place.n_bytes(name) == len(data)
        assert place.exists(name)
    place.publish("b/c", b"another")
    assert place.read("b/c") == b"another"
    place.remove("b/c")
    place.remove("b/c")
    assert not place.exists("b/c")
    assert place.n_bytes("b/c") is place.n_bytes("b/c/below") is place.n_bytes("a/below") is None


@pytest.mark.parametrize(
    "call", [lambda place: place.read("a"), lambda place: place.read_into("a", 0, memoryview(bytearray(1)))]
)
def test_an_object_that_is_not_there_is_not_found(place: Folder, call: Any) -> None:
    with pytest.raises(FileNotFoundError):
        call(place)


def test_names_and_entries_are_those_below_the_place(place: Folder) -> None:
    assert place.names() == {}
    assert place.names("nothing") == {}
    assert place.entries() == set()
    for name in ("a", "b/c", "b/d/e", "bb/f"):
        place.publish(name, name.encode())
    assert place.names() == {"a": 1, "b/c": 3, "b/d/e": 5, "bb/f": 4}
    assert place.names("b") == {"b/c": 3, "b/d/e": 5}
    assert place.entries() == {"a", "b", "bb"}
    assert Folder(place.path / "a").entries() == {"."}, "a file where a folder is meant"


def test_bytes_are_read_into_one_buffer_after_another(place: Folder) -> None:
    place.publish("a", bytes(range(10)))
    first, second = bytearray(3), bytearray(2)
    assert place.read_into("a", 4, memoryview(first), memoryview(second)) == 5
    assert (list(first), list(second)) == ([4, 5, 6], [7, 8])
    assert place.read_into("a", 8, memoryview(first), memoryview(second)) == 2
    assert list(first) == [8, 9, 6]
    assert place.read_into("a", 10, memoryview(first)) == 0


def test_a_process_killed_while_it_publishes_leaves_the_old_object_or_the_new_one(place: Folder) -> None:
    """At each thing it does to the file system; the folder is there already, and the object of the first half."""
    found = []
    for n_operations in range(1, 7):
        for data in (b"old" * 100_000, None):
            name = f"folder/{n_operations} {'replaced' if data else 'new'}"
            if data:
                place.publish(name, data)
            process = PROCESSES.Process(target=publish_and_die, args=(place.path, name, b"new" * 100_000, n_operations))
            process.start()
            process.join()
            now = place.read(name) if place.exists(name) else None
            assert now in (data, b"new" * 100_000)
            found.append((process.exitcode == -signal.SIGKILL, now == data))
    assert {(True, True), (True, False), (False, False)} >= set(found)
    assert (True, True) in found
    assert (False, False) in found


def test_a_killed_publication_is_no_object_and_the_next_writer_clears_it_away(place: Folder) -> None:
    write_store(place.path, SPEC)
    before = place.names()
    for name in (".manifest.json.0123abcd.tmp", "commits/0000/train/.000000.json.0123abcd.tmp", "data.zarr/.x.01234567.tmp"):
        (place.path / name).write_bytes(b"half")
    assert place.names() == before
    assert find_faults(place) == []
    with StoreWriter.open(place, SPEC.manifest, {}):
        assert not list(place.path.rglob("*.tmp"))
    assert place.names() == before


def test_no_leftovers_of_a_disk_that_is_full(place: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    place.publish("folder/a", b"old")
    monkeypatch.setattr(os, "fsync", no_os_error(errno.ENOSPC))
    for call in (place.publish, place.create):
        with pytest.raises(OSError, match="No space left on device") as error:
            call("folder/a", b"new")
        assert error.value.errno == errno.ENOSPC
        assert error.value.filename == str(place.path / "folder/a")
    assert [file.name for file in (place.path / "folder").iterdir()] == ["a"]
    assert place.read("folder/a") == b"old"


# Creating


def test_of_eight_processes_that_create_an_object_one_is_told_so_and_it_is_its_own(place: Folder) -> None:
    n_processes, n_objects = 8, 25
    barrier, (here, there) = PROCESSES.Barrier(n_processes), PROCESSES.Pipe(duplex=False)
    processes = [
        PROCESSES.Process(target=create_in_turn, args=(place.path, number, n_objects, barrier, there))
        for number in range(n_processes)
    ]
    for process in processes:
        process.start()
    told = dict(here.recv() for _ in processes)
    for process in processes:
        process.join()
    for index in range(n_objects):
        winners = [number for number in range(n_processes) if told[number][index]]
        assert len(winners) == 1
        assert place.read(f"objects/{index}") == bytes([winners[0]]) * 1000
    assert len({tuple(answers) for answers in told.values()}) > 2, "one process was always first"


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.EMLINK])
def test_on_a_file_system_without_links_an_object_is_still_created_once(
    place: Folder, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "link", no_os_error(number))
    assert place.create("a", b"first")
    assert not place.create("a", b"second")
    assert place.read("a") == b"first"
    assert [file.name for file in place.path.iterdir()] == ["a"]


def test_what_keeps_an_object_from_being_created_is_said(place: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", no_os_error(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        place.create("a", b"first")
    assert list(place.path.iterdir()) == []


# The lock


def test_one_process_writes_at_a_time(place: Folder) -> None:
    with place.lock():
        with (
            pytest.raises(LockedStore, match="another process is writing there; wait for it, or stop it"),
            place.lock(),
        ):
            pass
        assert place.names("lease") == {}, "where the file system has locks there is no lease"
    with place.lock():
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_has_a_lease_in_their_place(
    place: Folder, monkeypatch: pytest.MonkeyPatch, quick: None, number: int
) -> None:
    monkeypatch.setattr(fcntl, "flock", no_os_error(number))
    with place.lock():
        assert list(place.names("lease")) == ["lease/000001"]
        with pytest.raises(LockedStore, match="another process is writing there"), place.lock():
            pass
    with place.lock():
        assert list(place.names("lease")) == ["lease/000002"]
    write_store(place.path, SPEC)
    assert find_faults(place) == []


def test_any_other_fault_of_locking_is_said(place: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", no_os_error(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"), place.lock():
        pass


# The lease


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases in a test's time."""
    for name, seconds in {"HEARTBEAT_S": 0.05, "DEAD_AFTER_S": 0.6, "POLL_S": 0.03}.items():
        monkeypatch.setattr(lease, name, seconds)


def state(holder: str, beat: int) -> bytes:
    return json.dumps({"holder": holder, "beat": beat}).encode()


def test_a_lease_is_refused_while_its_holder_renews_it(place: Folder, quick: None) -> None:
    with held_lease(place):
        started = time.monotonic()
        for _ in range(3):
            with pytest.raises(LockedStore, match="another process is writing"), held_lease(place):
                pass
        assert time.monotonic() - started < 3 * lease.DEAD_AFTER_S, "one renewal seen is enough"
        assert list(place.names("lease")) == ["lease/000001"]


def test_a_lease_that_was_given_back_is_free_at_once(place: Folder, quick: None) -> None:
    for generation in (1, 2, 3):
        started = time.monotonic()
        with held_lease(place):
            assert list(place.names("lease")) == [f"lease/{generation:06d}"]
        assert time.monotonic() - started < lease.DEAD_AFTER_S
    assert json.loads(place.read("lease/000003"))["beat"] < 0
    assert not [thread for thread in threading.enumerate() if thread.name == "actstore-lease"]


def test_a_lease_is_given_back_when_its_holder_fails(place: Folder, quick: None) -> None:
    with pytest.raises(RuntimeError, match="the holder's own"), held_lease(place):
        raise RuntimeError("the holder's own")
    started = time.monotonic()
    with held_lease(place):
        assert time.monotonic() - started < lease.DEAD_AFTER_S


def test_the_lease_of_a_killed_process_is_taken_over(place: Folder, quick: None) -> None:
    here, there = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=hold_lease_and_hang, args=(place.path, lease.HEARTBEAT_S, there))
    process.start()
    assert here.recv()
    with pytest.raises(LockedStore), held_lease(place):
        pass
    process.kill()
    process.join()
    started = time.monotonic()
    with held_lease(place):
        assert time.monotonic() - started >= lease.DEAD_AFTER_S
        assert list(place.names("lease")) == ["lease/000002"]


@pytest.mark.parametrize("left", [b"", b"null", b'{"beat": "x"}'])
def test_a_lease_that_a_broken_disk_has_changed_is_taken_over(place: Folder, quick: None, left: bytes) -> None:
    place.publish("lease/000001", left)
    place.publish("lease/notes.txt", b"no lease at all")
    with held_lease(place):
        assert "lease/000002" in place.names("lease")


def test_of_two_who_find_a_dead_lease_one_takes_it(place: Folder, quick: None) -> None:
    for generation in (1, 3):
        place.publish(f"lease/{generation:06d}", state("dead", 7))
        outcomes: list[str] = []
        held = threading.Barrier(2)

        def contend(outcomes: list[str] = outcomes, held: threading.Barrier = held) -> None:
            try:
                with held_lease(place):
                    held.wait()
                    outcomes.append("held")
            except LockedStore:
                outcomes.append("refused")
                held.wait()

        threads = [threading.Thread(target=contend) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == ["held", "refused"]
        assert list(place.names("lease")) == [f"lease/{generation + 1:06d}"]


class Late(Folder):
    """A contender that is held up before it creates what it has decided to create."""

    def __init__(self, path: Path, meanwhile: Any):
        super().__init__(path)
        self.meanwhile = meanwhile

    def create(self, name: str, data: bytes) -> bool:
        self.meanwhile()
        return super().create(name, data)


@pytest.mark.parametrize("n_others", [1, 2, 3])
def test_a_contender_that_comes_late_is_refused(place: Folder, quick: None, n_others: int) -> None:
    """It has watched generation 1; meanwhile others have had 2, 3 and 4, and the last of them still holds it."""
    place.publish("lease/000001", state("dead", 7))
    with ExitStack() as holding:

        def meanwhile() -> None:
            for _ in range(n_others - 1):
                with held_lease(place):
                    pass
            holding.enter_context(held_lease(place))

        with pytest.raises(LockedStore), held_lease(Late(place.path, meanwhile)):
            pass
        held = f"lease/{n_others + 1:06d}"
        assert list(place.names("lease")) == [held]
        with pytest.raises(LockedStore), held_lease(place):
            pass


class Vanishing(Folder):
    """Between its being listed and read, a lease is superseded."""

    def read(self, name: str) -> bytes:
        self.remove(name)
        return super().read(name)


def test_a_lease_that_is_superseded_while_it_is_looked_at_is_held_by_another(place: Folder, quick: None) -> None:
    place.publish("lease/000001", state("other", 7))
    with pytest.raises(LockedStore), held_lease(Vanishing(place.path)):
        pass


class Unsteady(Folder):
    """A server that answers every other call only."""

    n_calls = 0

    def publish(self, name: str, data: bytes) -> None:
        self.n_calls += 1
        if self.n_calls % 2:
            raise OSError(errno.EIO, "the server does not answer")
        super().publish(name, data)


def test_a_holder_renews_its_lease_though_some_renewals_fail(place: Folder, quick: None) -> None:
    unsteady = Unsteady(place.path)
    with held_lease(unsteady):
        time.sleep(6 * lease.HEARTBEAT_S)
        with pytest.raises(LockedStore), held_lease(place):
            pass
    assert unsteady.n_calls > 3


def test_a_lease_that_cannot_be_given_back_is_no_failure_of_what_was_done(
    place: Folder, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with held_lease(place):
        monkeypatch.setattr(Folder, "publish", no_os_error(errno.EIO))
    with held_lease(place):
        assert list(place.names("lease")) == ["lease/000002"]


# Opening


def test_a_place_is_a_path_a_url_or_a_place(tmp_path: Path) -> None:
    for name in (tmp_path, str(tmp_path)):
        place = open_place(name)
        assert isinstance(place, Folder)
        assert (place.path, place.url, str(place)) == (tmp_path, str(tmp_path), str(tmp_path))
    assert open_place(place) is place
    with pytest.raises(InputError, match="scheme 'ftp' is not known; use a path or one of s3, gs, az"):
        open_place("ftp://somewhere/store")


def test_a_place_is_named_so_that_another_working_folder_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute("store") == str(tmp_path / "store")
    assert absolute(tmp_path / "store") == str(tmp_path / "store")
    assert absolute("s3://bucket/store") == "s3://bucket/store"


def test_what_a_disk_cannot_hold_is_refused_before_anything_is_written(place: Folder) -> None:
    place.require_space(1, "a byte")
    with pytest.raises(NoSpace, match=r"place: a store needs 10,000,000,000,000 MB and 67 MB in reserve, the disk has"):
        place.require_space(10**19, "a store")
    assert not place.path.exists()


@pytest.fixture(autouse=True)
def _no_thread_left() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "actstore-lease"]
