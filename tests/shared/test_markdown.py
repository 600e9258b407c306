"""Text in a page of Markdown is shown as it is, by any of its readers: no markup, no link, no HTML, no other cell."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from pipelines.shared import markdown
from pipelines.shared.visible_text import visible

HOSTILE = (
    "`", "``", "|", "\\", "*", "**", "_", "[x](http://a.example)", "![x](y)", "<img src=x onerror=alert(1)>", "<!--",
    "&lt;", "&#60;", "http://a.example", "WWW.a.example", "<http://a.example>", "\n\n# head", "\n- x", "\n```\n", "$x$",
    "~~x~~",
    "{#a}", " ", "a", "\u202e", "\x1b[2J", "me@a.example", "]: x", ":", "\t",
)  # fmt: skip
TEXTS = st.lists(st.sampled_from(HOSTILE), max_size=8).map("".join)
READER = MarkdownIt("gfm-like", {"linkify": False, "html": True})
PLAIN = {"p", "code", "ul", "li", "table", "thead", "tbody", "tr", "th", "td"}


class Read(HTMLParser):
    """The elements of a page, its text, and the text of each element `code` and `td`."""

    def __init__(self, page: str):
        super().__init__()
        self.elements: list[str] = []
        self.text = ""
        self.inside: dict[str, list[str]] = {"code": [], "td": []}
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        assert not attrs, (tag, attrs)
        self.elements.append(tag)
        self.open.append(tag)
        if tag in self.inside:
            self.inside[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        self.open.remove(tag)

    def handle_data(self, data: str) -> None:
        self.text += data
        for tag in self.inside:
            if tag in self.open:
                self.inside[tag][-1] += data

    def handle_comment(self, data: str) -> None:
        raise AssertionError(data)


@given(TEXTS, TEXTS)
def test_a_code_span_holds_the_text_and_ends_where_it_ends(first: str, second: str) -> None:
    read = Read(READER.render(f"- {markdown.code(first)}: {markdown.code(second)}"))
    assert set(read.elements) <= PLAIN
    assert read.inside["code"] == [visible(first) or " ", visible(second) or " "]


@given(TEXTS, TEXTS)
def test_text_inside_a_line_is_neither_markup_nor_html(first: str, second: str) -> None:
    read = Read(READER.render(f"**12**: {markdown.inline(first)}; {markdown.inline(second)}."))
    assert set(read.elements) <= PLAIN | {"strong"}
    spaces = re.compile(r"[ `]")  # what a code span is written with, and where a line's spaces are joined
    assert spaces.sub("", read.text.strip()) == spaces.sub("", f"12: {visible(first)}; {visible(second)}.")


@given(TEXTS)
def test_a_name_of_tokens_keeps_its_code_spans(token: str) -> None:
    read = Read(READER.render(markdown.inline(f"on {markdown.code(token)} 12%, the token after {markdown.code(token)}")))
    assert read.inside["code"] == [visible(token) or " "] * 2


@given(TEXTS)
def test_text_in_a_cell_of_a_table_is_one_cell(text: str) -> None:
    read = Read(READER.render(f"| a | b |\n|---|---|\n| 1 | {markdown.cell(text)} |\n"))
    assert read.elements.count("td") == 2
    assert set(read.elements) <= PLAIN
    spaces = re.compile(r"[ `]")
    assert spaces.sub("", read.inside["td"][1]) == spaces.sub("", visible(text))


@given(TEXTS)
def test_the_reader_of_the_site_sees_the_same(text: str) -> None:
    python_markdown = pytest.importorskip("markdown")
    page = python_markdown.markdown(
        f"- {markdown.code(text)}: {markdown.inline(text)} end", extensions=["tables", "attr_list"]
    )
    assert set(re.findall(r"<(\w+)", page)) <= PLAIN, page
    assert visible(text).strip() in html.unescape(page)
