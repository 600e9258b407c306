"""The numbers that options take, each with its bounds: a number beyond them is one line, as any other wrong value."""

from __future__ import annotations

import math
from typing import Any

import click

LARGEST_WHOLE = 1 << 53
"""Whole numbers up to this one are exact in JSON; what is larger is a slip."""
LARGEST_REAL = 1e12
LARGEST_SEED = (1 << 64) - 1


class Whole(click.IntRange):
    """A whole number from `least` (None: from minus `most`) to `most`. Help shows the bounds that are given."""

    def __init__(self, least: int | None = None, most: int | None = None):
        super().__init__(least, most)
        self.bounds = (-LARGEST_WHOLE if least is None else least, LARGEST_WHOLE if most is None else most)

    def _describe_range(self) -> str:
        return "" if self.min is None else super()._describe_range()

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        number: int = click.INT.convert(value, param, ctx)
        least, most = self.bounds
        if not least <= number <= most:
            _refuse(param, value, f"from {least:,} to {most:,}")
        return number


class Real(click.FloatRange):
    """A finite number from `least`, or above it where `is_open`, to `most`."""

    def __init__(self, least: float | None = None, most: float | None = None, *, is_open: bool = False):
        super().__init__(least, most, min_open=is_open)
        self.bounds = (-LARGEST_REAL if least is None else least, LARGEST_REAL if most is None else most)
        self.is_open = is_open

    def _describe_range(self) -> str:
        return "" if self.min is None else super()._describe_range()

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = click.FLOAT.convert(value, param, ctx)
        least, most = self.bounds
        if not (math.isfinite(number) and least <= number <= most) or (self.is_open and number == least):
            _refuse(param, value, f"{'above' if self.is_open else 'from'} {least:g} to {most:g}")
        return number


AT_LEAST_ONE, FROM_ZERO, ANY_WHOLE = Whole(1), Whole(0), Whole()
SEED = Whole(0, LARGEST_SEED)
"""What NumPy's generators take."""
TORCH_SEED = Whole(0, (1 << 63) - 1)


def _refuse(param: click.Parameter | None, value: Any, bounds: str) -> None:
    from actstore.errors import InputError

    name = "a number" if param is None else param.opts[0]
    raise InputError(f"{name} {value}: not a number {bounds}; choose one.")
