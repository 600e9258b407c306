"""In: a code store. Out: an analysis: frequency, strength, tokens, documents, co-occurrence and examples of every feature.

One Dask task surveys one shard and leaves its tables beside the output; the surveys are merged in a fixed tree; tables and
pairs are then added up tile by tile, a tile being some of the features. What is finished stays there until the whole is,
so that a killed command goes on where it was. Neither the language model nor the activations are needed.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore import paths
from actstore.errors import InputError
from actstore.files import fsync_path, json_bytes
from actstore.folder import Folder
from actstore.open_place import absolute, open_place
from actstore.place import Place
from actstore.reader import Shard
from actstore.schema import PARTS
from actstore.sealed_folder import seal_folder
from pipelines.analysis.arrays import create_arrays
from pipelines.analysis.reader import EXAMPLE_KINDS, RECORD, Analysis
from pipelines.analysis.record import KIND, AnalysisRecord
from pipelines.analysis.survey.example_texts import EXAMPLES, contexts, example_arrays, in_slots
from pipelines.analysis.survey.held_codes import forget_codes
from pipelines.analysis.survey.job import Job, corpus_parts, document_names
from pipelines.analysis.survey.pair_task import add_pairs, count_pairs, heaviest_first, pair_tiles, shard_groups, write_pairs
from pipelines.analysis.survey.parquet_tables import write_exports
from pipelines.analysis.survey.shard_task import sample_shard, stratum_edges, survey_shard
from pipelines.analysis.survey.survey import Survey, facts_of, merged
from pipelines.analysis.survey.table_task import merge_tables, table_tiles
from pipelines.analysis.survey.work_folder import clear, keep_or_clear, require_place, work_place
from pipelines.codes.code_store import CodeStore
from pipelines.shared.cluster import connect, reduce_groups, reduce_tasks, run_tasks, share
from pipelines.statistics import Extent, frequency_bands
from pipelines.statistics.of_codes.bins import QUANTILES
from pipelines.statistics.of_codes.counts import FeatureCounts
from pipelines.statistics.statistic import Arrays
from pipelines.text.tokenizer_files import store_tokenizer

EXAMPLE_CHUNK_BYTES = 1 << 17
JOINT = 20
LARGE_FEATURES, LARGE_MIN_TOGETHER = 32_768, 3
MOST_REACH = 64


@dataclass(frozen=True)
class AnalyzeConfig:
    """What `analyze` is asked for; the names are the command's options."""

    codes: str | Path
    out: str | Path
    examples: int = 8
    random_examples: int = 5
    strata: int = 5
    before: int = 24
    after: int = 8
    within: str = "row"
    min_together: int = 0
    seed: int = 0
    workers: int = 2
    threads: bool = False
    scheduler: str | None = None

    def __post_init__(self) -> None:
        if self.examples < 1 or self.before < 0 or self.after < 0:
            raise InputError(
                f"examples {self.examples}, before {self.before}, after {self.after}: need at least 1, 0 and 0."
            )
        if self.random_examples < 0 or self.strata < 1 or self.min_together < 0:
            raise InputError(
                f"random-examples {self.random_examples}, strata {self.strata}, min-together {self.min_together}: "
                "need at least 0, 1 and 0."
            )
        is_reach = self.within.isdecimal() and 1 <= int(self.within) <= MOST_REACH
        if self.within not in ("row", "document") and not is_reach:
            raise InputError(f"within {self.within!r}: choose row, document, or a number of tokens from 1 to {MOST_REACH}.")


def analyze(config: AnalyzeConfig, client: Any = None) -> dict[str, Any]:
    """Survey every row of a code store and publish the analysis; returns its record.

    An interrupted analysis is continued: finished tasks' results lie in OUT.partial until the end. `client` is a Dask client
    to use instead of the one the configuration asks for. Raises NotAStore, IncompleteStore, DamagedStore, OutputExists,
    NoSpace; nothing is published then.
    """
    require_place(config.out)
    codes = CodeStore(config.codes)
    work = work_place(config.out)
    slots = config.examples + config.random_examples + config.strata
    open_place(config.out).require_space(codes.n_features * slots * (config.before + config.after + 1) * 8, "the examples")
    if client is not None:
        return _analyze(config, codes, work, client)
    with connect(config.scheduler, config.workers, threads=config.threads) as own_client:
        return _analyze(config, codes, work, own_client)


