"""A sample of a store's training rows, and figures of an SAE's codes on a sample."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actstore import paths
from actstore.plan import SAMPLE, permutation
from actstore.reader import ActivationStore
from pipelines.sae.base import Sae

SAMPLE_ROWS = 32_768
PART_ROWS = 4096
"""Rows encoded at a time."""


def sample_rows(store: ActivationStore, site: str, n_rows: int, seed: int) -> NDArray[np.float32]:
    """`n_rows` training rows (n, d_model), from whole chunks drawn over the whole store; all rows if there are fewer."""
    chunks = [(shard, chunk) for shard in store.shards() for chunk in range(shard.n_chunks)]
    read: list[NDArray[np.float32]] = []
    for index in permutation(len(chunks), seed, SAMPLE):
        if sum(map(len, read)) >= n_rows:
            break
        read.append(store.read_chunk(chunks[index][0], paths.acts(site), chunks[index][1]))
    return np.concatenate(read)[:n_rows]


@torch.no_grad()
def usual_code_width(sae: Sae, rows: Tensor) -> int:
    """How many codes per row to keep where the architecture sets no limit: 1.25 times the 99.9 % quantile over sample rows
    (n, d_model)."""
    counts = torch.cat([sae.codes(part).active.counts for part in rows.split(PART_ROWS)])
    return min(sae.n_features, max(1, math.ceil(1.25 * float(torch.quantile(counts.double(), 0.999)))))


@torch.no_grad()
def n_silent(sae: Sae, rows: Tensor) -> int:
    """How many features fire in no row of (n, d_model)."""
    fired = torch.zeros(sae.n_features, dtype=torch.bool, device=rows.device)
    for part in rows.split(PART_ROWS):
        codes = sae.codes(part)
        fired[codes.active.features[codes.values > 0]] = True
    return int((~fired).sum())
