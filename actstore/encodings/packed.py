"""packed: plain numbers as they are, compressed, such as codes and the scales of rows."""

from __future__ import annotations

from actstore.encodings.base import Encoding

ENCODING = Encoding("packed", "", compressed=True)
