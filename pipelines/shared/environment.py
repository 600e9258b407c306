"""Environment variables that libraries read once, when they are loaded."""

from __future__ import annotations

import os

ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "true",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "DASK_LOGGING__DISTRIBUTED": "critical",
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "1000",
}
"""Defaults, unless the user's environment says otherwise: libraries print nothing to the terminal, and idle threads sleep.

Idle threads of GNU's OpenMP spin for some microseconds (`GOMP_SPINCOUNT`) before they sleep. Measured rows/s of a training
with F = 2,048 on two cores, alone (and of each of two at once): with no spinning 40,000 (27,500), with 1,000 spins 49,000
(24,000), with ten times as many 51,000 (11,000), with OpenMP's default down to 1,500.
"""


def set_environment() -> None:
    """Set each variable of `ENVIRONMENT` that is unset. Call this before torch and the other libraries are loaded."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
