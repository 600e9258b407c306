"""In: a code store. Out: an analysis: frequency, strength, tokens, documents, co-occurrence and examples of every feature.

One Dask task surveys one shard and leaves its tables beside the output; the surveys are merged in a fixed tree; tables and
pairs are then added up tile by tile, a tile being some of the features. What is finished stays there until the whole is,
so that a killed command goes on where it was. Neither the language model nor the activations are needed.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore import paths
from actstore.errors import InputError, OutputExists
from actstore.files import fsync_path, record_bytes
from actstore.folder import Folder
from actstore.open_place import absolute, open_place
from actstore.place import Place
from actstore.reader import Shard
from actstore.schema import PARTS
from pipelines.analysis.arrays import SparseRows, create_arrays, open_arrays
from pipelines.analysis.reader import (
    ANALYSIS_VERSION,
    QUANTILES,
    RECORD,
    Analysis,
    require_new_analysis,
)
from pipelines.analysis.survey.example_texts import Columns, contexts, example_documents
from pipelines.analysis.survey.held_codes import forget_codes
from pipelines.analysis.survey.job import Job, corpus_parts, document_names
from pipelines.analysis.survey.pair_task import add_pairs, count_pairs, heaviest_first, pair_tiles, shard_groups, write_pairs
from pipelines.analysis.survey.parquet_tables import write_exports
from pipelines.analysis.survey.shard_task import sample_shard, survey_shard
from pipelines.analysis.survey.survey import KEPT, TABLES, Extent, Survey, merged
from pipelines.analysis.survey.table_task import merge_tables, table_tiles
from pipelines.codes.code_store import CodeStore
from pipelines.shared.cluster import connect, reduce_groups, reduce_tasks, run_tasks, share
from pipelines.statistics import frequency_bands
from pipelines.statistics.examples import COLUMNS
from pipelines.statistics.tables import N_BINS, quantile_bins
from pipelines.text.tokens import store_tokenizer

KEY, PARTIAL_VERSION = "key.json", 4
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

    What was interrupted is continued: finished tasks' results lie in OUT.partial until the end. `client` is a Dask client
    to use instead of the one the configuration asks for. Raises NotAStore, IncompleteStore, DamagedStore, OutputExists,
    NoSpace; nothing is published then.
    """
    require_place(config.out)
    codes = CodeStore(config.codes)
    work = _work(config.out)
    slots = config.examples + config.random_examples + config.strata
    open_place(config.out).require_space(codes.n_features * slots * (config.before + config.after + 1) * 8, "the examples")
    if client is not None:
        return _analyze(config, codes, work, client)
    with connect(config.scheduler, config.workers, threads=config.threads) as own_client:
        return _analyze(config, codes, work, own_client)


def require_place(out: str | Path) -> None:
    """Raises OutputExists when anything lies at `out`, but for parts of a result that was interrupted in a bucket, where it
    grows in its place."""
    place = open_place(out)
    is_begun = not isinstance(place, Folder) and _work(out).exists(KEY)
    if not is_begun or not all(e in (paths.DATA, paths.TOKENIZER) or e.endswith(".parquet") for e in place.entries()):
        require_new_analysis(out)


def _work(out: str | Path) -> Place:
    return open_place(f"{str(out).rstrip('/')}.partial")


def _analyze(config: AnalyzeConfig, codes: CodeStore, work: Place, client: Any) -> dict[str, Any]:
    with work.lock():
        job = _job(config, codes, work)
        _keep_or_clear(work, config, job)
        shards = [shard for part in PARTS for shard in codes.shards(part)]
        survey: Survey = reduce_tasks(client, "survey", survey_shard, merged, [(job, shard) for shard in shards])
        fires = survey.counts.fires
        features, kept = _merge_tables(job, fires, shards, survey, client)
        pairs = _count_pairs(job, features, survey.rows.documents, shards, client)
        examples = _examples(config, job, shards, kept, client)
        record = _record(config, codes, survey) | pairs
        return _publish(config, job, codes, record, features, survey, examples)


def _job(config: AnalyzeConfig, codes: CodeStore, work: Place) -> Job:
    """What the tasks are told. A folder's result grows inside the work folder; a bucket's, in its place."""
    names = document_names(codes)
    extent = Extent(
        n_features=codes.n_features,
        k=codes.k,
        n_vocabulary=store_tokenizer(codes).backend.get_vocab_size(),
        context=codes.manifest.policy.context,
        n_documents=len(names),
        n_parts=len(corpus_parts(names)[0]),
    )
    return Job(
        codes_url=absolute(codes.url),
        snapshot=codes.snapshot,
        work_url=absolute(work.url),
        result_url=absolute(f"{work.url}/result" if isinstance(work, Folder) else str(config.out)),
        extent=extent,
        n_examples=config.examples,
        n_random=config.random_examples,
        n_strata=config.strata,
        seed=config.seed,
        within=config.within,
        min_together=config.min_together or (1 if codes.n_features <= LARGE_FEATURES else LARGE_MIN_TOGETHER),
    )


