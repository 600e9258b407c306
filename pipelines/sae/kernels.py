"""The kernels of a training step, and a fixed rule that chooses one, so that a run can be repeated.

`sparse`: the encoder's product and the search for active features in bfloat16, everything else exact and sparse.
`sparse-fp32`: the same with the product in full precision. `dense`: plain dense operators, for small dictionaries.
"""

from __future__ import annotations

KERNELS = ("sparse", "sparse-fp32", "dense")
FAST_FROM, FAST_FROM_K = 1 << 17, 16
"""bfloat16 is faster from this many elements of a weight matrix, and this many features per active one (F / k)."""


def choose_kernel(d_model: int, n_features: int, k: int) -> str:
    """The fastest kernel by `python -m benchmarks.kernels`, on two CPU cores; on CUDA not measured yet.

    bfloat16 is faster where the product is large and few of the features are candidates. The dense kernel was slower in
    every shape measured, from 64 x 128 on.

    >>> choose_kernel(768, 24_576, 32), choose_kernel(64, 256, 8)
    ('sparse', 'sparse-fp32')
    """
    return "sparse" if d_model * n_features >= FAST_FROM and n_features >= FAST_FROM_K * k else "sparse-fp32"
