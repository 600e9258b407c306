"""Random damage and random lies: one bit, a cut, or JSON whose fields are dropped, retyped, huge, nested or unknown."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

from actstore.files import CONTENT, record_bytes

STRANGE: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    10**40,
    1e300,
    0.5,
    "",
    "7",
    "../../x",
    "/etc/hostname",
    "\x1b]0;title\x07\u202e",
    "x" * 1_000_000,
    [],
    [[]],
    {},
    {"": {}},
)
"""What a field is replaced by; a deep nest is made where it is needed."""


def damaged(data: bytes, rng: random.Random) -> bytes:
    """One flipped bit, a piece cut off, cut out or repeated, or nothing left."""
    kind = rng.randrange(6)
    if kind <= 2 and data:
        place = rng.randrange(8 * len(data))
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        return bytes(flipped)
    first, last = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    return (data[:first], data[:first] + data[last:], data[:last] + data[first:], b"")[kind - 3 if kind > 2 else 3]


def changed(value: Any, rng: random.Random) -> Any:
    """A JSON value with one part of it dropped, replaced by something strange, nested, or joined by an unknown field."""
    value = copy.deepcopy(value)
    places = list(_places(value))
    parent, key = rng.choice(places)
    kind = rng.randrange(6)
    if kind == 0:
        del parent[key]
    elif kind == 1:
        parent[key] = [parent[key]]
    elif kind == 2:
        for _ in range(rng.choice((10, 100, 500))):
            parent[key] = {"a": parent[key]}
    elif kind == 3 and isinstance(parent, dict):
        parent[rng.choice(("surprise", "", "__class__", "../x"))] = parent[key]
    else:
        parent[key] = rng.choice(STRANGE)
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every part of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from _places(inner)


def of_json(data: bytes, rng: random.Random) -> bytes:
    """Damage, or another JSON value, its hashes left as they were."""
    if rng.random() < 0.4:
        return damaged(data, rng)
    return json.dumps(changed(json.loads(data), rng), indent=1, sort_keys=True).encode()


def of_record(data: bytes, rng: random.Random) -> bytes:
    """As `of_json`; of the changed values, half have a content hash that matches."""
    if rng.random() < 0.7:
        return of_json(data, rng)
    value = json.loads(data)
    value.pop(CONTENT, None)
    return record_bytes(changed(value, rng))


def of_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Damage, half of it in the header; or another header."""
    n_header = int.from_bytes(data[:8], "little")
    kind = rng.randrange(3)
    if kind == 0:
        return damaged(data, rng)
    if kind == 1:
        return data[:8] + damaged(data[8 : 8 + n_header], rng)[:n_header].ljust(n_header) + data[8 + n_header :]
    header = json.dumps(changed(json.loads(data[8 : 8 + n_header]), rng)).encode()
    return len(header).to_bytes(8, "little") + header + data[8 + n_header :]


Mutate = Callable[[bytes, random.Random], bytes]
