"""The place beside an analysis where partial results lie until the analysis is whole: what they belong to, and when they are
removed."""

from __future__ import annotations

from pathlib import Path

from actstore import paths
from actstore.errors import OutputExists
from actstore.files import record_bytes
from actstore.folder import Folder
from actstore.open_place import open_place
from actstore.place import Place
from pipelines.analysis.reader import ANALYSIS_VERSION, RECORD, require_new_analysis
from pipelines.analysis.survey.job import Job
from pipelines.statistics import statistics

KEY, PARTIAL_VERSION = "key.json", 5


def work_place(out: str | Path) -> Place:
    return open_place(f"{str(out).rstrip('/')}.partial")


def require_place(out: str | Path) -> None:
    """Raises OutputExists when anything lies at `out`, but for parts of a result that was interrupted in a bucket, where it
    grows in its place."""
    place = open_place(out)
    is_begun = not isinstance(place, Folder) and work_place(out).exists(KEY)
    ours = (paths.DATA, paths.TOKENIZER, RECORD)
    if not is_begun or not all(name in ours or name.endswith(".parquet") for name in place.entries()):
        require_new_analysis(out)


def keep_or_clear(work: Place, job: Job) -> None:
    """Keep partial results of the same codes, options and statistics, remove those of others, refuse anything else."""
    key = record_bytes(
        {"format": "actstore-analysis-partial", "version": [ANALYSIS_VERSION, PARTIAL_VERSION]}
        | {"holds": "codes", "snapshot": job.snapshot, "statistics": list(statistics())}
        | {name: getattr(job.extent, name) for name in ("n_examples", "n_random", "seed")}
        | {name: getattr(job, name) for name in ("n_strata", "within", "min_together")}
    )
    if work.exists(KEY):
        if work.read(KEY) == key:
            return
        clear(work, open_place(job.result_url))
    elif work.entries() - {"lock", "lease"}:
        raise OutputExists(f"{work}: exists and is not left from an analysis; move it away.")
    work.publish(KEY, key)


def clear(work: Place, result: Place | None = None) -> None:
    """Remove partial results, the key last: what a kill leaves is then still known as partial results."""
    if result is not None:
        for name in result.names():
            result.remove(name)
    for name in work.names():
        if name != KEY and not name.startswith("lease/"):
            work.remove(name)
    work.remove(KEY)
