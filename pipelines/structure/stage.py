"""In: an analysis, its code store. Out: pairs, communities and implications beyond the null, chosen on one half, tested on another.

The null is drawn in Dask tasks ([STRUCTURE.md] says how); choosing takes seconds and happens here. Neither the language
model nor the activations are needed; a run adds what its decoder directions say.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from actstore.errors import IdentityMismatch, InputError, OutputExists
from actstore.files import fsync_path, publish_bytes, publish_json, require_free_space
from pipelines.analysis import Analysis
from pipelines.cluster import connect
from pipelines.code_store import CodeStore
from pipelines.graph import Communities
from pipelines.null import Pairs, candidates
from pipelines.significance import independence_fit, judge
from pipelines.structure import choose
from pipelines.structure.effects import effect_columns, lift_intervals
from pipelines.structure.page import findings_page
from pipelines.structure.rounds import (
    MIN_EXPECTATION,
    NullDraw,
    Observed,
    Q,
    attracted,
    cosine_correlation,
    judge_draws,
    observe,
)
from pipelines.structure.sample import Sample, sample_halves
from pipelines.structure.show import Naming, community_facts, pair_facts
from pipelines.tokens import store_tokenizer

STRUCTURE_VERSION = 1
FOLDER, RECORD, PAGE, PAIRS, COMMUNITIES = (
    "structure",
    "structure.json",
    "findings.md",
    "pairs.parquet",
    "communities.parquet",
)
NULL_DRAWS = 20
"""Further draws that are judged as if they were observed."""
MIN_DRAWS = 20
MAX_PAIRS = 50_000
"""The strongest chosen pairs, so many of either kind, are written with effect sizes and intervals."""


@dataclass(frozen=True)
class StructureConfig:
    """What `structure` is asked for; the names are the command's options."""

    analysis: Path
    codes: str | None = None
    run: Path | None = None
    out: Path | None = None
    draws: int = 100
    rows: int = 200_000
    block_rows: int = 1024
    min_lift: float = 2.0
    seed: int = 0
    workers: int = 2
    scheduler: str | None = None

    def __post_init__(self) -> None:
        if self.draws < MIN_DRAWS:
            raise InputError(f"draws {self.draws}: a null needs at least {MIN_DRAWS}; 100 stand behind a claim.")
        if self.rows < 1 or self.block_rows < 2:
            raise InputError(f"rows {self.rows}, block_rows {self.block_rows}: need at least 1 and 2.")
        if not self.min_lift > 1:
            raise InputError(f"min_lift {self.min_lift}: a pair fires together more often than in the null above 1.")

    @property
    def folder(self) -> Path:
        return self.analysis / FOLDER if self.out is None else self.out


def structure(config: StructureConfig, client: Any = None) -> dict[str, Any]:
    """Seek structure and publish it; returns what `structure.json` holds.

    `client` is a Dask client to use instead of the one the configuration asks for. Raises NotAStore, IdentityMismatch,
    InputError, OutputExists, NoSpace; nothing is published then.
    """
    if config.folder.exists():
        raise OutputExists(f"{config.folder}: exists; move it away, or choose another --out.")
    analysis = Analysis(config.analysis)
    codes = CodeStore(analysis.record["codes"] if config.codes is None else config.codes)
    if (codes.store_id, codes.snapshot) != (analysis.record["codes_id"], analysis.record["snapshot"]):
        raise IdentityMismatch(
            f"{codes.url}: holds codes {codes.store_id}/{codes.snapshot}, {config.analysis} was made from "
            f"{analysis.record['codes_id']}/{analysis.record['snapshot']}; name the right ones with --codes."
        )
    directions = None if config.run is None else _directions(config.run, analysis)
    require_free_space(config.folder, 2 * MAX_PAIRS * 300, "the structure")
    if client is not None:
        return _structure(config, analysis, codes, directions, client)
    with connect(config.scheduler, config.workers) as own_client:
        return _structure(config, analysis, codes, directions, own_client)


