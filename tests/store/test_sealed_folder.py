"""A folder of results is finished by its seal: what is missing, changed or added is seen, and a kill leaves no wrong one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from actstore.checked_json import parse_json
from actstore.errors import DamagedStore, IncompleteStore, LockedStore, NotAStore, OutputExists
from actstore.files import publish_bytes, record_bytes
from actstore.folder import Folder
from actstore.kind import SEAL, found
from actstore.lease import held_file
from actstore.sealed_folder import (
    SealedFolder,
    add_object,
    folder_faults,
    is_sealed,
    open_sealed,
    read_folder_seal,
    results_folder,
    seal_folder,
    unseal,
)

FILES = ("toy.json", "table", "data")
RECORD = b'{"format": "actstore-toy", "version": 1}'
OBJECTS = {"toy.json": RECORD, "table": b"1234", "data/a": b"one", "data/deep/b": b"two"}


def write(out: Path, between: Callable[[], object] = lambda: None) -> None:
    with results_folder(out, FILES) as place:
        for name, data in OBJECTS.items():
            place.publish(name, data)
        between()
        seal_folder(place, "toy", "toy.json", whole=("data",))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    write(tmp_path / "out")
    return tmp_path / "out"


def test_a_sealed_folder_opens_and_gives_its_objects(out: Path) -> None:
    folder = open_sealed(out, "toy", "play")
    assert {name: folder.read(name) for name in OBJECTS} == OBJECTS
    assert folder.record() == {"format": "actstore-toy", "version": 1}
    assert folder_faults(Folder(out), "full") == []


def test_the_lock_is_none_of_the_contents(out: Path) -> None:
    assert (out / "lock").exists()
    assert set(read_folder_seal(Folder(out)).objects) == set(OBJECTS)
    (out / "lock").unlink()
    assert SealedFolder(Folder(out)).read("table") == b"1234"
    assert found(out).kind == "toy"


def test_a_folder_that_may_only_be_read_is_opened(out: Path) -> None:
    (out / "lock").unlink()
    before = sorted(out.rglob("*"))
    for path in (*out.rglob("*"), out):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert open_sealed(out, "toy", "play").read("table") == b"1234"
        assert folder_faults(Folder(out), "full") == []
    finally:
        for path in (out, *out.rglob("*")):
            path.chmod(0o755)
    assert sorted(out.rglob("*")) == before


@pytest.mark.parametrize("name", OBJECTS)
def test_a_missing_object_is_refused_when_opened(out: Path, name: str) -> None:
    (out / name).unlink()
    with pytest.raises(DamagedStore, match=f"{name}: missing; restore it from a copy"):
        SealedFolder(Folder(out))
    assert [str(fault) for fault in folder_faults(Folder(out), "meta")] == [f"{name}: missing"]


@pytest.mark.parametrize("name", OBJECTS)
def test_an_object_of_another_length_is_refused_when_opened(out: Path, name: str) -> None:
    (out / name).write_bytes(OBJECTS[name] + b"x")
    with pytest.raises(DamagedStore, match=rf"{name}: {len(OBJECTS[name]) + 1} bytes, {len(OBJECTS[name])} were sealed"):
        SealedFolder(Folder(out))


@pytest.mark.parametrize("name", OBJECTS)
def test_an_object_that_was_changed_is_refused_when_read_and_named_by_verify(out: Path, name: str) -> None:
    (out / name).write_bytes(bytes([OBJECTS[name][0] ^ 1]) + OBJECTS[name][1:])
    with pytest.raises(DamagedStore, match="is not the object that was sealed"):
        SealedFolder(Folder(out)).read(name)
    assert folder_faults(Folder(out), "meta") == []
    assert [fault.name for fault in folder_faults(Folder(out), "crc")] == [name]


def test_two_objects_exchanged_are_named_by_verify(out: Path) -> None:
    (out / "data/a").write_bytes(b"two")
    (out / "data/deep/b").write_bytes(b"one")
    SealedFolder(Folder(out))
    assert [fault.name for fault in folder_faults(Folder(out), "full")] == ["data/a", "data/deep/b"]


def test_what_is_added_is_a_fault_in_a_whole_folder_alone(out: Path) -> None:
    (out / "beside").write_text("x")
    (out / "later").mkdir()
    (out / "later/x").write_text("x")
    SealedFolder(Folder(out))
    (out / "data/c").write_text("x")
    with pytest.raises(DamagedStore, match="data/c: was added after the folder was sealed"):
        SealedFolder(Folder(out))


def test_every_change_of_the_seal_is_refused(out: Path) -> None:
    data = (out / SEAL).read_bytes()
    for bit in range(0, 8 * len(data), 37):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        (out / SEAL).write_bytes(changed)
        with pytest.raises(DamagedStore, match=SEAL):
            SealedFolder(Folder(out))
        assert [fault.name for fault in folder_faults(Folder(out), "meta")] == [SEAL]


def hostile(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda seal: {**seal, **changes}


GOOD: dict[str, Any] = {"bytes": 4, "sha256": "0" * 64}


@pytest.mark.parametrize(
    "change",
    [
        *(hostile(objects={name: GOOD}) for name in ("../x", "/etc/passwd", "a/../../b", "a//b", ".", "a\\b", "a\nb", "")),
        hostile(objects={"toy.json": {"bytes": -1, "sha256": "0" * 64}}),
        hostile(objects={"toy.json": {"bytes": 1 << 60, "sha256": "0" * 64}}),
        hostile(objects={"toy.json": {"bytes": "4", "sha256": "0" * 64}}),
        hostile(objects={"toy.json": {"bytes": 4, "sha256": "0"}}),
        hostile(objects={"toy.json": {**GOOD, "mode": 7}}),
        hostile(objects=[]),
        hostile(objects={}),
        hostile(record="nowhere.json"),
        hostile(record="../toy.json"),
        hostile(version=2),
        hostile(format="other"),
        hostile(more=1),
        hostile(whole=7),
        lambda seal: {name: value for name, value in seal.items() if name != "whole"},
    ],
)
def test_a_seal_that_a_stranger_made_is_one_line(out: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    seal = asdict(read_folder_seal(Folder(out)))
    (out / SEAL).write_bytes(record_bytes(change(seal)))
    with pytest.raises(DamagedStore, match=SEAL) as caught:
        SealedFolder(Folder(out))
    assert "\n" not in str(caught.value)
    assert folder_faults(Folder(out), "full")


def test_a_seal_of_nested_lists_is_one_line(out: Path) -> None:
    (out / SEAL).write_bytes(b"[" * 200_000)
    with pytest.raises(DamagedStore, match="not readable as JSON"):
        SealedFolder(Folder(out))


def test_a_folder_of_another_kind_is_named(out: Path, tmp_path: Path) -> None:
    with pytest.raises(NotAStore, match=r"out: holds a toy, not a game \(no game.json\); pass what `play` wrote"):
        open_sealed(out, "game", "play")
    for path, words in ((tmp_path / "nowhere", "nowhere: not a game"), (out / "table", "table: is a file, not a game")):
        with pytest.raises(NotAStore, match=words):
            open_sealed(path, "game", "play")


# Written once, or not finished


def test_an_error_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "made" / "deep" / "out", fail)
    assert list(tmp_path.iterdir()) == []


def test_what_a_kill_leaves_is_not_finished_and_goes_with_the_next_attempt(tmp_path: Path) -> None:
    def stale() -> None:
        publish_bytes(tmp_path / "out" / "data" / "stale", b"x")
        os._exit(9)

    child = os.fork()
    if not child:
        write(tmp_path / "out", stale)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    with pytest.raises(IncompleteStore, match=r"is not finished \(no seal.json\)"):
        SealedFolder(Folder(tmp_path / "out"))
    write(tmp_path / "out")
    assert open_sealed(tmp_path / "out", "toy", "play").seal.objects.keys() == OBJECTS.keys()
    assert not (tmp_path / "out/data/stale").exists()


def test_what_is_finished_or_of_someone_else_is_not_touched(out: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(OutputExists, match="out: exists"):
        write(out)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/notes").write_text("x")
    with pytest.raises(OutputExists, match="theirs: exists"):
        write(tmp_path / "theirs")
    with pytest.raises(OutputExists, match="notes: exists; choose"):
        write(tmp_path / "theirs/notes")
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["notes"]


def test_the_second_process_at_one_output_is_told(tmp_path: Path) -> None:
    def second() -> None:
        with pytest.raises(LockedStore, match="out: another process is writing"):
            write(tmp_path / "out")

    write(tmp_path / "out", second)
    assert folder_faults(Folder(tmp_path / "out"), "full") == []


def test_one_process_writes_a_file_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    with held_file(path), pytest.raises(LockedStore, match=r"page.html: another process"), held_file(path):
        pass
    with held_file(path):
        path.write_text("x")
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


def test_an_object_is_added_without_the_seal_being_wrong_at_any_moment(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Folder(out)
    publish, seen = Folder.publish, []

    def watched(self: Folder, name: str, data: bytes) -> None:
        publish(self, name, data)
        seen.append(name)
        assert folder_faults(Folder(out), "full") == []

    monkeypatch.setattr(Folder, "publish", watched)
    add_object(place, "findings", b"first")
    add_object(place, "findings", b"second")
    assert seen == ["findings", SEAL, SEAL, "findings", SEAL]
    add_object(place, "findings", b"second")
    assert len(seen) == 5
    assert SealedFolder(place).read("findings") == b"second"


def test_a_folder_unsealed_is_not_finished(out: Path) -> None:
    unseal(Folder(out))
    assert not is_sealed(out)
    with pytest.raises(IncompleteStore):
        SealedFolder(Folder(out))


# What lies somewhere


def test_the_kind_of_a_folder_is_read_from_its_records(out: Path, tmp_path: Path) -> None:
    shutil.rmtree(out)
    out.mkdir()
    assert (found(out).kind, found(out).words) == ("", "is an empty folder")
    assert found(tmp_path / "nowhere").words == "nothing is there"
    (out / "run.json").write_text(json.dumps({"format": "actstore-run"}))
    assert found(out).words == "holds a run"
    (out / "run.json").write_text("[" * 100_000)
    assert found(out).kind == ""
    (out / "manifest.json").write_text(json.dumps({"name": "a web page"}))
    assert found(out).kind == "", "a manifest of something else"
    (out / "training.safetensors").touch()
    assert "not finished" in found(out).words
    (out / "manifest.json").write_text("{")
    assert found(out).kind == "activations", "a damaged store is a store"


def test_a_record_of_the_seal_is_plain_json(out: Path) -> None:
    seal = parse_json((out / SEAL).read_bytes(), "seal")
    assert (seal["format"], seal["kind"], seal["record"]) == ("actstore-seal", "toy", "toy.json")
