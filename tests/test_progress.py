"""What a stage tells of itself while it runs."""

from __future__ import annotations

import pytest

from pipelines.progress import track


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
