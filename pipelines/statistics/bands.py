"""Bands of firing frequency: always, common, rare, very rare, dead."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

BANDS = ("always", "common", "rare", "very rare", "dead")
"""By firing frequency, from high to low; `BAND_RANGES` says each in words."""
ABOVE_PER_CENT = (90, 10, 1, 0)
"""The percentage of rows that a feature of each band fires in more than; a dead one is above none."""
BAND_RANGES = (
    f"over {ABOVE_PER_CENT[0]} %",
    *(f"over {low}{' %' if low else ''}, to {high} %" for high, low in pairwise(ABOVE_PER_CENT)),
    "never",
)


def band_numbers(fires: NDArray[np.int64], n_rows: int) -> NDArray[np.int64]:
    """(F,) which of `BANDS` each feature lies in. Compares integers, not ratios.

    >>> band_numbers(np.array([900, 901, 0]), 1000).tolist()
    [1, 0, 4]
    """
    above = np.array(ABOVE_PER_CENT) * n_rows
    return (np.asarray(fires, np.int64)[:, None] * 100 <= above).sum(axis=1)


def frequency_bands(fires: NDArray[np.int64], n_rows: int) -> dict[str, int]:
    """How many features lie in each band; the bands sum to the number of features.

    >>> frequency_bands(np.array([0, 1, 10, 11, 100, 101, 900, 901, 1000]), 1000)
    {'always': 2, 'common': 2, 'rare': 2, 'very rare': 2, 'dead': 1}
    """
    counts = np.bincount(band_numbers(fires, n_rows), minlength=len(BANDS)).tolist()
    return dict(zip(BANDS, counts, strict=True))
