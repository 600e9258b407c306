"""In: what was drawn, judged and chosen. Out: the plain values of `structure.json` and the columns of the tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from pipelines.structure import choose
from pipelines.structure.effect_sizes import effect_columns, lift_intervals
from pipelines.structure.graph import Communities
from pipelines.structure.naming import Naming, community_facts, pair_facts
from pipelines.structure.null import Pairs
from pipelines.structure.null_rounds import MIN_EXPECTATION, NullDraw, Observed, Q, attracted, cosine_correlation
from pipelines.structure.sample import Sample
from pipelines.structure.significance import independence_fit, judge

MAX_PAIRS = 50_000
"""Pairs of either kind, the most certain ones, that are written with effect sizes and intervals."""
N_SHOWN = 10


@dataclass(frozen=True)
class Sought:
    """What both halves gave: pairs, verdicts, further draws, the communities of each level."""

    min_lift: float
    seed: int
    pairs: Pairs
    first: Observed
    second: Observed
    sample: Sample
    """The second half's rows."""
    null_draws: list[NullDraw]
    found: list[Communities]
    """The first half's communities at each level of the ladder."""
    groups: NDArray[np.int64]
    """(levels, P) the community of each pair, numbered through all levels."""
    cosines: NDArray[np.float32] | None
    naming: Naming


def sample_facts(sample: Sample) -> dict[str, int]:
    return {
        "rows": sample.table.n_rows,
        "documents": sample.n_documents,
        "documents_in_corpus": sample.n_corpus_documents,
        "blocks": int(sample.table.blocks[-1]) + 1,
        "features_that_fire": int((sample.table.fires > 0).sum()),
    }


def pairs_facts(s: Sought) -> tuple[dict[str, Any], dict[str, NDArray]]:
    """How many pairs were called, by this null and by independence, and the columns of those chosen."""
    left, right = (s.first.table.fires[ids] for ids in s.pairs.ids)
    independent = judge(s.first.counts, independence_fit(left, right, s.first.table.n_rows), MIN_EXPECTATION)
    called = s.first.judged.called(Q)
    record: dict[str, Any] = {
        "tested": int(s.first.judged.tested.sum()),
        "called": int(called.sum()),
        "called_in_null_draws": [draw.called for draw in s.null_draws],
        "tested_under_independence": int(independent.tested.sum()),
        "called_under_independence": int(independent.called(Q).sum()),
        "called_under_independence_alone": int((independent.called(Q) & ~called).sum()),
    }
    columns = []
    for name, kind in zip(("attracted", "repelled"), choose.choose_pairs(s.first, s.second, s.min_lift), strict=True):
        order = np.sort(np.argsort(-np.abs(s.first.judged.z[kind.place]), kind="stable")[:MAX_PAIRS])
        kept = choose.Chosen(kind.place[order], kind.q[order], kind.replicated[order])
        table = _pair_columns(s, kept)
        columns.append(table)
        shown = [pair_facts(table, i, s.naming, name == "attracted") for i in _distinct(table)]
        record[name] = {"called": len(kind.place), "replicated": int(kind.replicated.sum()), "strongest": shown}
    return record, {name: np.concatenate([table[name] for table in columns]) for name in columns[0]}


def _pair_columns(s: Sought, chosen: choose.Chosen) -> dict[str, NDArray]:
    """A row for each chosen pair: both halves' counts and lifts, effect sizes and intervals on the second."""
    place, first, second = chosen.place, s.first, s.second
    own = choose.subset(s.pairs, place)
    low, high = lift_intervals(s.sample, own, second.null.mean[place], s.seed)
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
        "decoder_cosine": np.full(len(place), np.nan, np.float32) if s.cosines is None else s.cosines[place],
    }


def _distinct(table: dict[str, NDArray]) -> list[int]:
    """The replicated pairs that are most certain on the first half. No feature is listed twice, so that one hub cannot fill
    the list."""
    used: set[int] = set()
    distinct: list[int] = []
    for i in np.argsort(-np.abs(table["z_1"]), kind="stable").tolist():
        ends = {int(table["left"][i]), int(table["right"][i])}
        if table["replicated"][i] and not ends & used and len(distinct) < N_SHOWN:
            used |= ends
            distinct.append(i)
    return distinct


