"""raw: plain numbers as they are, such as the window of each row."""

from __future__ import annotations

from actstore.encodings.base import Encoding

ENCODING = Encoding("raw", "", compressed=False)
