"""Statistics of codes as mergeable values. A new one is a file of `of_codes/`, and needs no line anywhere else.

The same object serves a loop over shards, a Dask tree and a test. Counts are exact integers and do not depend on
how the work was split; sums are float64, and equal for equal trees of merges.
"""

from pipelines.statistics.bands import BANDS, band_numbers, frequency_bands
from pipelines.statistics.block import CodeBlock
from pipelines.statistics.firing_table import FiringTable
from pipelines.statistics.kept_firings import SampledExamples
from pipelines.statistics.registry import statistics
from pipelines.statistics.statistic import Extent

__all__ = [
    "BANDS",
    "CodeBlock",
    "Extent",
    "FiringTable",
    "SampledExamples",
    "band_numbers",
    "frequency_bands",
    "statistics",
]