def _keep_or_clear(work: Place, config: AnalyzeConfig, job: Job) -> None:
    """Partial results of the same codes and options stay; those of others are removed; anything else is refused."""
    asked = {name: getattr(job, name) for name in ("n_examples", "n_random", "n_strata", "seed", "within", "min_together")}
    key = record_bytes(
        {"format": "actstore-analysis-partial", "version": [ANALYSIS_VERSION, PARTIAL_VERSION]}
        | {"holds": "codes", "snapshot": job.snapshot}
        | asked
    )
    if work.exists(KEY):
        if work.read(KEY) == key:
            return
        _clear(work, open_place(job.result_url))
    elif work.entries() - {"lock", "lease"}:
        raise OutputExists(f"{work}: exists and is not left from an analysis; move it away.")
    work.publish(KEY, key)


def _clear(work: Place, result: Place | None = None) -> None:
    """Remove partial results: the key last, so that what remains after a kill is still known for what it is."""
    if result is not None:
        for name in result.names():
            result.remove(name)
    for name in work.names():
        if name != KEY and not name.startswith("lease/"):
            work.remove(name)
    work.remove(KEY)


def _merge_tables(
    job: Job, fires: NDArray[np.int64], shards: list[Shard], survey: Survey, client: Any
) -> tuple[dict[str, NDArray[Any]], dict[str, Columns]]:
    """Write the tables tile by tile; gives the (F,) columns of every feature, and its kept examples by kind."""
    tiles = table_tiles(fires)
    tasks = [(job, i, start, stop, shards) for i, (start, stop) in enumerate(tiles)]
    facts = run_tasks(client, "tables", merge_tables, tasks)
    found = {name: np.concatenate([fact[name] for fact in facts]) for name in facts[0]}
    features = survey.counts.finalize()
    features["n_documents"] = found["n_documents"]
    features["quantile_bins"] = found["quantile_bins"].astype(np.int16)
    features["burstiness"] = burstiness(found["same_document"], fires, survey.rows.documents)
    first = np.array([start for start, _ in tiles] + [job.extent.n_features])
    for table in TABLES:
        if table != "documents":
            create_arrays(job.result_url, table, {"tile_starts": first})
    kept = {kind: {name: found[f"{kind}/{name}"] for name in COLUMNS} for kind in KEPT}
    return features, kept


def burstiness(
    same_document: NDArray[np.int64], fires: NDArray[np.int64], document_rows: NDArray[np.int64]
) -> NDArray[np.float64]:
    """P(two rows of one document both fire) / P(two rows of the corpus both fire), over ordered pairs of different rows.

    1 where documents make no difference. `same_document` (F,) is the sum over documents of c (c - 1), c firings in it. NaN
    for a feature with fewer than two firings, and when no document has two rows.
    """
    n_rows = int(document_rows.sum())
    pairs_inside = float((document_rows * (document_rows - 1)).sum())
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(
            (same_document / pairs_inside) / (fires.astype(np.float64) * (fires - 1) / (n_rows * (n_rows - 1.0)))
        )


def _count_pairs(
    job: Job, features: dict[str, NDArray[Any]], documents: NDArray[np.int64], shards: list[Shard], client: Any
) -> dict[str, Any]:
    """Write the pairs tile by tile; gives what the record says of them."""
    of_documents = job.within == "document"
    most = features["n_documents"] if of_documents else features["fires"]
    n_total = int((documents > 0).sum()) if of_documents else int(documents.sum())
    tiles = pair_tiles(most)
    groups = shard_groups(len(shards), len(tiles), sum(shard.n_rows for shard in shards))
    if of_documents:
        groups = [range(len(shards))]
    tasks, finish = [], []
    for i in heaviest_first(tiles, features["fires"]):
        start, stop = tiles[i]
        tasks.append([(job, i, start, most[start:stop], [shards[s] for s in group]) for group in groups])
        finish.append((job, i, most, n_total))
    found = reduce_groups(client, "pairs", count_pairs, add_pairs, write_pairs, tasks, finish)
    client.run(forget_codes, on_error="ignore")  # a worker that died holds none
    first = np.array([start for start, _ in tiles] + [job.extent.n_features])
    create_arrays(job.result_url, "cooccurrence", {"tile_starts": first})
    return {
        "within": job.within,
        "min_together": job.min_together,
        "pairs": sum(tile["pairs"] for tile in found),
        "pairs_kept": sum(tile["kept"] for tile in found),
    }


