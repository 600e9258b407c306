"""Tutorials cannot rot: their code is run, at smaller sizes, and what it prints has the lines that they show."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tutorialkit import ROOT, blocks_of, run_blocks, with_outputs

TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SMALLER = {
    "N_TEXTS, N_EPOCHS, N_FEATURES, LAYER = 200, 15, 1024, 3": "N_TEXTS, N_EPOCHS, N_FEATURES, LAYER = 12, 2, 64, 3",
    "documents(skip=N_TEXTS), 100)": "documents(skip=N_TEXTS), 8)",
    "topk(20, dim=0)": "topk(4, dim=0)",
    "--tokens 20000 ": "--tokens 1500 ",
}
"""What the lesson is run with here."""


def forms(output: str) -> list[str]:
    """The different first words of an output's lines, numbers left out."""
    return list(dict.fromkeys(re.sub(r"[\d.,\-+]+", "#", line.split()[0]) for line in output.splitlines() if line.strip()))


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_lesson_runs_and_prints_what_it_shows(whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default without its last block: `analyze` starts a cluster, and other tests run it."""
    text = (ROOT / "docs" / "tutorials" / "lesson.md").read_text(encoding="utf-8")
    for theirs, ours in SMALLER.items():
        assert theirs in text
        text = text.replace(theirs, ours)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    blocks = blocks_of(text)
    assert len(blocks) > 12
    assert "actstore analyze" in blocks[-1].code
    blocks = blocks if whole else blocks[:-1]
    for block, output in zip(blocks, run_blocks(blocks, tmp_path), strict=True):
        if block.shown is not None:
            assert forms(output) == forms(block.shown), block.code


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_every_output_shown_is_one_that_was_printed(path: Path) -> None:
    """No block is left empty, and filling in the outputs that are shown gives the same text."""
    text = path.read_text(encoding="utf-8")
    blocks = blocks_of(text)
    assert all(block.shown is None or block.shown.strip() for block in blocks)
    assert with_outputs(text, [block.shown or "" for block in blocks]) == text


def anchors(text: str) -> set[str]:
    """What a page's headings are called in links to them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_every_link_of_a_page_leads_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(((?!https?:)[^)\s]+)\)", text):
        page, _, anchor = link.partition("#")
        there = path.parent / page if page else path
        assert there.exists(), link
        assert not anchor or anchor in anchors(there.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_every_module_that_a_page_names_is_there(path: Path) -> None:
    for name in re.findall(
        r"\b((?:actstore|pipelines|benchmarks|tests)/[\w/]+(?:\.py|/))", path.read_text(encoding="utf-8")
    ):
        assert (ROOT / name).exists(), name


@pytest.mark.slow
def test_the_first_hour_runs(tmp_path: Path) -> None:
    """Which features there are depends on the Python whose sources are read; that every command works does not."""
    blocks = blocks_of((ROOT / "docs" / "tutorials" / "first-hour.md").read_text(encoding="utf-8"))
    outputs = run_blocks(blocks, tmp_path)
    assert all(bool(output) == (block.shown is not None) for block, output in zip(blocks, outputs, strict=True))
