"""No text can act on a terminal or hide in it, and nowhere is a line printed that was not made visible."""

from __future__ import annotations

import ast
import json
import re
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from modelkit import ROOT

from pipelines.commands.output import as_json_text
from pipelines.shared.visible_text import Visible, say, visible

ANY_TEXT = st.text(st.one_of(st.characters(), st.characters(categories=["Cc", "Cf", "Cs", "Co", "Zl", "Zp", "Zs"])))
ACTING = {
    "control characters": [*range(0x20), 0x7F],
    "C1 controls": range(0x80, 0xA0),
    "marks of direction": [*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C],
    "zero-width": [0x200B, 0x200C, 0x200D, 0x2060, 0xFEFF, 0x00AD, 0x034F, 0x3164, 0xFE0F, 0xE0100, 0xE0041],
    "separators and spaces": [0x2028, 0x2029, 0x00A0, 0x3000, 0x202F],
    "surrogates": [0xD800, 0xDBFF, 0xDC00, 0xDFFF],
    "private and unassigned": [0xE000, 0xF8FF, 0x10FFFF, 0x0378, 0xFFFE],
}
PRINTERS = {
    "cli.py": {"visible"},
    "pipelines/commands/output.py": {"visible", "as_json_text"},
    "pipelines/shared/visible_text.py": {"visible"},
}
"""The files that print, and the functions through which all that they print goes."""
OF_THE_MAKER = "pipelines/models/builtin/"
"""Programs that make the shipped model from the standard library, and print their own figures."""


@pytest.mark.parametrize("kind", ACTING)
def test_what_a_terminal_obeys_or_does_not_draw_is_named(kind: str) -> None:
    for code in ACTING[kind]:
        shown = visible(f"a{chr(code)}b")
        assert shown[0] == "a"
        assert shown[-1] == "b"
        assert shown[1:-1] == (f"<U+{code:04X}>" if code > 0x7F else shown[1])
        assert len(shown) >= 3
        assert chr(code) not in shown


@given(ANY_TEXT)
def test_any_text_becomes_one_line_that_nothing_changes_further(text: str) -> None:
    shown = visible(text)
    assert shown.isprintable()
    assert not {unicodedata.category(character) for character in shown} & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    assert visible(shown) == shown
    shown.encode("utf-8")


@pytest.mark.parametrize("text", ["", "def f(x):", "Größe 大小 размер שלום 😀", "a\\nb <U+202E>"])
def test_text_that_is_visible_already_stays_as_it_is(text: str) -> None:
    assert visible(text) == text


def test_colours_of_the_program_stay_and_lose_their_licence_inside_other_text() -> None:
    coloured = Visible("\x1b[31mred\x1b[0m")
    assert visible(coloured) == coloured
    assert visible(f"{coloured}!") == "␛[31mred␛[0m!"


@given(st.recursive(ANY_TEXT, lambda inner: st.lists(inner) | st.dictionaries(ANY_TEXT, inner), max_leaves=5))
def test_json_keeps_the_text_and_shows_none_of_it_raw(value: object) -> None:
    text = as_json_text(value)
    assert json.loads(text) == value
    assert all(line.isprintable() for line in text.split("\n"))
    text.encode("utf-8")


def test_a_line_said_is_visible(capsys: pytest.CaptureFixture[str]) -> None:
    say("a\x1b[2J\nb")
    say("c\x07", err=True)
    assert capsys.readouterr() == ("a␛[2J⏎b\n", "c␇\n")


def printed(path: Path) -> list[tuple[int, str]]:
    """(line, first argument) of each call that prints: print, click.echo, and writing to a standard stream."""
    calls = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if re.fullmatch(r"print|(click\.)?(echo|secho|echo_via_pager|prompt|confirm)|sys\.std(out|err)\.write", name):
                calls.append((node.lineno, ast.unparse(node.args[0]) if node.args else ""))
    return calls


def test_whatever_prints_makes_visible_what_it_prints() -> None:
    for path in [ROOT / "cli.py", *sorted((ROOT / "pipelines").rglob("*.py")), *sorted((ROOT / "actstore").rglob("*.py"))]:
        name = path.relative_to(ROOT).as_posix()
        if name.startswith(OF_THE_MAKER):
            continue
        through = PRINTERS.get(name, set())
        for line, argument in printed(path):
            is_constant = bool(argument) and isinstance(ast.parse(argument, mode="eval").body, ast.Constant)
            assert is_constant or argument.partition("(")[0] in through, f"{name}:{line} prints {argument}; use `say`"


def test_progress_shows_no_raw_label(capsys: pytest.CaptureFixture[str]) -> None:
    from pipelines.shared.progress import track

    with track("a\x1b[2J", 1, "rows") as progress:
        progress.advance(1, "b\x07")
    assert "a␛[2J: 1 of 1 rows" in (said := capsys.readouterr().err)
    assert said.rstrip("\n").isprintable()


@pytest.mark.skipif(sys.platform == "win32", reason="names of files are text there")
def test_a_name_that_is_no_text_can_be_shown() -> None:
    assert visible(b"caf\xe9.txt".decode("utf-8", "surrogateescape")) == "caf<U+DCE9>.txt"
