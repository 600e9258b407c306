"""fp32: rows as the model gave them."""

from __future__ import annotations

import numpy as np

from actstore.encodings.base import Encoding

ENCODING = Encoding(
    "fp32",
    "float32",
    compressed=False,
    largest=float(np.finfo(np.float32).max),
    float_dtype="float32",
    is_exact=True,
    offered=2,
)
