"""Random firings of each feature, to be looked at."""

from __future__ import annotations

from pipelines.statistics.kept_firings import SampledExamples


class RandomExamples(SampledExamples):
    """Each feature's `n_random` firings of the smallest hash: a uniform sample of all."""

    name = "random"
