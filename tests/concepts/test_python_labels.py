"""What every token of Python source is called, on a source small enough to check by eye."""

from __future__ import annotations

import hashlib
import re
import sysconfig
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest

from pipelines.concepts.python_labels import BIT, LABELS, NONE, label_characters, label_tokens

SOURCE = '''\
"""Tools  for größe.

More."""
import os.path, sys
from math import pi

@cache
class Cat(Animal):
    LIMIT = 3
    name: "str" = u"déjà"
    def _purr(self, n=1, *, loud: dict[str, int] = None, **kw) -> tuple[int, str]:
        'Purr n times.'
        if n != self.n:
            return
        self.x = lambda y: "no doc"
        meow(*kw, -n, key=[n * 2, {1: (3)}])  # loud (very)
        for i in range(n): raise Oops from err
        return __file__

def g(): return _a
'''


def words(text: str) -> list[str]:
    return text.split()


EXPECTED: dict[str, list[str]] = {
    "the name after `def`": ["_purr", "g"],
    "the name after `class`": ["Cat"],
    "a name after `import`": ["os", "pi"],
    "the module after `from`": ["math"],
    "an attribute: the name after a dot": ["path", "n", "x"],
    "an attribute of `self`": ["n", "x"],
    "the decorator's name after `@`": ["cache"],
    "a parameter in a `def` header": ["self", "n", "loud", "kw"],
    "the name of a keyword argument": ["key"],
    "the name of what is called, before `(`": ["meow", "range"],
    "the exception after `except` or `raise`": ["Oops"],
    "the loop variable after `for`": ["i"],
    "the name after `return`": ["__file__", "_a"],
    "the target of an assignment": ["LIMIT", "x"],
    "a builtin's name": ["dict", "str", "int", "tuple", "int", "str", "range"],
    "a name in CamelCase": ["Cat", "Animal", "Oops"],
    "a name in ALL_CAPS": ["LIMIT"],
    "a name with a leading underscore": ["_purr", "_a"],
    "a __dunder__ name": ["__file__"],
    "any name": words(
        "os path sys math pi cache Cat Animal LIMIT name _purr self n loud dict str int kw tuple int str n self n "
        "self x y meow kw n key n i range n Oops err __file__ g _a"
    ),
    "a keyword": words("import from import class def None if return lambda for in raise from return def return"),
    "a number": ["3", "1", "2", "1", "3"],
    "inside a string": ["str", "déjà", "no doc"],
    "the quotes that open a string": ['"', 'u"', '"'],
    "the quotes that close a string": ['"', '"', '"'],
    "inside a docstring": ["Tools  for größe.\n\nMore.", "Purr n times."],
    "the quotes that open a docstring": ['"""', "'"],
    "the quotes that close a docstring": ['"""', "'"],
    "the first word of a docstring": ["Tools", "Purr"],
    "inside a comment": ["# loud (very)"],
    "the `#` that begins a comment": ["#"],
    "an opening bracket": ["(", "(", "[", "[", "(", "[", "{", "(", "(", "("],
    "a closing bracket": [")", "]", ")", "]", ")}])", ")", ")"],
    "the `(` of a call": ["(", "("],
    "the `(` of a `def` header": ["(", "("],
    "the colon that ends a block header": [":", ":", ":", ":", ":"],
    "a colon inside brackets": [":", ":"],
    "the comma between arguments or items": [","] * 10,
    "the `=` of an assignment": ["=", "=", "="],
    "the `=` of a keyword argument or default": ["=", "=", "="],
    "a comparison operator": ["!="],
    "an arithmetic operator": ["-", "*"],
    "inside round brackets": words("Animal self, n=1, *, loud: dict[ ] = None, **kw *kw, -n, key=[ 3 ] n"),
    "inside square brackets": ["str,", "int", "int,", "str", "n", "*", "2,", "{", "}"],
    "inside curly brackets": ["1:", "(", ")"],
    "inside brackets within brackets": ["str,", "int", "n", "*", "2,", "{1:", "(3)}"],
    "inside a `def` header": words("_purr(self, n=1, *, loud: dict[str, int] = None, **kw) -> tuple[int, str]: g():"),
    "the indentation of a line": ["    "] * 3 + ["        "] * 2 + ["            "] + ["        "] * 4,
    "the first word of a line": words("More import from class LIMIT name def if return self meow for return def"),
    "the end of a line": ["\n"] * 17,
    "an empty line's end": ["\n"] * 3,
}