def communities_facts(s: Sought) -> tuple[dict[str, Any], dict[str, NDArray]]:
    """The verdict of each level, and the communities of the lowest level where it is yes."""
    p, lift = choose.judge_groups(s.second)
    levels, first_group = [], 0
    for number, (level, partition) in enumerate(zip(choose.ladder(s.min_lift), s.found, strict=True)):
        last_group = first_group + len(partition.members())
        own = p[first_group:last_group]
        q = stats.false_discovery_control(own, method="bh") if len(own) else own
        other = choose.find_communities(s.second, s.pairs, level, s.seed)
        agreement, n_common = choose.halves_agreement(partition, other)
        drawn = np.array([draw.modularity[number] for draw in s.null_draws])
        levels.append(
            {
                "min_lift": level,
                "edges": len(attracted(s.first.judged, level)),
                "edges_in_null_draws": [draw.edges[number] for draw in s.null_draws],
                "features_in_both_graphs": n_common,
                "found": len(own),
                "replicated": int((q <= Q).sum()),
                **choose.verdict(partition, agreement, q, drawn),
            }
        )
        first_group = last_group
    chosen = next((number for number, level in enumerate(levels) if level["reported"]), None)
    record: dict[str, Any] = {"reported": chosen is not None, "levels": levels, "level": chosen, "communities": []}
    members: list[NDArray[np.int64]] = []
    if chosen is not None:
        members = s.found[chosen].members()
        record["communities"] = _listed(s, chosen, members, p, lift)
    table = {
        "community": np.concatenate([np.zeros(0, np.int32), *(np.full(len(m), i, np.int32) for i, m in enumerate(members))]),
        "feature": np.concatenate([np.zeros(0, np.int32), *(s.pairs.features[m].astype(np.int32) for m in members)]),
    }
    return record, table


def _listed(
    s: Sought, level: int, members: list[NDArray[np.int64]], p: NDArray[np.float64], lift: NDArray[np.float64]
) -> list[dict[str, Any]]:
    """What is reported of each community of a level, largest first."""
    first_group = sum(len(partition.members()) for partition in s.found[:level])
    own = slice(first_group, first_group + len(members))
    q, lift = stats.false_discovery_control(p[own], method="bh"), lift[own]
    groups = np.where(s.groups[level] >= 0, s.groups[level] - first_group, -1)
    inside = np.flatnonzero(groups >= 0)
    mean = s.second.null.mean[inside]
    low, high = lift_intervals(s.sample, choose.subset(s.pairs, inside), mean, s.seed, groups[inside])
    is_edge = np.zeros(len(s.pairs), bool)
    is_edge[attracted(s.first.judged, choose.ladder(s.min_lift)[level])] = True
    listed = []
    for number, nodes in enumerate(members):
        mine = is_edge & (groups == number)
        degree = np.bincount(np.r_[s.pairs.left[mine], s.pairs.right[mine]], minlength=len(s.pairs.features))[nodes]
        facts = {
            "community": number,
            "features": s.pairs.features[nodes].tolist(),
            "edges": int(mine.sum()),
            "possible_edges": len(nodes) * (len(nodes) - 1) // 2,
            "edges_called_on_half_2": int((mine & s.second.judged.called(Q) & (s.second.judged.z > 0)).sum()),
            "lift_2": float(lift[number]),
            "lift_2_low": float(low[number]),
            "lift_2_high": float(high[number]),
            "q_2": float(q[number]),
            "replicated": bool(q[number] <= Q),
        }
        listed.append(community_facts(facts, s.pairs.features[nodes[np.argsort(-degree, kind="stable")]], s.naming))
    return listed


