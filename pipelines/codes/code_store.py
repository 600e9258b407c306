"""A code store opened for reading: the k largest codes of every row, in (window, position) order inside each shard."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from actstore import paths
from actstore.errors import IdentityMismatch
from actstore.reader import Shard, Store


class CodeStore(Store):
    """A store of codes: `codes/index` and `codes/value`, (rows, k) each; a value of 0 is no firing."""

    kind = "codes"

    @property
    def n_features(self) -> int:
        n_features: int = self.manifest.source["n_features"]
        return n_features

    @property
    def k(self) -> int:
        return self.manifest.array(paths.CODE_INDEX).width


def read_codes(
    codes: CodeStore, shard: Shard, start: int = 0, stop: int | None = None
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """(indices, values), each (rows, k), of rows [start, stop) of a shard; float32, however they are kept."""
    indices, values = (codes.read(shard, name, start, stop) for name in paths.CODES)
    return indices.astype(np.int64), values.astype(np.float32, copy=False)


def open_run_codes(codes: str, run_id: str, run: object, remedy: str = "pass the codes of this run.") -> CodeStore:
    """A code store. Raises IdentityMismatch, which ends with the remedy, when it holds the codes of another run."""
    opened = CodeStore(codes)
    if opened.manifest.source["run_id"] != run_id:
        raise IdentityMismatch(
            f"{codes}: holds codes of run {opened.manifest.source['run_id']}, {run} is {run_id}; {remedy}"
        )
    return opened


@lru_cache(maxsize=2)
def open_codes(url: str, snapshot: str) -> CodeStore:
    """A finished code store, opened once a process: what a worker's tasks share.

    Raises IdentityMismatch when this process sees another snapshot there than `snapshot`.
    """
    return CodeStore(url, snapshot=snapshot)
