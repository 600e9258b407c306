"""In: Python source. Out: its tokens, the same on every version of Python.

The standard library's `tokenize` gives other tokens from 3.12 on: f-strings in pieces, and nothing behind faults that
3.11 stepped over. These are the tokens of 3.11 with one rule for strings: a string is one token, whatever its prefix; what
stands in the fields of an f-string or t-string is part of it, the string's own quotes too (PEP 701, PEP 750).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import Enum, auto
from typing import NamedTuple

TAB = 8
DEEPEST = 8
"""Formatted strings within fields of formatted strings. Deeper ones, which nobody writes, end at their first quote."""
PATIENCE = 4
"""Steps per character of a source in which its formatted strings are looked through; all that are closed take less than one.
The rest of a source made of openings that nothing closes is taken string by string, each up to its first quote."""

_PREFIX = r"(?:[bB][rR]?|[rR][bBfFtT]?|[fFtT][rR]?|[uU])?"
_STRING = rf"{_PREFIX}(?:'''|\"\"\"|'|\")"
_DIGITS = r"[0-9](?:_?[0-9])*"
_EXPONENT = rf"[eE][-+]?{_DIGITS}"
_FLOAT = rf"(?:(?:{_DIGITS}\.(?:{_DIGITS})?|\.{_DIGITS})(?:{_EXPONENT})?|{_DIGITS}{_EXPONENT})"
_INTEGER = r"0[xX](?:_?[0-9a-fA-F])+|0[bB](?:_?[01])+|0[oO](?:_?[0-7])+|0(?:_?0)*|[1-9](?:_?[0-9])*"
_OPERATOR = r"\*\*=?|//=?|>>=?|<<=?|\.\.\.|->|:=|[-+*/%&|^@=<>!]=|[-+*/%&|^@=<>~()\[\]{},:;.]"
_TOKEN = re.compile(
    rf"""[ \f\t]*(?:
        (?P<continued>\\(?:\r\n?|\n)) | (?P<newline>\r\n?|\n) | (?P<comment>\#[^\r\n]*) | (?P<string>{_STRING})
        | (?P<number>{_DIGITS}[jJ]|{_FLOAT}[jJ]?|{_INTEGER}) | (?P<operator>{_OPERATOR}) | (?P<name>\w+) | (?P<end>\Z)
    )""",
    re.VERBOSE,
)
_LINE_START = re.compile(r"(?P<indent>[ \f\t]*)(?P<blank>(?P<comment>#[^\r\n]*)?(?:\r\n?|\n|\Z))?")
_BODY = {
    "'": re.compile(r"(?:[^\r\n'\\]+|\\(?:\r\n|.))*+'", re.DOTALL),
    '"': re.compile(r'(?:[^\r\n"\\]+|\\(?:\r\n|.))*+"', re.DOTALL),
    "'''": re.compile(r"(?:[^'\\]+|\\.|'(?!''))*+'''", re.DOTALL),
    '"""': re.compile(r'(?:[^"\\]+|\\.|"(?!""))*+"""', re.DOTALL),
}
_TEXT = re.compile(r"""[^{}'"\\\r\n]+|\\(?:\r\n|[^{}])|.""", re.DOTALL)
"""A stretch of a formatted string outside its fields that is passed over at once."""
_IN_FIELD = re.compile(rf"""[^\w{{}}()\[\]:#'"]+|#[^\r\n]*|(?P<string>{_STRING})|\w+|.""", re.DOTALL)


class Kind(Enum):
    """What a token is."""

    NAME = auto()
    NUMBER = auto()
    STRING = auto()
    OPERATOR = auto()
    COMMENT = auto()
    STATEMENT_END = auto()
    """A newline outside brackets, or the end of the source."""
    FAULT = auto()
    """Characters that begin no token, such as a quote that nothing closes."""


class Token(NamedTuple):
    """The characters [start, stop) of a source."""

    kind: Kind
    start: int
    stop: int


def python_tokens(source: str) -> Iterator[Token]:
    """The tokens of a source in order; neither white space, nor the newlines of empty lines and within brackets.

    The tokens end early in three quotes that nothing closes, and at a line whose indentation is that of no block around it.

    >>> source = 'x = f"{d["key"]}"  # one string'
    >>> [source[token.start : token.stop] for token in python_tokens(source)]
    ['x', '=', 'f"{d["key"]}"', '# one string', '']
    """
    strings = _Strings(source)
    indents = [0]
    at = n_open = 0
    begins_line, is_continued = True, False
    while at < len(source):
        if begins_line and n_open == 0:
            line = _LINE_START.match(source, at)
            assert line is not None  # every part of it may be empty
            if line["blank"]:
                if line["comment"]:
                    yield Token(Kind.COMMENT, *line.span("comment"))
                at = line.end()
                continue
            if not _fits(indents, _column(line["indent"])):
                return
        begins_line = is_continued = False
        found = _TOKEN.match(source, at)
        name = found.lastgroup if found else None
        start, stop = found.span(name) if found and name else (at, at + 1)
        kind = Kind.FAULT
        if name == "string":
            closed = strings.stop(start)
            if closed is not None:
                kind, stop = Kind.STRING, closed
            elif source[start:stop].endswith(("'''", '"""')):
                return
            elif stop - start > 1:  # the prefix is a name
                kind, stop = Kind.NAME, stop - 1
            else:
                start, stop = at, at + 1
        elif name == "newline":
            kind, begins_line = Kind.STATEMENT_END, True
        elif name == "continued":
            is_continued = True
        elif name == "name":
            kind = Kind.NAME if source[start].isidentifier() else Kind.FAULT
        elif name in ("comment", "number", "operator"):
            kind = Kind[name.upper()]
            n_open += (source[start] in "([{") - (source[start] in ")]}")
        at = stop
        if not (is_continued or name == "end" or (begins_line and n_open > 0)):
            yield Token(kind, start, stop)
    if n_open == 0 and not is_continued:
        yield Token(Kind.STATEMENT_END, at, at)


def _column(indent: str) -> int:
    column = 0
    for character in indent:
        column = 0 if character == "\f" else column + 1 if character == " " else (column // TAB + 1) * TAB
    return column


def _fits(indents: list[int], column: int) -> bool:
    """Whether a line's column is that of a block around it, or begins one; `indents` then ends with it."""
    if column > indents[-1]:
        indents.append(column)
    while column < indents[-1]:
        indents.pop()
    return column == indents[-1]


class _Strings:
    """Where the strings of a source end. Each is looked for once, from wherever it is asked for."""

    def __init__(self, source: str):
        self._source = source
        self._stops: dict[int, int | None] = {}
        self._n_steps_left = PATIENCE * len(source)

    def stop(self, start: int, depth: int = 0) -> int | None:
        """Behind the quotes that close the string which begins at `start`; None when nothing closes it."""
        if start not in self._stops:
            self._stops[start] = self._find_stop(start, depth)
        return self._stops[start]

    def _find_stop(self, start: int, depth: int) -> int | None:
        source = self._source
        first = next(place for place in range(start, len(source)) if source[place] in "'\"")
        quotes = source[first] * (3 if source.startswith(source[first] * 3, first) else 1)
        if depth < DEEPEST and not {"f", "t"}.isdisjoint(source[start:first].lower()):
            stop = self._formatted(first + len(quotes), quotes, depth)
            if stop is not None:
                return stop
        body = _BODY[quotes].match(source, first + len(quotes))
        return body.end() if body else None

    def _formatted(self, at: int, quotes: str, depth: int, *, is_specification: bool = False) -> int | None:
        """Behind the closing quotes of a formatted string, from a place in its text; or before the `}` of a specification.

        None when it is not closed, or its fields are not: it may be a string of a source cut off, or with a fault.
        """
        source = self._source
        while at < len(source) and self._n_steps_left > 0:
            self._n_steps_left -= 1
            character = source[at]
            if source.startswith(quotes, at):
                return None if is_specification else at + len(quotes)
            if character == "}" and is_specification:
                return at
            if character == "{" and (is_specification or not source.startswith("{{", at)):
                stop = self._field(at + 1, quotes, depth)
                if stop is None:
                    return None
                at = stop
            elif character == "{":
                at += 2
            elif character in "\r\n" and len(quotes) == 1:
                return None
            else:
                text = _TEXT.match(source, at)
                at = text.end() if text else at + 1
        return None

    def _field(self, at: int, quotes: str, depth: int) -> int | None:
        """Behind the `}` of a field whose expression begins at `at`; None when it has none."""
        source, n_open = self._source, 0
        while self._n_steps_left > 0 and (part := _IN_FIELD.match(source, at)) is not None:
            self._n_steps_left -= 1
            character, at = part[0], part.end()
            if part["string"]:
                stop = self.stop(part.start(), depth + 1)
                if stop is None:
                    return None
                at = stop
            elif character in ("(", "[", "{"):
                n_open += 1
            elif character in (")", "]", "}") and n_open:
                n_open -= 1
            elif character in (")", "]", "}"):
                return at if character == "}" else None
            elif character == ":" and not n_open:
                stop = self._formatted(at, quotes, depth, is_specification=True)
                return None if stop is None else stop + 1
        return None
