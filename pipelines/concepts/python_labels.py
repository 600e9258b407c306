"""In: Python source. Out: what every token of it is, in the language's own terms; labels that cost nothing.

Each label is one line that a reader can check in the text, the same on every version of Python. A language-model token
takes the labels of its first character that is not white space (of its first character, if all are).
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

from pipelines.concepts.python_tokens import Kind, Token, python_tokens
from pipelines.concepts.python_words import BUILTINS, KEYWORDS

LABELS = (
    "the name after `def`",
    "the name after `class`",
    "a name after `import`",
    "the module after `from`",
    "an attribute: the name after a dot",
    "an attribute of `self`",
    "the decorator's name after `@`",
    "a parameter in a `def` header",
    "the name of a keyword argument",
    "the name of what is called, before `(`",
    "the exception after `except` or `raise`",
    "the loop variable after `for`",
    "the name after `return`",
    "the target of an assignment",
    "a builtin's name",
    "a name in CamelCase",
    "a name in ALL_CAPS",
    "a name with a leading underscore",
    "a __dunder__ name",
    "any name",
    "a keyword",
    "a number",
    "inside a string",
    "the quotes that open a string",
    "the quotes that close a string",
    "inside a docstring",
    "the quotes that open a docstring",
    "the quotes that close a docstring",
    "the first word of a docstring",
    "inside a comment",
    "the `#` that begins a comment",
    "an opening bracket",
    "a closing bracket",
    "the `(` of a call",
    "the `(` of a `def` header",
    "the colon that ends a block header",
    "a colon inside brackets",
    "the comma between arguments or items",
    "the `=` of an assignment",
    "the `=` of a keyword argument or default",
    "a comparison operator",
    "an arithmetic operator",
    "inside round brackets",
    "inside square brackets",
    "inside curly brackets",
    "inside brackets within brackets",
    "inside a `def` header",
    "the indentation of a line",
    "the first word of a line",
    "the end of a line",
    "an empty line's end",
)
BIT = {name: np.uint64(1) << np.uint64(i) for i, name in enumerate(LABELS)}
NONE = np.uint64(0)
COMPARISONS = frozenset({"==", "!=", "<", ">", "<=", ">="})
ARITHMETIC = frozenset({"+", "-", "*", "/", "//", "%", "**"})
AFTER = {
    "def": "the name after `def`",
    "class": "the name after `class`",
    "import": "a name after `import`",
    "from": "the module after `from`",
    "@": "the decorator's name after `@`",
    "except": "the exception after `except` or `raise`",
    "raise": "the exception after `except` or `raise`",
    "for": "the loop variable after `for`",
    "return": "the name after `return`",
}
BLOCKS = frozenset(
    {"def", "class", "if", "elif", "else", "for", "while", "try", "except", "finally", "with", "async", "match", "case"}
)


def label_characters(source: str) -> NDArray[np.uint64]:
    """(len(source),) one bit for each label that holds at a character.

    Source that cannot be tokenised to its end (a file cut off in a string) is labelled as far as it can be.
    """
    labels = np.zeros(len(source), np.uint64)
    line_starts = np.cumsum([0, *(len(line) for line in io.StringIO(source, newline=""))])
    _label_lines(source, line_starts, labels)
    _Labeller(source, labels).run(list(python_tokens(source)))
    return labels


def label_tokens(source: str, token_bytes: list[bytes]) -> NDArray[np.uint64]:
    """(n_tokens,) labels of a document's tokens, given the bytes each stands for, in order."""
    by_character = label_characters(source)
    place = first_characters(source, token_bytes)
    inside = place < len(source)
    return (
        np.where(inside, by_character[np.where(inside, place, 0)], NONE) if len(source) else np.zeros(len(place), np.uint64)
    )


def first_characters(source: str, token_bytes: list[bytes]) -> NDArray[np.int64]:
    """(n_tokens,) rising: the character at which each token is labelled, len(source) for one that has no bytes left in it.

    It is the token's first character that is not white space; its first, if all are.

    >>> first_characters("é = 1", ["é".encode(), b" =", b" ", b"1"]).tolist()
    [0, 2, 3, 4]
    """
    begins_character = np.frombuffer(source.encode(), np.uint8) & 0xC0 != 0x80
    character = np.append(np.cumsum(begins_character) - 1, len(source))
    starts = np.concatenate([[0], np.cumsum([len(piece) for piece in token_bytes])]).astype(np.int64)
    lead = np.array([len(piece) - len(piece.lstrip()) if piece.strip() else 0 for piece in token_bytes], np.int64)
    return np.asarray(character[np.minimum(starts[:-1] + lead, len(character) - 1)], np.int64)