def _structure(
    config: StructureConfig, analysis: Analysis, codes: CodeStore, directions: NDArray[np.float32] | None, client: Any
) -> dict[str, Any]:
    samples = sample_halves(codes, config.rows, config.block_rows, config.seed, client)
    pairs = candidates(samples[0].table, 0.8 * MIN_EXPECTATION)
    cosines = None if directions is None else _cosines(directions, pairs)
    key = (config.seed, 0)
    no_groups = np.full(len(pairs), -1)
    first = observe(client, "half 1", samples[0].table, pairs, key, config.draws, no_groups)
    edges = attracted(first.judged, config.min_lift)
    further = range(config.draws, config.draws + NULL_DRAWS)
    null_draws = judge_draws(client, first, pairs, key, further, config.min_lift, len(edges), cosines)
    found = choose.find_communities(first, pairs, config.min_lift, config.seed)
    groups = choose.pair_groups(found, pairs)
    second = observe(client, "half 2", samples[1].table, pairs, (config.seed, 1), config.draws, groups)
    naming = Naming(analysis, codes, store_tokenizer(codes), samples[1])
    record = {
        "format": "actstore-structure",
        "version": STRUCTURE_VERSION,
        **{name: analysis.record[name] for name in ("codes_id", "snapshot", "run_id", "site", "corpus", "model")},
        "settings": {
            **{name: getattr(config, name) for name in ("draws", "rows", "block_rows", "min_lift", "seed")},
            "q": Q,
            "min_expectation": MIN_EXPECTATION,
            "null_draws_judged": NULL_DRAWS,
            "run": None if config.run is None else str(config.run),
        },
        "sample": [_sample_facts(sample) for sample in samples],
    }
    tables: dict[str, dict[str, Any]] = {}
    record["pairs"], tables[PAIRS] = _pairs(config, pairs, first, second, samples[1], null_draws, cosines, naming)
    record["communities"], tables[COMMUNITIES] = _communities(
        config, pairs, found, groups, first, second, samples[1], null_draws, naming
    )
    record["implications"] = _implications(config, pairs, first, second, samples[1], naming)
    record["duplicates"] = _duplicates(config, pairs, first, second, cosines, naming)
    record["hubs"] = _hubs(config, pairs, first, second, naming)
    record["cosine"] = _cosine(first, second, cosines, null_draws)
    _publish(config.folder, record, tables)
    return record


