"""In: a record, or a value of it. Out: its text, or one line that says what it is instead.

A column is named by its key, or by a path such as `meta.text`. Its value is text, UTF-8 bytes, null (no text), or a list of
chat messages: objects with `role` and `content`, or `from` and `value`. Such a conversation is the text
`role: content` of each message, with a blank line between two.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from actstore.errors import InputError
from pipelines.text.sources.decoding import decoded

DEFAULT_COLUMN = "text"
MESSAGE_KEYS = (("role", "content"), ("from", "value"))
_TYPES = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}


def text_pieces_of(value: Any, column: str, where: object) -> Iterator[str]:
    """A value's text, in pieces. Raises InputError, with its type, for a value that is not text."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, bytes | memoryview):
        yield from decoded([value], f"{where}: column {column!r}")
    elif isinstance(value, list) and (text := conversation(value)) is not None:
        yield text
    elif value is not None:
        kind = _TYPES.get(type(value), type(value).__name__)
        raise not_text(column, kind, where, has_keys=isinstance(value, dict))


def value_at(record: Any, column: str, where: object) -> Any:
    """A record's value in a column. Raises InputError when it has no such column."""
    found, value = _value_at(record, column)
    if not found:
        raise no_column(column, list(record) if isinstance(record, dict) else [], where)
    return value


def conversation(messages: list[Any]) -> str | None:
    """The text of a list of chat messages; None for another list.

    >>> conversation([{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}])
    'user: Why?\\n\\nassistant: So.'
    """
    turns = [_turn(message) for message in messages]
    return None if None in turns else "\n\n".join(turn for turn in turns if turn is not None)


def no_column(column: str, there: list[str], where: object) -> InputError:
    """Why a table without the column, or with two of that name, is refused."""
    names = ", ".join(map(str, there)) or "none"
    if column in there:
        return InputError(f"corpus {where}: has two columns {column!r}; rename one of them.")
    return InputError(f"corpus {where}: no column {column!r}; it has {names}: choose one with #column.")


def not_text(column: str, kind: str, where: object, *, has_keys: bool = False) -> InputError:
    inside = f", or what is in it with #{column}.key" if has_keys else ""
    return InputError(f"corpus {where}: column {column!r} holds {kind}, not text; choose another with #column{inside}.")


def _value_at(record: Any, column: str) -> tuple[bool, Any]:
    if not isinstance(record, dict):
        return False, None
    if column in record:
        return True, record[column]
    key, dot, rest = column.partition(".")
    if not dot or key not in record:
        return False, None
    return (True, None) if record[key] is None else _value_at(record[key], rest)


def _turn(message: Any) -> str | None:
    for who, what in MESSAGE_KEYS:
        if isinstance(message, dict) and isinstance(message.get(who), str) and what in message:
            said = message[what]
            return f"{message[who]}: {said or ''}" if said is None or isinstance(said, str) else None
    return None
