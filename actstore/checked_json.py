"""JSON that anyone may have written, read into the type it must have: the one way in for every record.

A record's fields are those of a frozen dataclass; bounds and forms stand in its annotations (`Count`, `Hex16`, …). A
value that is of another type, out of bounds, missing or unknown is one DamagedStore that names the field.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, NoReturn, TypeVar

import msgspec
from msgspec import Meta

from actstore.errors import DamagedStore

T = TypeVar("T")

Count = Annotated[int, Meta(ge=0, le=1 << 53)]
"""How many there are of something: 0 to 2⁵³, which every JSON reader takes exactly."""
Positive = Annotated[int, Meta(ge=1, le=1 << 53)]
Width = Annotated[int, Meta(ge=0, le=1 << 24)]
"""Numbers a row: features, channels, tokens of a vocabulary."""
Hex16 = Annotated[str, Meta(pattern=r"^[0-9a-f]{16}\Z")]
"""An id: the first 16 hex digits of a SHA-256."""
HexWords = Annotated[str, Meta(pattern=r"^([0-9a-f]{8})*\Z")]
"""Words of 32 bits, each as eight hex digits."""
Hex64 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
"""A SHA-256."""
LARGEST_RECORD = 1 << 30
"""Bytes of the longest record that is read."""


def one_of(*names: str) -> Meta:
    """The annotation of a text that is one of some names."""
    return Meta(pattern=rf"^({'|'.join(map(re.escape, names))})\Z")


def parse_json(data: bytes, where: str) -> Any:
    """The value of a JSON text in UTF-8. Raises DamagedStore for anything else: NaN, half a character, endless nesting."""
    if len(data) > LARGEST_RECORD:
        raise DamagedStore(
            f"{where}: {len(data):,} bytes of JSON, at most {LARGEST_RECORD:,} are read; restore it from a copy."
        )
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_refuse)
        # A number such as 1e999 is no JSON number once it is read, and a lone surrogate, written \ud83d, is no text.
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise DamagedStore(f"{where}: not readable as JSON ({error}); restore it from a copy.") from error
    return value


def checked(value: Any, kind: type[T], where: str) -> T:
    """`value`, as parsed from JSON, as a `kind`: a dataclass, or a type such as dict[str, int].

    Raises DamagedStore, naming the field, when a field has another type or is out of bounds, is missing, or is none of
    the dataclass's. A field with a default may be missing. A dict[str, Any] takes anything.
    """
    try:
        result = msgspec.convert(value, kind, strict=True)
        back = msgspec.to_builtins(result)
    except (msgspec.ValidationError, RecursionError) as error:
        raise DamagedStore(f"{where}: {error}; restore it from a copy.") from error
    if unknown := _unknown(value, back):
        raise DamagedStore(f"{where}: unknown field {unknown}; use the actstore version that wrote it.")
    return result


def _unknown(value: Any, back: Any, path: str = "") -> str:
    """The first field of `value` that the type did not take, such as `parts.train.size`; empty when there is none."""
    if isinstance(value, dict):
        for key, inner in value.items():
            here = f"{path}.{key}" if path else key
            if key not in back:
                return here
            if unknown := _unknown(inner, back[key], here):
                return unknown
    elif isinstance(value, list):
        for index, (inner, of_back) in enumerate(zip(value, back, strict=True)):
            if unknown := _unknown(inner, of_back, f"{path}[{index}]"):
                return unknown
    return ""


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number of JSON")
