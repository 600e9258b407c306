"""Makes each doctest of a docstring a block of code: Markdown reads `>>>` as three quotations."""

from __future__ import annotations

import re
from typing import Any

import griffe

DOCTEST = re.compile(r"^>>> .*(?:\n(?!\s*$).*)*", re.MULTILINE)


def fenced(docstring: str) -> str:
    """The docstring with each doctest, up to the next empty line, between fences.

    >>> fenced("A sum.\\n\\n>>> 1 + 1\\n2\\n\\nMore.").splitlines()[2:6]
    ['```pycon', '>>> 1 + 1', '2', '```']
    """
    return DOCTEST.sub(lambda doctest: f"```pycon\n{doctest[0]}\n```", docstring)


class DoctestFences(griffe.Extension):
    """Called by mkdocstrings for every object whose docstring the site shows."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)
