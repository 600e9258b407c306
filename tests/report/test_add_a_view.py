"""A view of the page is one file: a module laid in the folder of views is on the page, and harms nothing there."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from folderkit import file_added

import pipelines.report.views
from pipelines.report.stage import ReportConfig, report
from pipelines.report.view import PLACES, View, joined_data, nothing, views
from tests.report.test_report import CHROMIUM, CHROMIUM_FLAGS, HOSTILE, Page, write_analysis

TOY = '''
"""The peaks, as a list."""

from pipelines.report.view import View

TEMPLATE = """
{% block style %}
  .toy { margin: 0; }
{% endblock %}
{% block body %}
<section class="toy"><h2>{{ title }}</h2><p id="toy"></p></section>
{% endblock %}
{% block script %}
  byId("toy").append(make("b", {}, data.toy.words[0]));
{% endblock %}
"""

VIEW = View(
    order=15,
    template=TEMPLATE,
    shown=lambda analysis, n_examples: {"title": "Peaks of " + analysis.record.model},
    data=lambda analysis, n_examples: {"toy": {"words": [analysis.record.model], "peaks": analysis.peak.tolist()}},
)
'''


@pytest.fixture
def pages(tmp_path: Path) -> tuple[Path, Path]:
    """The page as it is, and the page while the toy lies in the folder."""
    analysis = write_analysis(tmp_path / "an")
    plain, more = tmp_path / "plain.html", tmp_path / "more.html"
    report(ReportConfig(analysis.path, plain))
    with file_added(pipelines.report.views, views, tmp_path, "toy", TOY):
        report(ReportConfig(analysis.path, more))
    return plain, more


def test_a_view_in_one_file_appears_with_its_data(pages: tuple[Path, Path]) -> None:
    plain, more = map(Page, pages)
    assert more.data["toy"] == {"words": [HOSTILE], "peaks": plain.data["peak"]}
    headings = more.inside("h2")
    assert headings.index(f"Peaks of {HOSTILE}") < headings.index("How often features fire"), "views stand by their order"
    assert any(".toy {" in text for text in more.inside("style"))


def test_the_other_views_stay_as_they_are(pages: tuple[Path, Path]) -> None:
    plain, more = (path.read_text(encoding="utf-8") for path in pages)
    data = Page(pages[1]).data
    data.pop("toy")
    assert data == Page(pages[0]).data
    lines = more.splitlines()
    rest = iter(lines)
    own_data = '<script type="application/json"'
    assert all(line in rest for line in plain.splitlines() if not line.startswith(own_data)), "in the same order"
    assert len(lines) == len(plain.splitlines()) + 3


def test_hostile_text_in_a_view_stays_text(pages: tuple[Path, Path]) -> None:
    page = Page(pages[1])
    assert len(page.inside("script")) == 2
    assert "img" not in {tag for tag, _ in page.elements}
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert not any(character in page.inside("script")[0] for character in "<>&")


def test_a_toy_that_was_taken_away_leaves_nothing(pages: tuple[Path, Path], tmp_path: Path) -> None:
    report(ReportConfig(tmp_path / "an", tmp_path / "again.html"))
    assert (tmp_path / "again.html").read_bytes() == pages[0].read_bytes()


def test_two_views_cannot_take_the_same_name(tmp_path: Path) -> None:
    view = View(order=1, template="", data=lambda analysis, n_examples: {"n_rows": n_examples})
    with pytest.raises(AssertionError, match="n_rows"):
        joined_data([view, view], write_analysis(tmp_path / "an"), 5)


def test_every_view_fills_a_place_of_the_frame() -> None:
    frame = (Path(pipelines.report.views.__path__[0]).parent / "frame.html").read_text(encoding="utf-8")
    assert [frame.count(f"view.{place} ") for place in PLACES] == [1] * len(PLACES)
    assert [view.order for view in views()] == sorted({view.order for view in views()})
    assert any(view.data is not nothing for view in views())


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
def test_a_browser_runs_the_views_script(pages: tuple[Path, Path], tmp_path: Path) -> None:
    command = [str(CHROMIUM), *CHROMIUM_FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", pages[1].as_uri()]
    (tmp_path / "dom.html").write_bytes(subprocess.run(command, capture_output=True, check=True, timeout=300).stdout)
    page = Page(tmp_path / "dom.html")
    root = next(attributes for tag, attributes in page.elements if tag == "html")
    assert root.get("data-ready") == "1"
    assert root.keys().isdisjoint({"data-error", "data-owned"})
    assert HOSTILE in page.inside("b")