def _analyze(config: AnalyzeConfig, codes: CodeStore, work: Place, client: Any) -> dict[str, Any]:
    with work.lock():
        job = _job(config, codes, work)
        keep_or_clear(work, job)
        shards = [shard for part in PARTS for shard in codes.shards(part)]
        survey: Survey = reduce_tasks(client, "survey", survey_shard, merged, [(job, shard) for shard in shards])
        counts, document_rows = survey["counts"], survey["rows"].documents
        facts = _merge_tables(job, counts.fires, shards, client)
        arrays = _whole_arrays(survey, facts)
        pairs = _count_pairs(job, counts.fires, arrays["features/n_documents"], document_rows, shards, client)
        examples = _examples(config, job, shards, facts, client)
        record = _record(config, job, codes, counts, pairs)
        return _publish(config, job, codes, record, arrays | examples)


def _job(config: AnalyzeConfig, codes: CodeStore, work: Place) -> Job:
    """The job that every task gets. In a folder the result grows inside the work folder, in a bucket at its final place."""
    names = document_names(codes)
    extent = Extent(
        n_features=codes.n_features,
        k=codes.k,
        n_vocabulary=store_tokenizer(codes).n_vocabulary,
        context=codes.manifest.policy.context,
        n_documents=len(names),
        n_parts=len(corpus_parts(names)[0]),
        n_examples=config.examples,
        n_random=config.random_examples,
        seed=config.seed,
    )
    return Job(
        codes_url=absolute(codes.url),
        snapshot=codes.snapshot,
        work_url=absolute(work.url),
        result_url=absolute(f"{work.url}/result" if isinstance(work, Folder) else str(config.out)),
        extent=extent,
        n_strata=config.strata,
        within=config.within,
        min_together=config.min_together or (1 if codes.n_features <= LARGE_FEATURES else LARGE_MIN_TOGETHER),
    )


def _merge_tables(job: Job, fires: NDArray[np.int64], shards: list[Shard], client: Any) -> Arrays:
    """Write the tiled statistics' tables; returns their facts of all features, named STATISTIC/FACT."""
    tiles = table_tiles(fires)
    tasks = [(job, i, start, stop, shards) for i, (start, stop) in enumerate(tiles)]
    said = run_tasks(client, "tables", merge_tables, tasks)
    for name, one in Survey(job.extent).tiled.items():
        if one.writes_table:
            _write_tile_starts(job, name, tiles)
    return {fact: np.concatenate([tile[fact] for tile in said]) for fact in said[0]}


def _write_tile_starts(job: Job, table: str, tiles: list[tuple[int, int]]) -> None:
    first = np.array([start for start, _ in tiles] + [job.extent.n_features])
    create_arrays(job.result_url, table, {"tile_starts": first})


def _whole_arrays(survey: Survey, facts: Arrays) -> Arrays:
    """Every statistic's arrays that are written whole, by full name."""
    arrays: Arrays = {}
    for one in survey.dense.values():
        arrays |= one.finalize()
    for name, tiled in survey.tiled.items():
        arrays |= tiled.feature_arrays(facts_of(name, facts), survey.dense)
    return arrays


def _count_pairs(
    job: Job,
    fires: NDArray[np.int64],
    n_documents: NDArray[np.int64],
    document_rows: NDArray[np.int64],
    shards: list[Shard],
    client: Any,
) -> dict[str, Any]:
    """Write the pairs tile by tile; returns the pairs' fields of the record."""
    of_documents = job.within == "document"
    most = n_documents if of_documents else fires
    n_total = int((document_rows > 0).sum()) if of_documents else int(document_rows.sum())
    tiles = pair_tiles(most)
    groups = shard_groups(len(shards), len(tiles), sum(shard.n_rows for shard in shards))
    if of_documents:
        groups = [range(len(shards))]
    tasks, finish = [], []
    for i in heaviest_first(tiles, fires):
        start, stop = tiles[i]
        tasks.append([(job, i, start, most[start:stop], [shards[s] for s in group]) for group in groups])
        finish.append((job, i, most, n_total))
    written = reduce_groups(client, "pairs", count_pairs, add_pairs, write_pairs, tasks, finish)
    client.run(forget_codes, on_error="ignore")  # a worker that died holds none
    _write_tile_starts(job, "cooccurrence", tiles)
    return {
        "within": job.within,
        "min_together": job.min_together,
        "pairs": sum(tile["pairs"] for tile in written),
        "pairs_kept": sum(tile["kept"] for tile in written),
    }


