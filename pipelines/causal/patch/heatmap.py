"""In: a grid of figures with names for its rows and columns. Out: it as lines for a terminal, or as a picture.

Colours run from blue (below 0) over white to red; they are left out where the output is no terminal, so that every cell
says its figure as well, or in wide grids a block as high as it is large.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from actstore.errors import InputError
from pipelines.shared.visible_text import BAR, Visible, visible

if TYPE_CHECKING:
    from collections.abc import Sequence

FORMATS = (".png", ".svg")
MAX_NUMBERED = 16
"""Columns of a grid whose cells are figures: wider ones are blocks, one character a column."""
CELL = 6


def heat_lines(rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]]) -> list[str]:
    """One line a row, the columns' names above. NaN is an empty cell."""
    rows = list(map(visible, rows))
    width = max(map(len, rows))
    largest = max((abs(v) for row in values for v in row if math.isfinite(v)), default=0.0) or 1.0
    if len(columns) > MAX_NUMBERED:
        legend = f"a full block is {largest:.3g}, `-` is below 0 by more than an eighth of it"
        cells = ["".join(_coloured(_block(v, largest), v, largest) for v in row) for row in values]
        shown = " ".join(f"{i} {visible(name)!r}" for i, name in enumerate(columns))
        blocks = (Visible(f"{name:<{width}} {line}") for name, line in zip(rows, cells, strict=True))
        return [f"columns: {shown}", legend, *blocks]
    heads = "".join(f"{_short(name):>{CELL}}" for name in columns)
    lines = [f"{'':<{width}} {heads}"]
    for name, row in zip(rows, values, strict=True):
        cells = ["".join(_coloured(f"{_number(v):>{CELL}}", v, largest) for v in row)]
        lines.append(Visible(f"{name:<{width}} {''.join(cells)}"))
    return lines


def require_picture_path(path: Path) -> None:
    """Raises InputError for a path that is neither a PNG nor an SVG, or lies in no folder."""
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"{path}: a picture is written as {' or '.join(FORMATS)}; give the path such an ending.")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{path}: its folder is not there; make it, or choose another one.")


def save_heatmap(
    path: Path, rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]], title: str, unit: str
) -> None:
    """Draw the grid, in the format that the path ends in. Written whole or not at all."""
    import io

    from matplotlib.figure import Figure

    from actstore.files import publish_bytes

    require_picture_path(path)
    largest = max((abs(v) for row in values for v in row if math.isfinite(v)), default=0.0) or 1.0
    figure = Figure(figsize=(2 + 0.45 * len(columns), 1.6 + 0.24 * len(rows)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto")
    axes.set_xticks(range(len(columns)), labels=list(map(_label, columns)), rotation=60, ha="right")
    axes.set_yticks(range(len(rows)), labels=list(map(_label, rows)))
    axes.set_title(_label(title), fontsize=9)
    figure.colorbar(image)
    figure.supxlabel(unit, fontsize=8)  # beside the bar, a long unit is cut off where the grid is low
    kept = io.BytesIO()
    figure.savefig(kept, format=path.suffix[1:].lower(), dpi=120)
    publish_bytes(path, kept.getvalue())


def _label(text: str) -> str:
    """Text in a picture: visible, and no formula."""
    return visible(text).replace("$", r"\$")


def _number(value: float) -> str:
    return f"{value:z.2f}" if math.isfinite(value) else ""


def _short(name: str) -> str:
    shown = visible(name)
    return shown if len(shown) < CELL else f"{shown[: CELL - 2]}…"


def _block(value: float, largest: float) -> str:
    if not math.isfinite(value):
        return " "
    level = round(8 * abs(value) / largest)
    return ("-" if level else " ") if value < 0 else BAR[level]


def _coloured(text: str, value: float, largest: float) -> str:
    """White where the value is 0, red above and blue below; click takes colours out where no terminal is."""
    if not math.isfinite(value):
        return text
    faded = round(255 * (1 - min(1.0, abs(value) / largest)))
    colour = (255, faded, faded) if value > 0 else (faded, faded, 255)
    return click.style(text, fg=(0, 0, 0), bg=colour)
