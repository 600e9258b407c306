"""A worker's task for one tile of features: add up the results of all shards, and write the tile's tables."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from actstore.open_place import open_place
from actstore.reader import Shard
from pipelines.analysis.arrays import create_arrays
from pipelines.analysis.survey.job import Job, shard_name
from pipelines.analysis.survey.partial_results import Bundle, publish_bundle
from pipelines.analysis.survey.survey import Survey, tiled_part
from pipelines.statistics.statistic import Arrays

TILE_FIRINGS = 4_000_000
"""Most firings of a tile's features (a feature alone may have more), which bounds a task's memory."""


def table_tiles(fires: NDArray[np.int64], tile_firings: int = TILE_FIRINGS) -> list[tuple[int, int]]:
    """Features [start, stop) of each tile, all features in turn.

    >>> table_tiles(np.array([5, 1, 1, 9, 0, 2]), 6)
    [(0, 2), (2, 3), (3, 4), (4, 6)]
    """
    tiles, start, held = [], 0, 0
    for feature, n in enumerate(fires.tolist()):
        if feature > start and held + n > tile_firings:
            tiles.append((start, feature))
            start, held = feature, 0
        held += n
    return [*tiles, (start, len(fires))]


def merge_tables(job: Job, tile: int, start: int, stop: int, shards: list[Shard]) -> Arrays:
    """Write the tables of the features [start, stop); returns what the tiled statistics say of them, as STATISTIC/FACT.

    One statistic after another is added up and forgotten.
    """
    work = open_place(job.work_url)
    name, features = f"tables/{tile:06d}", slice(start, stop)
    if not work.exists(name):
        bundles = [Bundle(work, shard_name(shard)) for shard in shards]
        said: Arrays = {}
        tiled = Survey(job.extent).tiled
        while tiled:
            statistic, one = tiled.popitem()
            one.add(features, (tiled_part(statistic, type(one), features, bundle.read) for bundle in bundles))
            arrays, facts = one.tile(features)
            if one.writes_table:
                create_arrays(job.result_url, f"{statistic}/tiles/{tile:06d}", arrays)
            said |= {f"{statistic}/{fact}": values for fact, values in facts.items()}
        publish_bundle(work, name, said)
    bundle = Bundle(work, name)
    return {fact: bundle.read(fact) for fact in bundle.names}
