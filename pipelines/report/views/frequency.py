"""How often features fire: how many are in each band of frequency, and a histogram of the frequency."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.analysis.reader import Analysis
from pipelines.report.view import View, text_beside
from pipelines.statistics.bands import BAND_RANGES, BANDS

BINS_PER_DECADE = 10


def shown(analysis: Analysis, n_examples: int) -> dict[str, Any]:
    """Each band with its range and its number of features, and the histogram."""
    counts = [analysis.record.bands[name] for name in BANDS]
    return {
        "bands": list(zip(BANDS, BAND_RANGES, counts, strict=True)),
        "density": frequency_density(analysis.fires, analysis.n_rows),
    }


def frequency_density(fires: NDArray[np.int64], n_rows: int) -> dict[str, Any]:
    """How many live features fire how often: equal bins of log10 of the frequency, from a whole decade up to 0.

    >>> frequency_density(np.array([0, 1, 1, 100]), 100)["decades"]
    [-2, -1, 0]
    >>> sum(frequency_density(np.array([0, 1, 1, 100]), 100)["counts"])
    3
    """
    exponents = np.log10(fires[fires > 0] / max(n_rows, 1))
    lowest = min(int(np.floor(exponents.min(initial=0))), -1)
    counts, _ = np.histogram(exponents, bins=-lowest * BINS_PER_DECADE, range=(lowest, 0))
    return {"counts": counts.tolist(), "decades": list(range(lowest, 1)), "top": round_up(int(counts.max()))}


def round_up(count: int) -> int:
    """The next even multiple, 2 to 20, of a power of ten, so that an axis and its middle are round.

    >>> [round_up(n) for n in (0, 1, 3, 10, 37, 116, 2007)]
    [2, 2, 4, 10, 40, 120, 4000]
    """
    step = 1
    while count > 20 * step:
        step *= 10
    return max(-(-count // (2 * step)), 1) * 2 * step


VIEW = View(order=20, template=text_beside(__file__), shown=shown)
