"""A worker's memory does not grow with the number of its tasks: what a task frees goes back to the system after it."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import psutil
import pytest

from pipelines.cluster import connect

BLOCKS, BLOCK_BYTES = 600, 256 << 10
_pinned: list[Any] = []


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


def fragment() -> None:
    """Fill many blocks, keep a small one behind each hundredth, and free the rest: the heap's end stays in use."""
    blocks = []
    for i in range(BLOCKS):
        blocks.append(np.ones(BLOCK_BYTES, np.uint8))
        if i % 100 == 99:
            _pinned.append(np.ones(2000, np.uint8))
    del blocks


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc's memory is looked after")
def test_what_a_task_freed_is_not_kept_after_it() -> None:
    with connect(None, 1) as client:
        (before,) = client.run(resident).values()
        client.submit(fragment, pure=False).result()
        client.submit(int, pure=False).result()  # the memory is given back before the next task begins
        (after,) = client.run(resident).values()
    assert after - before < BLOCKS * BLOCK_BYTES / 4
