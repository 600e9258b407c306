"""Outputs that are a folder of several files: there whole or not at all, and never in the way of the next attempt."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from actstore.files import publish_bytes, publish_folder
from pipelines.compare import stage as comparing
from pipelines.compare import superposition as plots
from pipelines.compare.stage import CompareConfig, compare
from pipelines.compare.superposition import SuperpositionConfig, superposition


def publish_two(folder: Path, between: object = None) -> None:
    with publish_folder(folder) as own:
        publish_bytes(own / "a", b"1")
        if callable(between):
            between()
        publish_bytes(own / "b", b"2")


def test_an_error_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish_two(tmp_path / "made" / "out", fail)
    assert not list((tmp_path / "made").iterdir())


def test_what_a_kill_leaves_is_no_output_and_goes_with_the_next_attempt(tmp_path: Path) -> None:
    child = os.fork()
    if not child:
        publish_two(tmp_path / "out", lambda: os._exit(9))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.iterdir())
    publish_two(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a", "b"]


def test_a_folder_that_came_to_lie_there_is_not_written_over(tmp_path: Path) -> None:
    def come() -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("x")

    with pytest.raises(OSError, match="out"):
        publish_two(tmp_path / "out", come)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["theirs"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_comparison_stopped_between_its_files_is_not_there(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = CompareConfig(runs=(run, run), out=tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(comparing, "publish_json", stop)
        with pytest.raises(KeyboardInterrupt):
            compare(asked)
    assert not list(tmp_path.iterdir())
    compare(asked)
    assert (tmp_path / "out" / comparing.SUMMARY).exists()


def test_plots_stopped_between_files_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = SuperpositionConfig(tmp_path / "out", steps=10, sparsities=2)
    with monkeypatch.context() as patched:
        patched.setattr(plots, "publish_json", stop)
        with pytest.raises(KeyboardInterrupt):
            superposition(asked)
    assert not list(tmp_path.iterdir())
    superposition(asked)
    assert (tmp_path / "out" / plots.SUMMARY).exists()


def stop(*_: object) -> None:
    raise KeyboardInterrupt
