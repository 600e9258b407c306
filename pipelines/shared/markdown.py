"""Text from outside in a page of Markdown: it is shown, and is no markup, link or HTML there."""

from __future__ import annotations

import re

from pipelines.shared.visible_text import visible

_CODE = re.compile(r"(?<!`)(`+)(?!`)(?:.+?)(?<!`)\1(?!`)")
_SLASHED = re.compile(r"([\\`*_{}\[\]#])")
_NUMBERED = re.compile(r"[<>&|~$^=@]|:(?=//)|(?<=www)\.", re.IGNORECASE)
"""What some dialect reads, and not every dialect lets a backslash escape."""


def code(text: str) -> str:
    """Text as one code span, whatever backticks it holds.

    >>> code("def"), code("a`b"), code("`")
    ('`def`', '``a`b``', '`` ` ``')
    """
    text = visible(text) or " "
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    loses_edges = text[0] == " " == text[-1] and text.strip()
    edge = " " if "`" in (text[0], text[-1]) or loses_edges else ""
    return f"{fence}{edge}{text}{edge}{fence}"


def inline(text: str) -> str:
    """Text inside a line of Markdown: its code spans stay code spans, anything else is shown as it is written.

    >>> inline("the token `<b>` is [not](http://a.example) **bold**")
    'the token `<b>` is \\\\[not\\\\](http&#58;//a.example) \\\\*\\\\*bold\\\\*\\\\*'
    """
    text, parts, start = visible(text), [], 0
    for span in _CODE.finditer(text):
        parts += [_escaped(text[start : span.start()]), span[0]]
        start = span.end()
    return "".join([*parts, _escaped(text[start:])])


def cell(text: str) -> str:
    """Text inside a cell of a table: as `inline`, and a bar in a code span ends no cell either.

    >>> cell("the token `||`")
    'the token `\\\\|\\\\|`'
    """
    return inline(text).replace("|", r"\|")


def _escaped(text: str) -> str:
    return _NUMBERED.sub(lambda found: f"&#{ord(found[0])};", _SLASHED.sub(r"\\\1", text))
