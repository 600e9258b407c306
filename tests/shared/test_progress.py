"""What a stage tells of itself while it runs."""

from __future__ import annotations

import pytest

from pipelines.shared.progress import track


def test_a_log_gets_a_line_at_the_end_with_both_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    with track("train", 200) as progress:
        progress.advance(200, "FVE 0.91")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("train: 200 of 200 rows")
    assert shown.err.endswith("FVE 0.91\n")


def test_one_of_several_processes_that_is_not_to_tell_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with track("train", 200, shown=False) as progress:
        progress.advance(200)
    assert capsys.readouterr() == ("", "")


def test_a_log_says_how_long_it_will_take_and_counts_only_what_this_process_did(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr("pipelines.shared.progress.time.monotonic", lambda: now[0])
    with track("survey", 100, "shards") as progress:
        progress.resume(50)
        now[0] += 20
        progress.advance(10)
        now[0] += 5
        progress.advance(1)
    assert capsys.readouterr().err == "survey: 60 of 100 shards  80 s left, 0.5 shards/s  \n"
