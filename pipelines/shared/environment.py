"""The environment variables that libraries read once when they are loaded."""

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
"""Unless the user's environment says otherwise, what libraries print stays off the terminal, and idle threads sleep, those
of GNU's OpenMP after some microseconds. Rows/s of a training alone, F = 2,048, on two cores (and of each of two at once):
asleep at once 40,000 (27,500), so 49,000 (24,000), after ten times as long 51,000 (11,000), by default down to 1,500."""


def set_environment() -> None:
    """Set `ENVIRONMENT` where it is not set; before torch and the others are loaded, which read it once."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
