"""The tokens of Python source, as fixed lists: the same on every version of Python."""

from __future__ import annotations

import io
import sys
import sysconfig
import time
import tokenize
from pathlib import Path

import pytest

from pipelines.concepts.python_tokens import Kind, python_tokens


def found(source: str) -> list[str]:
    """Each token as its kind's first letter and its text."""
    return [f"{token.kind.name[0]} {source[token.start : token.stop]}".rstrip() for token in python_tokens(source)]


@pytest.mark.parametrize(
    "string",
    [
        'f"{x}"',
        "f''",
        'f"{{x}}"',
        """f'{d["key"]}'""",
        'f"{d["key"]}"',
        'f"{f"{f"{1 + 1}"}"}"',
        'f"{x!r:>{width}}"',
        'f"{x:{"{"}>10}"',
        'f"{ {1: 2}[1] }"',
        'f"{x = }"',
        'f"{(lambda y: y)(1)}"',
        'rf"\\"{x}"',
        'Fr"{x}"',
        'f"\\{d["key"]}"',
        'f"\\N{DASH}{x["a"]}"',
        'f"""{\n  x["""a"""]  # a comment }"\n}"""',
        'f"{\n  x["a"]\n}"',
        "f'a\\\nb{x}'",
        't"{x["a"]}"',
        "TR'{x}'",
        "rb'x'",
        "u'x'",
        '"a\\\nb"',
        '"\\""',
        "'''a'b''c\\''''",
        '"""\n\\"""\n"""',
    ],
)
def test_a_string_is_one_token_whatever_its_prefix_and_its_fields(string: str) -> None:
    assert found(f"{string} + 1") == [f"S {string}", "O +", "N 1", "S"]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('f"{x" + y', ['S f"{x"', "O +", "N y", "S"]),  # fields that are not closed
        ('f"{(x}" + y', ['S f"{(x}"', "O +", "N y", "S"]),
        ('f"{x:"}"', ['S f"{x:"', "O }", 'F "']),
        ('f"a', ["N f", 'F "', "N a", "S"]),  # strings that are not closed
        ("x 'a\ny", ["N x", "F", "F '", "N a", "S", "N y", "S"]),
        ('x = """a\nb', ["N x", "O ="]),
        ("a = $ ?", ["N a", "O =", "F", "F $", "F", "F ?", "S"]),
        ("²\x00", ["F ²", "F \x00", "S"]),
        ("a!=b != !c", ["N a", "O !=", "N b", "O !=", "F", "F !", "N c", "S"]),
    ],
)
def test_faults_are_stepped_over_in_one_way(source: str, expected: list[str]) -> None:
    assert found(source) == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("012 1_0 0xFF 1e-3 .5j 1.", ["N 0", "N 12", "N 1_0", "N 0xFF", "N 1e-3", "N .5j", "N 1.", "S"]),
        ("a->b:=c**=d", ["N a", "O ->", "N b", "O :=", "N c", "O **=", "N d", "S"]),
        ("a//b...c<>d", ["N a", "O //", "N b", "O ...", "N c", "O <", "O >", "N d", "S"]),
        ("é_1 = ñ", ["N é_1", "O =", "N ñ", "S"]),
        ("a # b\n\n# c\n  # d\ne", ["N a", "C # b", "S", "C # c", "C # d", "N e", "S"]),
        ("(a,\n\n # b\n c)\nd", ["O (", "N a", "O ,", "C # b", "N c", "O )", "S", "N d", "S"]),
        ("a = \\\n  b\n", ["N a", "O =", "N b", "S", "S"]),
        ("a\r\nb\rc\n", ["N a", "S", "N b", "S", "N c", "S", "S"]),
        ("if a:\n    b\n  c\nd", ["N if", "N a", "O :", "S", "N b", "S"]),  # `c` is in no block
        ("if a:\n\tb\n        c\nd", ["N if", "N a", "O :", "S", "N b", "S", "N c", "S", "N d", "S"]),
        ("(a", ["O (", "N a"]),
        ("a \\", ["N a", "F", "F \\", "S"]),
        ("", ["S"]),
    ],
)
def test_everything_else_is_a_token_as_in_the_language_reference(source: str, expected: list[str]) -> None:
    assert found(source) == expected


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="later versions cut f-strings into pieces")
@pytest.mark.parametrize("module", ["argparse.py", "dataclasses.py", "tokenize.py", "typing.py", "test/test_fstring.py"])
def test_the_tokens_of_whole_modules_are_those_of_tokenize_of_3_11(module: str) -> None:
    file = Path(sysconfig.get_paths()["stdlib"]) / module
    if not file.exists():
        pytest.skip("this Python came without its tests")
    source = file.read_text(encoding="utf-8")
    layout = {tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = tokenize.generate_tokens(io.StringIO(source, newline="").readline)
    expected = [token.string for token in tokens if token.type not in layout]
    ours = [source[token.start : token.stop] for token in python_tokens(source)]
    assert ours == [*expected, ""], "the last is the end of the source"


@pytest.mark.parametrize("piece", ["f'{", 'f"""{', "f'{(", "t'{x:{", "'", '"""\n', "f'{'", "\\\n", "((", "f'{{", "#", "1_"])
def test_hostile_source_takes_time_in_proportion_to_its_length(piece: str) -> None:
    """300 kB of openings that nothing closes; read again for every opening, they took minutes."""
    source = piece * (300_000 // len(piece))
    begin = time.perf_counter()
    n_tokens = sum(1 for _ in python_tokens(source))
    assert n_tokens <= len(source) + 1
    assert time.perf_counter() - begin < 10


def test_a_kind_is_a_name_a_number_or_a_fault() -> None:
    kinds = [token.kind for token in python_tokens("a 1 's' + # c\n$")]
    expected = [Kind.NAME, Kind.NUMBER, Kind.STRING, Kind.OPERATOR, Kind.COMMENT, Kind.STATEMENT_END, Kind.FAULT]
    assert kinds == [*expected, Kind.STATEMENT_END]