def _label_lines(source: str, line_starts: NDArray[np.int64], labels: NDArray[np.uint64]) -> None:
    for start, stop in zip(line_starts[:-1].tolist(), line_starts[1:].tolist(), strict=True):
        line = source[start:stop]
        text = line.lstrip(" \t")
        indent = len(line) - len(text)
        labels[start : start + indent] |= BIT["the indentation of a line"]
        body = text.rstrip("\r\n")
        word = len(body) - len(body.lstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_0123456789"))
        labels[start + indent : start + indent + word] |= BIT["the first word of a line"]
        labels[start + indent + len(body) : stop] |= BIT["the end of a line" if body else "an empty line's end"]


@dataclass
class _Labeller:
    """Walks Python's own tokens once, remembering brackets and the last significant tokens."""

    source: str
    labels: NDArray[np.uint64]

    def run(self, tokens: list[Token]) -> None:
        for token in tokens:
            if token.kind is Kind.COMMENT:
                self._mark(token.start, token.stop, "inside a comment")
                self._mark(token.start, token.start + 1, "the `#` that begins a comment")
        significant = [token for token in tokens if token.kind is not Kind.COMMENT]
        brackets: list[str] = []
        lambdas: list[int] = []  # how many brackets each unfinished `lambda` stands in
        statement = before = before_that = ""  # its first word, and the two tokens before this one in it
        for token, after in zip_longest(significant, significant[1:]):
            (kind, start, stop), text = token, self._text(token)
            ends_block = ends_statement = False
            if kind is Kind.STATEMENT_END:
                ends_statement = True
            elif kind is Kind.STRING:
                is_docstring = not statement and after is not None and after.kind is Kind.STATEMENT_END
                self._string(start, stop, is_docstring)
            elif kind is Kind.NUMBER:
                self._mark(start, stop, "a number")
            elif kind is Kind.NAME:
                self._name(start, stop, text, before, before_that, self._text(after) if after else "", brackets, statement)
                if text == "lambda":
                    lambdas.append(len(brackets))
            elif kind is Kind.OPERATOR:
                if text == ":" and lambdas and lambdas[-1] == len(brackets):
                    lambdas.pop()
                else:
                    ends_block = text == ":" and not brackets and statement in BLOCKS
                    ends_statement = text == ";" or ends_block
                if text in ")]}" and brackets:
                    brackets.pop()
                self._operator(start, stop, text, before, brackets, statement, ends_block)
            self._inside(start, stop, brackets, statement)
            if kind is Kind.OPERATOR and text in "([{":
                brackets.append(text)
            statement = "" if ends_statement else statement if statement not in ("", "async") else text
            before, before_that = ("", "") if ends_statement else (text, before)

    def _text(self, token: Token) -> str:
        return self.source[token.start : token.stop]

    def _mark(self, start: int, stop: int, label: str) -> None:
        self.labels[start:stop] |= BIT[label]

    def _string(self, start: int, stop: int, is_docstring: bool) -> None:
        text = self.source[start:stop]
        prefix = len(text) - len(text.lstrip("rRbBuUfFtT"))
        quotes = 3 if text[prefix : prefix + 3] in ('"""', "'''") else 1
        kind = "docstring" if is_docstring else "string"
        self._mark(start, start + prefix + quotes, f"the quotes that open a {kind}")
        self._mark(start + prefix + quotes, stop - quotes, f"inside a {kind}")
        self._mark(stop - quotes, stop, f"the quotes that close a {kind}")
        if is_docstring:
            body = text[prefix + quotes : len(text) - quotes]
            lead = len(body) - len(body.lstrip())
            first = start + prefix + quotes + lead
            self._mark(
                first, first + len(body[lead:].split(None, 1)[0]) if body.strip() else first, "the first word of a docstring"
            )

    def _name(
        self,
        start: int,
        stop: int,
        name: str,
        before: str,
        before_that: str,
        after: str,
        brackets: list[str],
        statement: str,
    ) -> None:
        if name in KEYWORDS:
            self._mark(start, stop, "a keyword")
            return
        labels = ["any name"]
        if before in AFTER and (statement == before or before not in ("from", "@")):
            labels.append(AFTER[before])
        if before == ".":
            labels.append("an attribute: the name after a dot")
            if before_that == "self":
                labels.append("an attribute of `self`")
        elif name in BUILTINS:
            labels.append("a builtin's name")
        if statement == "def" and brackets == ["("] and before in ("(", ",", "*", "**"):
            labels.append("a parameter in a `def` header")
        elif brackets and brackets[-1] == "(" and after == "=" and before in ("(", ","):
            labels.append("the name of a keyword argument")
        if after == "(" and before not in ("def", "class"):
            labels.append("the name of what is called, before `(`")
        if after == "=" and not brackets:
            labels.append("the target of an assignment")
        if name.startswith("__") and name.endswith("__"):
            labels.append("a __dunder__ name")
        elif name.startswith("_"):
            labels.append("a name with a leading underscore")
        if len(name) > 1 and name.isupper():
            labels.append("a name in ALL_CAPS")
        elif name[0].isupper() and any(character.islower() for character in name):
            labels.append("a name in CamelCase")
        for label in labels:
            self._mark(start, stop, label)

    def _operator(
        self, start: int, stop: int, text: str, before: str, brackets: list[str], statement: str, ends_block: bool
    ) -> None:
        labels = []
        opens_class = statement == "class" and not brackets
        follows_value = before not in KEYWORDS and (before[-1:].isalnum() or before.endswith(("_", ")", "]", "}", "'", '"')))
        if text in "([{":
            labels.append("an opening bracket")
            if text == "(" and statement == "def" and not brackets:
                labels.append("the `(` of a `def` header")
            elif text == "(" and follows_value and (before.isidentifier() or before in (")", "]")) and not opens_class:
                labels.append("the `(` of a call")
        elif text in ")]}":
            labels.append("a closing bracket")
        elif text == ":" and (brackets or ends_block):
            labels.append("a colon inside brackets" if brackets else "the colon that ends a block header")
        elif text == ",":
            labels.append("the comma between arguments or items")
        elif text == "=":
            labels.append("the `=` of a keyword argument or default" if brackets else "the `=` of an assignment")
        elif text in COMPARISONS:
            labels.append("a comparison operator")
        elif text in ARITHMETIC and (follows_value or text in "+-"):
            labels.append("an arithmetic operator")
        for label in labels:
            self._mark(start, stop, label)

    def _inside(self, start: int, stop: int, brackets: list[str], statement: str) -> None:
        names = {"(": "inside round brackets", "[": "inside square brackets", "{": "inside curly brackets"}
        if brackets:
            self._mark(start, stop, names[brackets[-1]])
        if len(brackets) > 1:
            self._mark(start, stop, "inside brackets within brackets")
        if statement == "def":
            self._mark(start, stop, "inside a `def` header")
