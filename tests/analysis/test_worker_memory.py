"""A worker's memory does not grow with the number of its tasks, and tasks that free little find its pages there again."""

from __future__ import annotations

import resource
import sys
from typing import Any

import numpy as np
import psutil
import pytest

from pipelines.shared.cluster import connect

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


def faults_of_a_small_task() -> int:
    """Pages that were new to the process while it filled 16 MiB, which it then frees."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [np.ones(1 << 20, np.uint8) for _ in range(16)]
    after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    del blocks
    return after - before


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc's memory is looked after")
def test_the_next_small_task_finds_the_pages_that_the_last_one_freed() -> None:
    with connect(None, 1) as client:
        first, *later = (client.submit(faults_of_a_small_task, pure=False).result() for _ in range(4))
    assert first > 2000, "16 MiB of 4 KiB pages"
    assert min(later) < first / 10
