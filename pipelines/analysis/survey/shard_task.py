"""What a worker does with one shard: survey it once, and sample its firings by strength."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore.open_place import open_place
from actstore.reader import Shard
from pipelines.analysis.arrays import SparseRows
from pipelines.analysis.stored_arrays import StoredArrays
from pipelines.analysis.survey.held_codes import countable
from pipelines.analysis.survey.job import Job, blocks, shard_name
from pipelines.analysis.survey.partial_results import Bundle, publish_bundle
from pipelines.analysis.survey.survey import Survey
from pipelines.statistics import SampledExamples
from pipelines.statistics.pairs import marked_codes
from pipelines.statistics.value_bins import N_BINS, quantile_bins

BLOCK_ROWS = 32_768


def survey_shard(job: Job, shard: Shard) -> Survey:
    """The dense statistics of one shard; tiled statistics are left in the work folder for `merge_tables`. A finished result
    is read from the work folder."""
    work = open_place(job.work_url)
    name = shard_name(shard)
    if work.exists(name):
        return Survey(job.extent).load_dense(Bundle(work, name).read)
    survey, codes = _read_once(job, shard)
    publish_bundle(work, name, survey.take_arrays() | countable(codes, job.extent.n_features))
    return survey


def _read_once(job: Job, shard: Shard) -> tuple[Survey, NDArray[Any]]:
    """The survey of a shard, and its marked codes (n, k)."""
    survey, codes = Survey(job.extent), []
    for block in blocks(job, shard, BLOCK_ROWS):
        survey.update(block)
        codes.append(marked_codes(block.indices, block.values > 0, block.n_features))
    return survey, np.concatenate(codes)


def sample_shard(job: Job, shard: Shard, edges: NDArray[np.int64]) -> SampledExamples:
    """One random firing of each stratum of each feature's strength, of one shard."""
    sample = SampledExamples(1, job.extent.seed + 1, edges)
    for block in blocks(job, shard, BLOCK_ROWS):
        sample.update(block)
    sample.edges = None  # known to the client, and as large as the sample
    return sample


def stratum_edges(job: Job) -> NDArray[np.int64]:
    """(F, strata - 1) the bins in which the quantiles 1/strata, 2/strata, ... of each feature's activations lie."""
    asked = tuple((i + 1) / job.n_strata for i in range(job.n_strata - 1))
    tiles = SparseRows(StoredArrays(open_place(job.result_url)), "bins", job.extent.n_features, N_BINS).tiles()
    return np.concatenate([quantile_bins(counts, asked) for _, counts in tiles])