def _examples(config: AnalyzeConfig, job: Job, shards: list[Shard], facts: Arrays, client: Any) -> Arrays:
    """The arrays of all kept firings with their text: the strongest, one of each stratum, random ones."""
    edges = share(client, stratum_edges(job))
    tasks = [(job, shard, edges) for shard in shards]
    strata: Arrays = reduce_tasks(client, "strata", sample_shard, merged, tasks).finalize()
    kinds = {"top": facts_of("top", facts), "strata": strata, "random": facts_of("random", facts)}
    columns, slot = in_slots(kinds, _slots(config))
    tokens, values = contexts(job, columns, config.before, config.after, client)
    return example_arrays(job, columns, slot, _slots(config)["random"][1], tokens, values)


def _slots(config: AnalyzeConfig) -> dict[str, tuple[int, int]]:
    """The places of an example array that each kind has, [first, last)."""
    edges = np.cumsum([0, config.examples, config.strata, config.random_examples]).tolist()
    return {kind: (edges[i], edges[i + 1]) for i, kind in enumerate(EXAMPLE_KINDS)}


def _record(
    config: AnalyzeConfig, job: Job, codes: CodeStore, counts: FeatureCounts, pairs: dict[str, Any]
) -> AnalysisRecord:
    policy, provenance, source, extent = (
        codes.manifest.policy, codes.manifest.provenance, codes.manifest.source, job.extent,
    )  # fmt: skip
    return AnalysisRecord(
        codes_id=codes.store_id,
        snapshot=codes.snapshot,
        **{name: source[name] for name in ("store_id", "run_id", "site")},
        codes=str(config.codes),
        **{name: provenance[name] for name in ("run", "store", "model")},
        corpus=codes.manifest.corpus.spec,
        n_rows=counts.n_rows,
        n_features=codes.n_features,
        k=codes.k,
        **{name: getattr(extent, name) for name in ("n_vocabulary", "context", "n_documents", "n_parts")},
        bands=frequency_bands(counts.fires, counts.n_rows),
        focus=config.before,
        example_width=config.before + 1 + config.after,
        example_slots=_slots(config),
        quantiles=list(QUANTILES),
        seed=config.seed,
        bos_token_id=policy.bos_token_id,
        separator_token_id=policy.separator_token_id,
        kernel=source.get("kernel"),
        **pairs,
    )


def _publish(config: AnalyzeConfig, job: Job, codes: CodeStore, record: AnalysisRecord, arrays: Arrays) -> dict[str, Any]:
    """Write the arrays by their full names, and the rest; the seal makes it an analysis. A folder appears by a rename."""
    result = open_place(job.result_url)
    names = document_names(codes)
    for name, array in arrays.items():
        group, _, own = name.rpartition("/")
        create_arrays(job.result_url, group, {own: array}, EXAMPLE_CHUNK_BYTES if group == EXAMPLES else 0)
    create_arrays(job.result_url, "documents", {"name": np.frombuffer("\n".join(names).encode(), np.uint8)})
    create_arrays(job.result_url, "parts", {"name": np.frombuffer("\n".join(corpus_parts(names)[0]).encode(), np.uint8)})
    for name, data in codes.tokenizer_files().items():
        result.publish(f"{paths.TOKENIZER}/{name}", data)
    finished = Analysis(result.url, record)
    create_arrays(job.result_url, "joint", joint(finished))
    write_exports(finished, result, job.work_url)
    value = record.value()
    result.publish(RECORD, json_bytes(value))
    seal_folder(result, KIND, RECORD, whole=(paths.DATA, paths.TOKENIZER))
    if isinstance(result, Folder):
        out = Path(config.out)
        for path in result.path.rglob("*"):
            fsync_path(path)
        require_place(out)  # something may have come to lie there meanwhile
        os.rename(result.path, out)
        fsync_path(out.absolute().parent)
        shutil.rmtree(result.path.parent, ignore_errors=True)
    else:
        clear(open_place(job.work_url))
    return value


def joint(analysis: Analysis) -> dict[str, NDArray[Any]]:
    """The most frequent features, and how often each two of them are together, as kept; firings on the diagonal."""
    features = analysis.sorted_features("frequency")[:JOINT]
    features = features[analysis.fires[features] > 0]
    together = np.zeros((len(features), len(features)), np.int64)
    for i, feature in enumerate(features.tolist()):
        columns, counts = analysis.pairs.row(feature)
        row = np.zeros(analysis.n_features, np.int64)
        row[columns] = counts
        together[i] = row[features]
        together[i, i] = analysis.n_documents[feature] if analysis.record.within == "document" else analysis.fires[feature]
    return {"features": features, "together": together}
