"""Which form of the training step is used: a fixed rule, so that a run can be repeated.

`sparse`: the product and the search for the active features in bfloat16, everything else exact and sparse.
`sparse-fp32`: the same with the product in full precision. `dense`: plain dense operators, for small dictionaries.
"""

from __future__ import annotations

KERNELS = ("sparse", "sparse-fp32", "dense")
FAST_FROM, FAST_FROM_K = 1 << 17, 16
"""Elements of a weight matrix, and features for each one that is active, from which bfloat16 is faster."""


def choose_kernel(d_model: int, n_features: int, k: int) -> str:
    """The fastest by `python -m benchmarks.kernels`, on two CPU cores; on CUDA not measured yet.

    bfloat16 pays once the product is large, and while few of the features are candidates. The dense form was slower in
    every shape measured, from 64 x 128 on.

    >>> choose_kernel(768, 24_576, 32), choose_kernel(64, 256, 8)
    ('sparse', 'sparse-fp32')
    """
    return "sparse" if d_model * n_features >= FAST_FROM and n_features >= FAST_FROM_K * k else "sparse-fp32"