def runs(source: str, label: str) -> list[str]:
    """The unbroken stretches of a source at which a label holds."""
    holds = (label_characters(source) & BIT[label]) != 0
    groups = groupby(range(len(source)), key=lambda i: bool(holds[i]))
    return ["".join(source[i] for i in places) for is_labelled, places in groups if is_labelled]


def test_the_table_has_every_label() -> None:
    assert tuple(EXPECTED) == LABELS
    assert len(LABELS) < 63


@pytest.mark.parametrize("label", LABELS)
def test_a_label_holds_exactly_where_it_says(label: str) -> None:
    assert runs(SOURCE, label) == EXPECTED[label]


@pytest.mark.parametrize(
    ("source", "label", "expected"),
    [
        ("return\nx", "the name after `return`", []),
        ("raise\nFoo", "the exception after `except` or `raise`", []),
        ("x = y\n(z)", "the name of what is called, before `(`", []),
        ("x = y\n(z)", "the `(` of a call", []),
        ("f(lambda: 'a')", "inside a docstring", []),
        ("f = lambda: 'a'", "the colon that ends a block header", []),
        ("f(lambda x: x, {1: lambda: 2})", "a colon inside brackets", [":", ":", ":"]),
        ("def f(a=lambda x: x, b=2): pass", "a parameter in a `def` header", ["a", "b"]),
        ("x: 'int'", "inside a docstring", []),
        ("', '.join(x)", "inside a docstring", []),
        ("a @ b", "the decorator's name after `@`", []),
        ("@a.b\ndef f(): pass", "the decorator's name after `@`", ["a"]),
        ("raise A from b", "the module after `from`", []),
        ("async def f(a): 'doc'", "inside a docstring", ["doc"]),
        ("async def f(a): 'doc'", "a parameter in a `def` header", ["a"]),
        ("if a: 'text'\nelse: pass", "the colon that ends a block header", [":", ":"]),
        ("x = {'a': 1}; y = 2", "the first word of a line", ["x"]),
        ("f(*a, **b); a ** b; c * -d", "an arithmetic operator", ["**", "*", "-"]),
        ("a\r\n\r\nb = 1\r\n", "the end of a line", ["\r\n", "\r\n"]),
        ("a\r\n\r\nb = 1\r\n", "an empty line's end", ["\r\n"]),
        ("é = 'ü'; ñ = 2", "the target of an assignment", ["é", "ñ"]),
    ],
)
def test_what_only_looks_like_it_is_not_labelled(source: str, label: str, expected: list[str]) -> None:
    assert runs(source, label) == expected


@pytest.mark.parametrize("cut", range(0, len(SOURCE), 7))
def test_a_source_cut_off_anywhere_is_labelled_as_far_as_it_goes(cut: int) -> None:
    whole, part = label_characters(SOURCE), label_characters(SOURCE[:cut])
    assert len(part) == cut
    complete = SOURCE.rfind("\n", 0, max(cut - 1, 0)) + 1
    in_docstring = cut <= SOURCE.index("import")
    if not in_docstring:
        np.testing.assert_array_equal(part[:complete], whole[:complete])


@pytest.mark.parametrize("source", ["'abc", '"""abc\n', "f(", ")", "\t\n  x\n y\n", "\\", "a = $ ?", "\x00", "\x0c\n", ""])
def test_source_that_is_no_python_does_not_raise(source: str) -> None:
    assert len(label_characters(source)) == len(source)


