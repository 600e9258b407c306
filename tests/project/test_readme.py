"""The README is one page, its first screen says what matters, and it reads the same wherever it is shown.

A package index shows the README alone, without the repository beside it: a relative link leads nowhere there. As long as the
repository has no public address, absolute links are impossible. So the README names pages as `docs/PAGE.md`, in code and not
as links, and the source distribution carries those files. The picture is the one exception: forges show it, and where it is
missing its alternative text says what it shows and where it lies.
"""

from __future__ import annotations

import re
import struct
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PICTURE = re.compile(r"!\[([^\]]+)\]\(([^)\s]+)\)")
MOST_LINES, FIRST_SCREEN_LINES = 200, 30
MOST_PICTURE_BYTES, LEAST_PICTURE_WIDTH = 300 * 1024, 1000


def test_the_readme_is_one_page() -> None:
    assert len(README.splitlines()) <= MOST_LINES


def test_the_first_screen_installs_shows_and_says_the_limits() -> None:
    screen = "\n".join(README.splitlines()[:FIRST_SCREEN_LINES])
    assert "pip install" in screen
    assert "cli.py demo" in screen
    assert PICTURE.search(screen)
    assert "**Limits.**" in screen


def test_no_link_of_the_readme_is_relative() -> None:
    links = re.findall(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)", PICTURE.sub("", README))
    links += re.findall(r"^\[[^\]]+\]:\s*(\S+)", README, re.MULTILINE) + re.findall(r"(?:href|src)=\"([^\"]+)\"", README)
    assert [link for link in links if not link.startswith("https://")] == []


def test_every_file_that_the_readme_names_is_there() -> None:
    named = set(re.findall(r"`((?:docs/)?[\w/-]+\.md)`", README))
    assert {"docs/TRAINING.md", "CONTRIBUTING.md"} <= named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_page_of_a_subject_is_named_in_the_readme() -> None:
    pages = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} - {"docs/index.md"}
    assert pages - set(re.findall(r"`(docs/[\w/-]+\.md)`", README)) == set()


def test_the_picture_is_there_and_says_in_words_what_it_shows() -> None:
    ((words, name),) = PICTURE.findall(README)
    picture = (ROOT / name).read_bytes()
    width, _ = struct.unpack(">II", picture[16:24])
    assert picture.startswith(b"\x89PNG")
    assert width >= LEAST_PICTURE_WIDTH
    assert len(picture) <= MOST_PICTURE_BYTES
    assert name in words
    assert "feature" in words


@pytest.mark.slow
def test_the_source_distribution_carries_what_the_readme_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_meta = pytest.importorskip("setuptools.build_meta")
    monkeypatch.chdir(ROOT)
    with tarfile.open(tmp_path / build_meta.build_sdist(str(tmp_path))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    named = set(re.findall(r"`((?:docs/)?[\w/-]+\.md)`", README)) | {name for _, name in PICTURE.findall(README)}
    assert named - held == set()
