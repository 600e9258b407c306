"""What `structure` calls in data without structure, and what it finds of planted structure.

    python -m benchmarks.structure [--seeds 20] [--kinds bursty zipf]

In: kinds of codes without structure, a seed each. Out: pairs called, by this null and by independence, and seeds in which a
community was reported; then the adjusted Rand index of planted communities, and a planted hierarchy and absorber.
"""

from __future__ import annotations

import argparse

import numpy as np

from pipelines.shared.cluster import connect
from pipelines.structure import facts, planted
from pipelines.structure.graph import adjusted_rand
from pipelines.structure.stage import seek

N_DOCUMENTS, N_FEATURES, DRAWS = 12, 120, 100
SIZES = [15, 12, 10, 8, 6]


def sought_of(client, halves, seed):
    samples = tuple(planted.sample_of(half) for half in halves)
    return seek(client, samples, DRAWS, 2.0, seed, None, planted.Unnamed())


def recovered(sought, truth) -> tuple[float, dict]:
    """(adjusted Rand index of the reported communities over the planted features, the record)."""
    record, table = facts.communities_facts(sought)
    labels = -1 - np.arange(len(truth))
    labels[table["feature"]] = table["community"]
    grouped = truth >= 0
    return adjusted_rand(labels[grouped], truth[grouped]), record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--kinds", nargs="+", choices=planted.NOTHING, default=planted.NOTHING)
    parser.add_argument("--workers", type=int, default=2)
    asked = parser.parse_args()
    rows = N_DOCUMENTS * 500
    print(f"{asked.seeds} seeds, {rows:,} rows a half, {N_FEATURES} features, {DRAWS} draws a half")
    print(f"{'nothing to find':<16} {'tested':>8} {'called at most':>15} {'under independence':>19} {'communities':>14}")
    with connect(None, asked.workers) as client:
        for kind in asked.kinds:
            shares, independent, tested, reported = [], [], [], 0
            for seed in range(asked.seeds):
                rng = np.random.default_rng((seed, planted.NOTHING.index(kind)))
                halves = [planted.nothing(kind, N_DOCUMENTS, N_FEATURES, rng) for _ in range(2)]
                sought = sought_of(client, halves, seed)
                record, _ = facts.pairs_facts(sought)
                tested.append(record["tested"])
                shares.append(record["called"] / record["tested"])
                independent.append(record["called_under_independence"] / record["tested_under_independence"])
                reported += facts.communities_facts(sought)[0]["reported"]
            print(
                f"{kind:<16} {int(np.mean(tested)):>8,} {max(shares):>15.3%} {max(independent):>19.1%} "
                f"{f'{reported} of {asked.seeds}':>14}",
                flush=True,
            )
        scores, arrows, mistaken = [], 0, 0
        for seed in range(asked.seeds):
            rng = np.random.default_rng((seed, 99))
            made = [planted.communities(N_DOCUMENTS, N_FEATURES, SIZES, rng) for _ in range(2)]
            scores.append(recovered(sought_of(client, [half for half, _ in made], seed), made[0][1])[0])
            made = [planted.hierarchy(N_DOCUMENTS, N_FEATURES, rng) for _ in range(2)]
            found = facts.implications_facts(sought_of(client, [half for half, _ in made], seed))
            held = {(arrow["source"], arrow["target"]) for arrow in found["arrows"] if arrow["replicated"]}
            arrows += held == {made[0][1]["implication"], made[0][1]["second"]}
            mistaken += bool(held & {made[0][1]["absorber"], made[0][1]["absorber"][::-1]})
    print(f"planted communities: adjusted Rand {min(scores):.3f} at least, {np.mean(scores):.3f} on average")
    print(f"planted implications: exactly these in {arrows} of {asked.seeds}; the absorber taken for one in {mistaken}")


if __name__ == "__main__":
    main()