def test_a_token_has_the_labels_of_its_first_visible_character() -> None:
    pieces = ["def", " größe", "(", "\n   ", " x", "):", "\n", "    ret", "urn"]
    source = "".join(pieces)
    characters = label_characters(source)
    found = label_tokens(source, [piece.encode() for piece in pieces])
    first = [0, 4, 9, 10, 15, 16, 18, 23, 26]
    assert found.tolist() == [int(characters[i]) for i in first]
    assert [bool(labels & BIT["the name after `def`"]) for labels in found] == [i == 1 for i in range(9)]
    assert found[4] & BIT["a parameter in a `def` header"]
    assert found[7] & BIT["a keyword"]


def test_tokens_that_split_a_character_have_its_labels() -> None:
    source = "x = 'é€'"
    raw = source.encode()
    by_byte = label_tokens(source, [raw[i : i + 1] for i in range(len(raw))])
    characters = label_characters(source)
    expected = [int(characters[i]) for i, character in enumerate(source) for _ in character.encode()]
    assert by_byte.tolist() == expected


def test_tokens_after_the_end_of_the_text_have_no_labels() -> None:
    """A document cut in the middle of a character decodes to less than its tokens' bytes."""
    assert label_tokens("ab", [b"ab", b"\xc3"]).tolist()[1] == NONE
    assert label_tokens("", [b"\xc3"]).tolist() == [0]
    assert label_tokens("", []).tolist() == []


def test_the_standard_library_is_labelled_without_a_fault() -> None:
    for name in ("textwrap.py", "dataclasses.py", "locale.py"):
        source = (Path(sysconfig.get_paths()["stdlib"]) / name).read_text(encoding="utf-8")
        labels = label_characters(source)
        starts = [match.start(1) for match in re.finditer(r"^def (\w+)", source, re.MULTILINE)]
        assert starts
        assert all(labels[start] & BIT["the name after `def`"] for start in starts)


FORMATTED = '''\
def show(d, x):
    f"""What d["key"] holds: {d["key"]}"""
    name = f"{d["key"]!r:>{x + 1}}" + t'{print(x)}'
    return rf"\\{x}", 'a' f"b{{c}}", print, PythonFinalizationError  # f"{x}"
broken = $ 'never closed
after = f"{x"
'''

EXPECTED_FORMATTED: dict[str, list[str]] = {
    "the name after `def`": ["show"],
    "the target of an assignment": ["name", "broken", "after"],
    "inside a docstring": ['What d["key"] holds: {d["key"]}'],
    "the quotes that open a docstring": ['f"""'],
    "the first word of a docstring": ["What"],
    "inside a string": ['{d["key"]!r:>{x + 1}}', "{print(x)}", "\\{x}", "a", "b{{c}}", "{x"],
    "the quotes that open a string": ['f"', "t'", 'rf"', "'", 'f"', 'f"'],
    "the quotes that close a string": ['"', "'", '"', "'", '"', '"'],
    "inside a comment": ['# f"{x}"'],
    "a builtin's name": ["print"],
    "a name in CamelCase": ["PythonFinalizationError"],
    "a number": [],
    "an arithmetic operator": ["+"],
    "an opening bracket": ["("],
    "inside curly brackets": [],
    "any name": words("show d x name print PythonFinalizationError broken never closed after"),
    "a keyword": words("def return"),
}


@pytest.mark.parametrize("label", EXPECTED_FORMATTED)
def test_labels_of_f_strings_and_faults_are_the_same_on_every_python(label: str) -> None:
    """By the standard library's `tokenize` and `builtins` they differ: 3.11, 3.12 and 3.13 each give others."""
    assert runs(FORMATTED, label) == EXPECTED_FORMATTED[label]


def test_every_bit_of_every_label_is_the_same_on_every_python() -> None:
    found = [hashlib.sha256(label_characters(source).astype("<u8").tobytes()).hexdigest() for source in (SOURCE, FORMATTED)]
    assert found == [
        "a5165ecabcad64addab713e6857abc58ed7d5289d6696cca152df456b6ff252f",
        "40cb125b235eb6778ec2171f831354e1ff0a661bb37273fc42decb511ef37118",
    ]
