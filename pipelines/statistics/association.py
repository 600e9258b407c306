"""How closely two features fire together, from counts alone: rows with both, rows with each, all rows.

Every function takes broadcastable arrays `together` (n_ab), `fires_a`, `fires_b` (n_a, n_b) and `n_rows` (N), and gives
float64; pairs for which a measure is not defined (a feature that never fires) give NaN. None of these says whether a pair
is surprising: that needs a null.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[Any] | int


def conditional(together: Counts, fires_a: Counts) -> NDArray[np.float64]:
    """P(b | a) = n_ab / n_a.

    >>> float(conditional(3, 4))
    0.75
    """
    return _ratio(together, fires_a)


def lift(together: Counts, fires_a: Counts, fires_b: Counts, n_rows: int) -> NDArray[np.float64]:
    """P(a, b) / (P(a) P(b)) = n_ab N / (n_a n_b): 1 for independent features.

    >>> float(lift(10, 20, 50, 100))
    1.0
    """
    return _ratio(_float(together) * n_rows, _float(fires_a) * _float(fires_b))


def jaccard(together: Counts, fires_a: Counts, fires_b: Counts) -> NDArray[np.float64]:
    """n_ab / (n_a + n_b - n_ab), both over either (Jaccard 1912).

    >>> float(jaccard(2, 3, 3))
    0.5
    """
    return _ratio(together, _float(fires_a) + _float(fires_b) - _float(together))


def pmi(together: Counts, fires_a: Counts, fires_b: Counts, n_rows: int) -> NDArray[np.float64]:
    """ln of the lift, in nats (Church and Hanks 1990); minus infinity for two features that never fire together.

    >>> round(float(pmi(20, 20, 20, 100)), 4) == round(float(np.log(5)), 4)
    True
    """
    with np.errstate(divide="ignore"):
        return np.log(lift(together, fires_a, fires_b, n_rows))


def npmi(together: Counts, fires_a: Counts, fires_b: Counts, n_rows: int) -> NDArray[np.float64]:
    """PMI / -ln P(a, b), from -1 (never together) through 0 (independent) to 1 (only together) (Bouma 2009).

    Two features that both fire in every row give 1, the limit.

    >>> [round(float(npmi(n, 20, 20, 100)), 6) for n in (0, 4, 20)]
    [-1.0, 0.0, 1.0]
    """
    information = pmi(together, fires_a, fires_b, n_rows)
    with np.errstate(divide="ignore", invalid="ignore"):
        surprise = -np.log(_ratio(together, n_rows))
        scaled = np.asarray(information / surprise)
    scaled = np.where(_float(together) == 0, np.where(np.isnan(information), np.nan, -1.0), scaled)
    return np.where(surprise == 0, 1.0, scaled)


def phi(together: Counts, fires_a: Counts, fires_b: Counts, n_rows: int) -> NDArray[np.float64]:
    """Pearson's correlation of the two indicators (Yule 1912): (N n_ab - n_a n_b) / sqrt(n_a n_b (N - n_a) (N - n_b)).

    >>> round(float(phi(20, 20, 20, 100)), 6)
    1.0
    """
    a, b = _float(fires_a), _float(fires_b)
    spread = np.sqrt(a) * np.sqrt(n_rows - a) * np.sqrt(b) * np.sqrt(n_rows - b)
    return np.clip(_ratio(n_rows * _float(together) - a * b, spread), -1, 1)


def _float(counts: Counts) -> NDArray[np.float64]:
    return np.asarray(counts, np.float64)


def _ratio(above: Any, below: Any) -> NDArray[np.float64]:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(_float(below) == 0, np.nan, _float(above) / _float(below)))