def implications_facts(s: Sought) -> dict[str, Any]:
    """Every direct implication that was called, the most certain first, with its figures on the second half."""
    implications, n_indirect = choose.find_implications(s.first, s.pairs, s.min_lift)
    chosen, share = choose.confirm_implications(implications, s.first, s.second)
    listed: list[dict[str, Any]] = []
    n_shown = 0
    for i in np.argsort(-s.first.judged.z[implications.place], kind="stable").tolist():
        source, target, place = int(implications.source[i]), int(implications.target[i]), int(implications.place[i])
        fires = [half.table.fires for half in (s.first, s.second)]
        facts: dict[str, Any] = {
            "source": source,
            "target": target,
            "source_fires_1": int(fires[0][source]),
            "target_given_source_1": float(s.first.counts[place] / fires[0][source]),
            "null_1": float(s.first.null.mean[place] / fires[0][source]),
            "source_given_target_1": float(s.first.counts[place] / fires[0][target]),
            "source_fires_2": int(fires[1][source]),
            "target_given_source_2": float(share[i]),
            "null_2": float(s.second.null.mean[place] / max(int(fires[1][source]), 1)),
            "q_2": float(chosen.q[i]),
            "replicated": bool(chosen.replicated[i]),
        }
        if facts["replicated"] and n_shown < N_SHOWN:
            n_shown += 1
            facts["names"] = [s.naming.name(source), s.naming.name(target)]
            facts["examples"] = s.naming.contexts([source, target])
        listed.append(facts)
    return {
        "called": len(listed),
        "followed_from_others": n_indirect,
        "replicated": sum(facts["replicated"] for facts in listed),
        "arrows": listed,
    }


def duplicates_facts(s: Sought) -> dict[str, Any]:
    """Near-duplicates, the most alike first."""
    place = choose.find_duplicates(s.first, s.pairs, s.min_lift, s.cosines)
    chosen = choose.replicate(place, s.first, s.second)
    own = choose.subset(s.pairs, place)
    once = choose.jaccard(s.first.table, own, s.first.counts[place])
    again = choose.jaccard(s.second.table, own, s.second.counts[place])
    replicated = chosen.replicated & (again >= choose.DUPLICATE_JACCARD)
    listed: list[dict[str, Any]] = []
    for rank, i in enumerate(np.argsort(-once, kind="stable").tolist()):
        ends = [int(ids[i]) for ids in own.ids]
        facts: dict[str, Any] = {
            "features": ends,
            "jaccard_1": float(once[i]),
            "jaccard_2": float(again[i]),
            "decoder_cosine": None if s.cosines is None else float(s.cosines[place[i]]),
            "q_2": float(chosen.q[i]),
            "replicated": bool(replicated[i]),
        }
        if rank < N_SHOWN:
            facts["names"] = [s.naming.name(feature) for feature in ends]
        listed.append(facts)
    return {
        "by_cosine": s.cosines is not None,
        "called": len(listed),
        "replicated": int(replicated.sum()),
        "pairs": listed,
    }


def hubs_facts(s: Sought) -> list[dict[str, Any]]:
    """The features with most edges."""
    degrees = []
    for half in (s.first, s.second):
        edges = attracted(half.judged, s.min_lift)
        degrees.append(np.bincount(np.r_[s.pairs.left[edges], s.pairs.right[edges]], minlength=len(s.pairs.features)))
    order = np.argsort(-degrees[0], kind="stable")[:N_SHOWN]
    return [
        {
            "feature": int(s.pairs.features[node]),
            "name": s.naming.name(int(s.pairs.features[node])),
            "edges_1": int(degrees[0][node]),
            "edges_2": int(degrees[1][node]),
        }
        for node in order.tolist()
        if degrees[0][node]
    ]


def cosine_facts(s: Sought) -> dict[str, Any] | None:
    """Rank correlation of lift and decoder cosine on both halves, beside that of null draws; None without a run."""
    if s.cosines is None:
        return None
    drawn = np.array([draw.cosine_correlation for draw in s.null_draws])
    return {
        "spearman_1": cosine_correlation(s.first.judged, s.cosines),
        "spearman_2": cosine_correlation(s.second.judged, s.cosines),
        "null_mean": float(drawn.mean()),
        "null_largest": float(np.abs(drawn).max()),
    }
