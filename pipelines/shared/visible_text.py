"""Text for a terminal: visible white space, and bars of eight heights."""

from __future__ import annotations

BAR = " ▁▂▃▄▅▆▇█"


def visible(text: str) -> str:
    """A token or context with visible white space.

    >>> visible("def f():\\n\\treturn")
    'def f():⏎⇥return'
    """
    return text.replace("\r", "␍").replace("\n", "⏎").replace("\t", "⇥")
