"""How fast SAEs are trained, beside the textbook's loop, other trainers, and the one dense product that is left.

    python -m benchmarks.train --install FOLDER [--features 4096 --features 24576] [--repetitions 3] [--json]

d = 768, k = 32, batches of 4096 made-up rows, the same for all. Every measurement is a process of its own, in which the
first two steps are not timed and the peak of its resident memory is read; the variants run one after another, and all
again for each repetition. Ratios are taken within a repetition. About 0.2 to 0.5 GB of the memory are the
libraries themselves.

    ours       this project's step, fp32, and with a bf16 encoder
    textbook   a dense encoder, top k by scatter, a dense decoder, autograd, Adam, clipping, decoder columns renormalised
    SAELens, dictionary_learning, sparsify
               their own training steps with their own defaults, fp32, and with bf16 autocast (see benchmarks/peers)
    bare       the encoder's product alone, bf16 with a preallocated result: the bound

The loss of dead features takes part in no one's steps: on so few rows, no feature is dead yet. `--dead-rows 1` has all
features that miss a batch dead for those that have such a loss by default (SAELens, dictionary_learning).

Other projects need environments of their own: name their Pythons, or let `--install` make them; without, they are
skipped.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.peers.environments import PeerFailed, Peers, add_options, choose

WIDTHS = (4096, 24_576)
OTHERS = ("saelens", "dictionary_learning", "sparsify")
RATIO_OF = ("ours, bf16", "ours, fp32")
"""Ratios are those of the first of these that ran."""


@dataclass(frozen=True)
class Variant:
    """One line of the table."""

    name: str
    peer: str
    autocast: bool = False


VARIANTS = (
    Variant("ours, fp32", "ours"),
    Variant("ours, bf16", "ours", True),
    Variant("textbook, fp32", "textbook"),
    Variant("textbook, bf16", "textbook", True),
    Variant("SAELens, fp32", "saelens"),
    Variant("SAELens, bf16", "saelens", True),
    Variant("dictionary_learning, fp32", "dictionary_learning"),
    Variant("dictionary_learning, bf16", "dictionary_learning", True),
    Variant("sparsify, fp32", "sparsify"),
    Variant("sparsify, bf16", "sparsify", True),
    Variant("bare encoder product, bf16", "bare"),
)

Runs = dict[int, dict[str, list[dict[str, Any]]]]
"""By number of features and variant, each repetition's result."""


def measure(peers: Peers, options: argparse.Namespace) -> tuple[Runs, dict[str, str]]:
    """Every variant once at every width, then all again; and what failed, with its last words."""
    runs: Runs = {features: {} for features in options.features}
    failed: dict[str, str] = {}
    for _ in range(options.repetitions):
        for features in options.features:
            for variant in VARIANTS:
                if variant.peer not in peers.pythons or variant.name in failed:
                    continue
                words = ["--features", features, "--k", options.k, "--batch", options.batch, "--d-model", options.d_model]
                words += ["--steps", options.steps, "--seconds", options.seconds, "--dead-rows", options.dead_rows]
                try:
                    result = peers.run(variant.peer, *words, *(["--autocast"] * variant.autocast))
                except PeerFailed as error:
                    failed[variant.name] = str(error)
                    continue
                runs[features].setdefault(variant.name, []).append(result)
    rows = {run["rows_sha256"] for at_width in runs.values() for each in at_width.values() for run in each}
    if len(rows) > 1:
        raise SystemExit(f"the variants had different rows: {', '.join(sorted(rows))}")
    return runs, failed


def summarise(runs: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Medians for one width, and the ratio of ours to each variant within a repetition."""
    ours = next((name for name in RATIO_OF if name in runs), None)
    found = {}
    for name, each in runs.items():
        rates = [run["tokens_per_s"] for run in each]
        found[name] = {
            "tokens_per_s": median(rates),
            "lowest": min(rates),
            "highest": max(rates),
            "peak_rss_mb": median(run["peak_rss_mb"] for run in each),
            "version": each[0]["version"],
            **{name: each[0][name] for name in ("rows_choosing_otherwise",) if name in each[0]},
        }
        if ours is not None:
            ratios = [a["tokens_per_s"] / b for a, b in zip(runs[ours], rates, strict=False)]
            found[name]["ours_over_it"] = median(ratios)
    return found


def print_table(found: dict[int, dict[str, dict[str, Any]]]) -> None:
    """One line a variant, the widths side by side."""
    print(f"{'':28}" + "".join(f"{f'F = {features}':>44}" for features in found))
    print(f"{'':28}" + f"{'tokens/s':>11}{'(lowest–highest)':>17}{'ours/it':>8}{'MB':>8}" * len(found))
    for variant in VARIANTS:
        if not any(variant.name in rows for rows in found.values()):
            continue
        line = f"{variant.name:28}"
        for rows in found.values():
            row = rows.get(variant.name)
            if row is None:
                line += f"{'–':>44}"
                continue
            spread = f"({row['lowest']:.0f}–{row['highest']:.0f})"
            ratio = f"{row['ours_over_it']:.2f}" if "ours_over_it" in row else ""
            line += f"{row['tokens_per_s']:>11,.0f}{spread:>17}{ratio:>8}{row['peak_rss_mb']:>8,.0f}"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, action="append", help="widths; 4096 and 24576 unless given")
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="measured at most, a process")
    parser.add_argument("--seconds", type=float, default=10.0, help="after which a process measures no further step")
    parser.add_argument("--dead-rows", type=int, default=0, help="rows after which a feature is dead; 0 for their own")
    parser.add_argument("--json", action="store_true")
    add_options(parser, OTHERS)
    options = parser.parse_args()
    options.features = options.features or list(WIDTHS)
    peers = choose(options, OTHERS)
    load_before = os.getloadavg()[0]
    runs, failed = measure(peers, options)
    found = {features: summarise(at_width) for features, at_width in runs.items()}
    if options.json:
        notes = {"skipped": peers.skipped, "failed": failed, "load_before": load_before}
        print(json.dumps({"summary": found, "runs": runs, **notes}, indent=1))
        return
    first = next(run for at_width in runs.values() for each in at_width.values() for run in each)
    print(
        f"d = {options.d_model}, k = {options.k}, batch {options.batch}, median of {options.repetitions}; torch "
        f"{first['torch']}, {first['threads']} threads; load of the machine before: {load_before:.1f}"
    )
    print_table(found)
    for features, rows in found.items():
        share = rows.get("ours, bf16", {}).get("rows_choosing_otherwise")
        if share is not None:
            print(f"F = {features}: {share:.3%} of rows choose other features than in full precision (asked: at most 0.1 %)")
    versions = {name.split(",")[0]: row["version"] for rows in found.values() for name, row in rows.items()}
    print("versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    for name, reason in {**peers.skipped, **failed}.items():
        print(f"not run: {name}: {reason}")


if __name__ == "__main__":
    main()
