"""What training eight SAEs in one pass saves over eight trainings, whose results must be the same bits.

    python -m benchmarks.sweep [--store STORE] [--rows 200000]

Each training is a process of its own, as a user starts it, and so is the sweep; they take turns. Exits with 1 when a
weight differs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LR, SEEDS, KS = 0.003, (0, 1), (8, 16, 32, 64)
WEIGHTS = "sae.safetensors"


def actstore(*arguments: object) -> float:
    """Seconds of one command."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "actstore", *map(str, arguments)], check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", help="else rows of the built-in model are collected")
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=4096)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = options.store or folder / "store"
        if not options.store:
            actstore("collect", "--out", store, "--model", "builtin", "--layer", 3, "--tokens", options.rows)
        shape = ["--features", options.features, "--batch", options.batch, "--tokens", options.rows, "--lr", LR]
        swept = [f"--k={k}" for k in KS] + [f"--seed={seed}" for seed in SEEDS]
        together = actstore("train", store, "--out", folder / "sweep", *shape, *swept)
        alone, differing = 0.0, []
        for k in KS:
            for seed in SEEDS:
                run = f"k{k}-seed{seed}"
                alone += actstore("train", store, "--out", folder / run, *shape, "--k", k, "--seed", seed)
                if (folder / run / WEIGHTS).read_bytes() != (folder / "sweep" / run / WEIGHTS).read_bytes():
                    differing.append(run)
    print(
        f"eight trainings {alone:.1f} s, one sweep of eight {together:.1f} s: {alone / together:.2f}x; "
        f"bit-identical: {8 - len(differing)} of 8"
    )
    if differing:
        sys.exit(f"other weights than alone: {', '.join(differing)}")


if __name__ == "__main__":
    main()
