"""Text from a corpus, a prompt, a file or a name, as a terminal may print it: no character acts, and none is invisible.

Every line that a command prints goes through `visible`: a document that holds the control sequence of a terminal would
else clear the screen, retitle the window or hide what stands beside it. Results as JSON keep the text (`commands/output`).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

BAR = " ▁▂▃▄▅▆▇█"

_SIGNS = {chr(code): chr(0x2400 + code) for code in range(0x20)} | {"\x7f": "␡", "\n": "⏎", "\t": "⇥"}
_BLANK = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")
"""Characters that are letters or marks by their category, and drawn as nothing (Unicode: Default_Ignorable_Code_Point)."""


class Visible(str):
    """Text in which everything that came from outside was made visible already; its colours are the program's own."""


def visible(text: str) -> str:
    """Text in one line, without anything that a terminal obeys or does not draw.

    Control characters become their signs (␛, ⏎, ⇥); C1 controls, marks that change the direction of text, zero-width and
    line-separating characters, spaces other than the ordinary one, lone surrogates, private and unassigned characters
    become their numbers. What was made visible stays as it is.

    >>> visible("def f():\\n\\treturn")
    'def f():⏎⇥return'
    >>> visible("\\x1b]0;title\\x07 \\u202egnp.exe \\x9b2J \\ud83d")
    '␛]0;title␇ <U+202E>gnp.exe <U+009B>2J <U+D83D>'
    """
    return text if isinstance(text, Visible) else replaced(text, _sign)


def escaped(text: str) -> str:
    """Characters as the escapes of JSON: sixteen bits each, two for a character beyond them.

    >>> escaped("\\x7f\\U0001f600")
    '\\\\u007f\\\\ud83d\\\\ude00'
    """
    units = text.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2))


def replaced(text: str, sign: Callable[[str], str]) -> str:
    """Text with `sign(character)` for every character that a terminal obeys or does not draw."""
    if text.isprintable() and not _BLANK.search(text):
        return text
    return "".join(
        character if character.isprintable() and not _BLANK.match(character) else sign(character) for character in text
    )


def say(line: str, *, err: bool = False) -> None:
    """Print a line, made visible, to stdout or stderr at once."""
    print(visible(line), file=sys.stderr if err else sys.stdout, flush=True)


def _sign(character: str) -> str:
    return _SIGNS.get(character) or f"<U+{ord(character):04X}>"
