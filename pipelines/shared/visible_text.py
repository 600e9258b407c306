"""Text for a terminal: white space made visible, and bars of eight heights."""

from __future__ import annotations

BAR = " ▁▂▃▄▅▆▇█"


def visible(text: str) -> str:
    """A token or context with its white space made visible.

    >>> visible("def f():\\n\\treturn")
    'def f():⏎⇥return'
    """
    return text.replace("\r", "␍").replace("\n", "⏎").replace("\t", "⇥")