def _directions(run: Path, analysis: Analysis) -> NDArray[np.float32]:
    """(F, d) unit decoder directions. Raises IdentityMismatch for another run than the analysis is of."""
    from pipelines.sae.checkpoint import load_run

    sae, record = load_run(run)
    if record.run_id != analysis.record["run_id"]:
        raise IdentityMismatch(
            f"{run}: is run {record.run_id}, {analysis.path} was made from {analysis.record['run_id']}; pass that one."
        )
    rows = sae.W_dec.numpy().astype(np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _cosines(directions: NDArray[np.float32], pairs: Pairs, step: int = 1 << 16) -> NDArray[np.float32]:
    """(P,) cosine of the decoder directions of each pair."""
    left, right = pairs.ids
    found = np.empty(len(pairs), np.float32)
    for start in range(0, len(pairs), step):
        part = slice(start, start + step)
        found[part] = np.einsum("pd,pd->p", directions[left[part]], directions[right[part]])
    return found


def _sample_facts(sample: Sample) -> dict[str, int]:
    return {
        "rows": sample.table.n_rows,
        "documents": sample.n_documents,
        "documents_in_corpus": sample.n_corpus_documents,
        "blocks": int(sample.table.blocks[-1]) + 1,
        "features_that_fire": int((sample.table.fires > 0).sum()),
    }


def _pairs(
    config: StructureConfig,
    pairs: Pairs,
    first: Observed,
    second: Observed,
    sample: Sample,
    null_draws: list[NullDraw],
    cosines: NDArray[np.float32] | None,
    naming: Naming,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What of the pairs goes into the record, and the table of those chosen."""
    chosen = choose.choose_pairs(first, second, config.min_lift)
    left, right = (first.table.fires[ids] for ids in pairs.ids)
    independent = judge(first.counts, independence_fit(left, right, first.table.n_rows), MIN_EXPECTATION)
    called = first.judged.called(Q)
    record: dict[str, Any] = {
        "tested": int(first.judged.tested.sum()),
        "called": int(called.sum()),
        "called_in_null_draws": [draw.called for draw in null_draws],
        "tested_under_independence": int(independent.tested.sum()),
        "called_under_independence": int(independent.called(Q).sum()),
        "called_under_independence_alone": int((independent.called(Q) & ~called).sum()),
        "edges_in_null_draws": [draw.edges for draw in null_draws],
    }
    columns = []
    for name, kind in zip(("attracted", "repelled"), chosen, strict=True):
        strongest = np.argsort(-np.abs(first.judged.z[kind.place]), kind="stable")[:MAX_PAIRS]
        order = np.sort(strongest)
        kept = choose.Chosen(kind.place[order], kind.q[order], kind.replicated[order])
        table = _pair_columns(config, pairs, kept, first, second, sample, cosines)
        columns.append(table)
        best = _distinct(pairs, kept, first, second)
        facts = [pair_facts(table, i, naming, name == "attracted") for i in best]
        record[name] = {"called": len(kind.place), "replicated": int(kind.replicated.sum()), "strongest": facts}
    merged = {name: np.concatenate([table[name] for table in columns]) for name in columns[0]}
    return record, merged


def _pair_columns(
    config: StructureConfig,
    pairs: Pairs,
    chosen: choose.Chosen,
    first: Observed,
    second: Observed,
    sample: Sample,
    cosines: NDArray[np.float32] | None,
) -> dict[str, Any]:
    """A row for each chosen pair: both halves' counts and lifts, effect sizes and intervals on the second."""
    place = chosen.place
    own = choose.subset(pairs, place)
    low, high = lift_intervals(sample, own, second.null.mean[place], config.seed)
    left, right = own.ids
    return {
        "left": left.astype(np.int32),
        "right": right.astype(np.int32),
        "count_1": first.counts[place],
        "expected_1": first.null.mean[place],
        "lift_1": first.judged.lift[place],
        "z_1": first.judged.z[place],
        "q_1": first.judged.q[place],
        "count_2": second.counts[place],
        "expected_2": second.null.mean[place],
        "lift_2": second.judged.lift[place],
        "lift_2_low": low,
        "lift_2_high": high,
        "z_2": second.judged.z[place],
        "q_2": chosen.q,
        "replicated": chosen.replicated,
        **effect_columns(second.table, own, second.counts[place], second.null.mean[place]),
        "decoder_cosine": np.full(len(place), np.nan, np.float32) if cosines is None else cosines[place],
    }


def _distinct(pairs: Pairs, chosen: choose.Chosen, first: Observed, second: Observed, n: int = 10) -> list[int]:
    """The first `n` replicated pairs by |z| on the first half, no feature twice: otherwise one hub would fill the list."""
    left, right = (ids[chosen.place] for ids in pairs.ids)
    used: set[int] = set()
    found: list[int] = []
    for i in np.argsort(-np.abs(first.judged.z[chosen.place]), kind="stable").tolist():
        ends = {int(left[i]), int(right[i])}
        if chosen.replicated[i] and not ends & used and len(found) < n:
            used |= ends
            found.append(i)
    return found


def _communities(
    config: StructureConfig,
    pairs: Pairs,
    found: Communities,
    groups: NDArray[np.int64],
    first: Observed,
    second: Observed,
    sample: Sample,
    null_draws: list[NullDraw],
    naming: Naming,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The verdict, and the communities where it is yes."""
    other = choose.find_communities(second, pairs, config.min_lift, config.seed)
    agreement, n_common = choose.halves_agreement(found, other)
    q, lift = choose.judge_communities(second)
    record = choose.verdict(found, agreement, q, null_draws)
    record |= {
        "features_in_both_graphs": n_common,
        "found": len(found.members()),
        "edges": len(attracted(first.judged, config.min_lift)),
    }
    members = found.members() if record["reported"] else []
    inside = np.flatnonzero(groups >= 0)
    low, high = (
        lift_intervals(sample, choose.subset(pairs, inside), second.null.mean[inside], config.seed, groups[inside])
        if members
        else (np.zeros(0), np.zeros(0))
    )
    is_edge = np.zeros(len(pairs), bool)
    is_edge[attracted(first.judged, config.min_lift)] = True
    listed = []
    for number, nodes in enumerate(members):
        mine = is_edge & (groups == number)
        facts = {
            "community": number,
            "features": pairs.features[nodes].tolist(),
            "edges": int(mine.sum()),
            "possible_edges": len(nodes) * (len(nodes) - 1) // 2,
            "edges_called_on_half_2": int((mine & second.judged.called(Q) & (second.judged.z > 0)).sum()),
            "lift_2": float(lift[number]),
            "lift_2_low": float(low[number]),
            "lift_2_high": float(high[number]),
            "q_2": float(q[number]),
            "replicated": bool(q[number] <= Q),
        }
        degree = np.bincount(np.r_[pairs.left[mine], pairs.right[mine]], minlength=len(pairs.features))[nodes]
        central = pairs.features[nodes[np.argsort(-degree, kind="stable")]]
        listed.append(community_facts(facts, central, naming))
    record["communities"] = listed
    record["replicated"] = sum(facts["replicated"] for facts in listed)
    table = {
        "community": np.concatenate([np.zeros(0, np.int32), *(np.full(len(m), i, np.int32) for i, m in enumerate(members))]),
        "feature": np.concatenate([np.zeros(0, np.int32), *(pairs.features[m].astype(np.int32) for m in members)]),
    }
    return record, table


def _implications(
    config: StructureConfig, pairs: Pairs, first: Observed, second: Observed, sample: Sample, naming: Naming
) -> dict[str, Any]:
    found, n_indirect = choose.find_implications(first, pairs, config.min_lift)
    chosen, share = choose.confirm_implications(found, first, second)
    listed = []
    for i in np.argsort(-first.judged.z[found.place], kind="stable").tolist():
        source, target, place = int(found.source[i]), int(found.target[i]), int(found.place[i])
        fires = first.table.fires
        listed.append(
            {
                "source": source,
                "target": target,
                "source_fires_1": int(fires[source]),
                "target_given_source_1": float(first.counts[place] / fires[source]),
                "null_1": float(first.null.mean[place] / fires[source]),
                "source_given_target_1": float(first.counts[place] / fires[target]),
                "source_fires_2": int(second.table.fires[source]),
                "target_given_source_2": float(share[i]),
                "null_2": float(second.null.mean[place] / max(int(second.table.fires[source]), 1)),
                "q_2": float(chosen.q[i]),
                "replicated": bool(chosen.replicated[i]),
            }
        )
    shown = [i for i in listed if i["replicated"]][:10]
    for facts in shown:
        facts |= {"names": [naming.name(facts["source"]), naming.name(facts["target"])]}
        facts["examples"] = naming.contexts([facts["source"], facts["target"]])
    return {
        "called": len(listed),
        "followed_from_others": n_indirect,
        "replicated": sum(facts["replicated"] for facts in listed),
        "arrows": listed,
    }


def _duplicates(
    config: StructureConfig,
    pairs: Pairs,
    first: Observed,
    second: Observed,
    cosines: NDArray[np.float32] | None,
    naming: Naming,
) -> dict[str, Any]:
    place = choose.find_duplicates(first, pairs, config.min_lift, cosines)
    chosen = choose.replicate(place, first, second)
    own = choose.subset(pairs, place)
    again = choose.jaccard(second.table, own, second.counts[place])
    replicated = chosen.replicated & (again >= choose.DUPLICATE_JACCARD)
    once = choose.jaccard(first.table, own, first.counts[place])
    listed = [
        {
            "features": [int(own.ids[0][i]), int(own.ids[1][i])],
            "jaccard_1": float(once[i]),
            "jaccard_2": float(again[i]),
            "decoder_cosine": None if cosines is None else float(cosines[place[i]]),
            "q_2": float(chosen.q[i]),
            "replicated": bool(replicated[i]),
        }
        for i in np.argsort(-once, kind="stable").tolist()
    ]
    for facts in listed[:10]:
        facts["names"] = [naming.name(feature) for feature in facts["features"]]
    return {"by_cosine": cosines is not None, "called": len(listed), "replicated": int(replicated.sum()), "pairs": listed}


def _hubs(config: StructureConfig, pairs: Pairs, first: Observed, second: Observed, naming: Naming) -> list[dict[str, Any]]:
    """The ten features with most edges."""
    degrees = [np.diff(choose.graph_of(half, pairs, config.min_lift).indptr) for half in (first, second)]
    order = np.argsort(-degrees[0], kind="stable")[:10]
    return [
        {
            "feature": int(pairs.features[node]),
            "name": naming.name(int(pairs.features[node])),
            "edges_1": int(degrees[0][node]),
            "edges_2": int(degrees[1][node]),
        }
        for node in order.tolist()
        if degrees[0][node]
    ]


def _cosine(
    first: Observed, second: Observed, cosines: NDArray[np.float32] | None, null_draws: list[NullDraw]
) -> dict[str, Any] | None:
    """Rank correlation of lift and decoder cosine on both halves, beside that of null draws."""
    if cosines is None:
        return None
    drawn = np.array([draw.cosine_correlation for draw in null_draws])
    return {
        "spearman_1": cosine_correlation(first.judged, cosines),
        "spearman_2": cosine_correlation(second.judged, cosines),
        "null_mean": float(drawn.mean()),
        "null_largest": float(np.abs(drawn).max()),
    }


def _publish(folder: Path, record: dict[str, Any], tables: dict[str, dict[str, Any]]) -> None:
    """Write everything beside the final place, flush it, and rename: the structure is there whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        for name, columns in tables.items():
            pq.write_table(pa.table(columns), temporary / name)
        publish_bytes(temporary / PAGE, findings_page(record).encode())
        publish_json(temporary / RECORD, record)
        for path in temporary.rglob("*"):
            fsync_path(path)
        os.rename(temporary, folder)
        fsync_path(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