def _examples(
    config: AnalyzeConfig,
    job: Job,
    shards: list[Shard],
    kept: dict[str, Columns],
    client: Any,
) -> dict[str, NDArray[Any]]:
    """(F, slots, ...) arrays of all kept examples with their text: the strongest, one of each stratum, random ones."""
    edges = share(client, stratum_edges(job))
    tasks = [(job, shard, edges) for shard in shards]
    strata = reduce_tasks(client, "strata", sample_shard, merged, tasks).finalize()
    kinds = {"top": kept["top"], "strata": strata, "random": kept["random"]}
    slots = []
    for kind, found in kinds.items():
        place = np.arange(len(found["feature"])) - np.searchsorted(found["feature"], found["feature"])
        slots.append(_slots(config)[kind][0] + (found["stratum"] if kind == "strata" else place))
    found = {name: np.concatenate([columns[name] for columns in kinds.values()]) for name in COLUMNS}
    slot = np.concatenate(slots)
    tokens, values = contexts(job, found, config.before, config.after, client)
    shape = (job.extent.n_features, _slots(config)["random"][1], config.before + 1 + config.after)
    examples = {
        "value": np.zeros(shape[:2], np.float32),
        "document": np.full(shape[:2], -1, np.int64),
        "tokens": np.full(shape, -1, np.int32),
        "values": np.zeros(shape, np.float32),
    }
    columns = (found["value"], example_documents(job.open(), found), tokens, values)
    for name, column in zip(examples, columns, strict=True):
        examples[name][found["feature"], slot] = column
    return examples


def _slots(config: AnalyzeConfig) -> dict[str, tuple[int, int]]:
    """Which places of an example array each kind has."""
    edges = np.cumsum([0, config.examples, config.strata, config.random_examples]).tolist()
    return {kind: (edges[i], edges[i + 1]) for i, kind in enumerate(("top", "strata", "random"))}


def stratum_edges(job: Job) -> NDArray[np.int64]:
    """(F, strata - 1) the bins in which the quantiles 1/strata, 2/strata, ... of each feature's activations lie."""
    asked = tuple((i + 1) / job.n_strata for i in range(job.n_strata - 1))
    tiles = SparseRows(open_arrays(open_place(job.result_url), "r"), "bins", N_BINS).tiles()
    return np.concatenate([quantile_bins(counts, asked) for _, counts in tiles])


def _record(config: AnalyzeConfig, codes: CodeStore, survey: Survey) -> dict[str, Any]:
    policy = codes.manifest.policy
    return {
        "format": "actstore-analysis",
        "version": ANALYSIS_VERSION,
        **codes.manifest.source,  # first: it has the activation store's `snapshot`
        "codes_id": codes.store_id,
        "snapshot": codes.snapshot,
        "codes": str(config.codes),
        "run": codes.manifest.provenance["run"],
        "store": codes.manifest.provenance["store"],
        "model": codes.manifest.provenance["model"],
        "corpus": codes.manifest.corpus.spec,
        "n_rows": survey.counts.n_rows,
        "n_features": codes.n_features,
        "k": codes.k,
        "bands": frequency_bands(survey.counts.fires, survey.counts.n_rows),
        "focus": config.before,
        "example_slots": _slots(config),
        "quantiles": list(QUANTILES),
        "seed": config.seed,
        "bos_token_id": policy.bos_token_id,
        "separator_token_id": policy.separator_token_id,
    }


def _publish(
    config: AnalyzeConfig,
    job: Job,
    codes: CodeStore,
    record: dict[str, Any],
    features: dict[str, NDArray[Any]],
    survey: Survey,
    examples: dict[str, NDArray[Any]],
) -> dict[str, Any]:
    """Write what is left, flush it, and make it an analysis: by a rename, or in a bucket by its record."""
    result = open_place(job.result_url)
    names = document_names(codes)
    create_arrays(job.result_url, "features", features)
    create_arrays(job.result_url, "rows", survey.rows.finalize())
    create_arrays(job.result_url, "examples", examples, chunk_bytes=1 << 17)
    create_arrays(job.result_url, "documents", {"name": np.frombuffer("\n".join(names).encode(), np.uint8)})
    create_arrays(job.result_url, "parts", {"name": np.frombuffer("\n".join(corpus_parts(names)[0]).encode(), np.uint8)})
    for name, data in codes.tokenizer_files().items():
        result.publish(f"{paths.TOKENIZER}/{name}", data)
    finished = Analysis(result.url, record)
    create_arrays(job.result_url, "joint", joint(finished))
    write_exports(finished, result, job.work_url)
    result.publish(RECORD, (json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())
    if isinstance(result, Folder):
        out = Path(config.out)
        for path in result.path.rglob("*"):
            fsync_path(path)
        os.rename(result.path, out)
        fsync_path(out.absolute().parent)
        shutil.rmtree(result.path.parent, ignore_errors=True)
    else:
        _clear(open_place(job.work_url))
    return record


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
        together[i, i] = (
            analysis.n_documents[feature] if analysis.record["within"] == "document" else analysis.fires[feature]
        )
    return {"features": features, "together": together}
