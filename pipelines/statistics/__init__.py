"""Statistics of codes as mergeable values: `update(block)`, `merge(other)`, `finalize()`.

The same object serves a loop over shards, a Dask tree and a test. Counts are exact integers and do not depend on
how the work was split; sums are float64, and equal for equal trees of merges.
"""

from pipelines.statistics.block import CodeBlock
from pipelines.statistics.counts import BANDS, FeatureCounts, RowCounts, frequency_bands
from pipelines.statistics.examples import SampledExamples, TopExamples
from pipelines.statistics.tables import FiringTable

__all__ = [
    "BANDS",
    "CodeBlock",
    "FeatureCounts",
    "FiringTable",
    "RowCounts",
    "SampledExamples",
    "TopExamples",
    "frequency_bands",
]
