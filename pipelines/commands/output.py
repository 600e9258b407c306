"""What commands print: the options they run with, results as readable lines, results as strict JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePath
from typing import Any

import click

from actstore.errors import InputError
from pipelines.shared.visible_text import escaped, replaced, visible


def announced(command: str, config: Any, auto: tuple[str, ...] = ()) -> Any:
    """Say on stderr what a command runs with, defaults included; returns the configuration.

    An option named in `auto` leaves the choice to the program when its value is 0, and is shown as `auto`.
    """
    given = {name: value for name, value in vars(config).items() if value not in (None, ())}
    fields = (f"{name}={_asked(value, name in auto)}" for name, value in given.items())
    click.echo(visible(f"{command}: {' '.join(fields)}"), err=True)
    for name, value in given.items():
        for item in value if isinstance(value, tuple) else (value,):
            _require_utf8_path(name, item)
    return config


def _require_utf8_path(name: str, value: Any) -> None:
    """Refuses a path that no record could name. The files of a corpus are exempt: a store keeps their names as text."""
    is_path = isinstance(value, PurePath) or (isinstance(value, str) and (name == "out" or os.access(value, os.F_OK)))
    if is_path and name != "corpus" and os.fsencode(value).decode(errors="replace") != str(value):
        raise InputError(f"{name} {str(value)!a}: is a path whose bytes are not UTF-8; rename it.")


def _asked(value: Any, zero_is_auto: bool) -> str:
    values = value if isinstance(value, tuple) else (value,)
    return ",".join("auto" if zero_is_auto and item == 0 else str(item) for item in values)


def sole(value: Any) -> Any:
    """The value of an option that can be repeated and was not."""
    return value[0] if isinstance(value, tuple) and len(value) == 1 else value


def show(value: Any, as_json: bool, lines: Callable[[Any], Iterable[str]]) -> None:
    """Print a result: all of it as JSON, or its lines, each made visible."""
    if as_json:
        click.echo(as_json_text(value))
    else:
        for line in lines(value):
            click.echo(visible(line))


def as_json_text(value: Any) -> str:
    """A result as strict JSON: numbers as numbers, NaN and infinities as null. Raises TypeError for any other type.

    Texts are those of the result, whatever they hold: a character that a terminal obeys or does not draw is an escape.

    >>> print(as_json_text({"fve": float("nan"), "out": PurePath("run")}))
    {
     "fve": null,
     "out": "run"
    }
    """
    text = json.dumps(_plain(value), indent=1, ensure_ascii=False, allow_nan=False)
    return "\n".join(replaced(line, escaped) for line in text.split("\n"))


def _plain(value: Any) -> Any:
    """A result in the types of JSON; NumPy's scalars and arrays are recognised without loading NumPy."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Mapping):
        return {_key(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if type(value).__module__ == "numpy":
        return _plain(value.tolist())
    raise TypeError(f"{value!r}: a {type(value).__name__} has no form in JSON; convert it where the result is made.")


def _key(key: Any) -> str | int:
    plain = _plain(key)
    if not isinstance(plain, str | int) or isinstance(plain, bool):
        raise TypeError(f"{key!r}: a {type(key).__name__} is no key of a JSON object; use text or an integer.")
    return plain


def number(value: float) -> str:
    """A number with four significant digits, so that small ones keep theirs; thousands are grouped.

    >>> [number(n) for n in (3.1e-06, 0.73622, 12.3456, 1234567.8, 1234567, 0.0)]
    ['3.1e-06', '0.7362', '12.35', '1,234,568', '1,234,567', '0']
    """
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}"
    return f"{value:.4g}"


def size(n_bytes: float) -> str:
    """Bytes in a unit that leaves up to four digits.

    >>> size(312), size(45_600), size(1_234_000_000)
    ('312 bytes', '45.6 kB', '1.234 GB')
    """
    if n_bytes < 1000:
        return f"{n_bytes:.0f} bytes"
    power = min(int(math.log10(n_bytes) // 3), 5)
    return f"{n_bytes / 1000**power:.4g} {('kB', 'MB', 'GB', 'TB', 'PB')[power - 1]}"


def duration(seconds: float) -> str:
    """Seconds in the unit that a reader expects.

    >>> duration(0.5), duration(75), duration(7260)
    ('0.5 s', '1 min 15 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def key_lines(values: Mapping[str, Any], indent: str = "") -> list[str]:
    """One line for each field, nested fields indented; fields that are empty are left out."""
    lines = []
    for key, value in values.items():
        if value is None or value == "" or (isinstance(value, dict | list | tuple) and not value):
            continue
        if isinstance(value, Mapping):
            lines += [f"{indent}{key}", *key_lines(value, indent + "  ")]
            continue
        lines.append(f"{indent}{key:<{max(1, 24 - len(indent))}} {_shown(value)}")
    return lines


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value))
    return number(value) if isinstance(value, int | float) else str(value)
