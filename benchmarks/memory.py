"""Peak memory of collecting and of streaming, for a small and a large store under the same budgets.

    python -m benchmarks.memory [--tokens 1000000 4000000] [--json]

Each collection (the built-in model, one layer, shards of at most 16 MiB) and each epoch (rounds of at most 16 MiB) is a
process of its own, which reports its peak resident memory. The two sizes may differ by a tenth.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

SHARD_MIB, ROUND_MIB, BATCH_ROWS = 16, 16, 4096
LARGEST_RATIO = 1.1


def collect_peak(store: Path, n_tokens: int) -> int:
    """Peak bytes of the stage. Runs in a process of its own."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from pipelines.collect.config import CollectConfig
    from pipelines.collect.stage import collect

    collect(CollectConfig(out=store, model="builtin", layer=(3,), tokens=n_tokens, shard_mib=SHARD_MIB))
    return own_peak()


def epoch_peak(store: Path, n_tokens: int) -> int:
    """Bytes. Runs in a process of its own."""
    from actstore import ActivationStore, BatchStream

    opened = ActivationStore(store)
    n_rows = sum(len(b) for b in BatchStream(opened, opened.sites[0], BATCH_ROWS, budget_bytes=ROUND_MIB << 20, epochs=1))
    assert n_rows == opened.n_rows() <= n_tokens
    return own_peak()


def own_peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


STAGES = {"collect": collect_peak, "epoch": epoch_peak}


def measure(stage: str, store: Path, n_tokens: int) -> int:
    """The peak of a stage in a new process."""
    command = [sys.executable, "-m", "benchmarks.memory", "--stage", stage, str(store), str(n_tokens)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1_000_000, 4_000_000])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--stage", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        stage, store, n_tokens = options.stage
        print(STAGES[stage](Path(store), int(n_tokens)))
        return
    with tempfile.TemporaryDirectory() as folder:
        peaks = {
            stage: {n_tokens: measure(stage, Path(folder) / str(n_tokens), n_tokens) for n_tokens in options.tokens}
            for stage in STAGES
        }
    ratios = {stage: max(own.values()) / min(own.values()) for stage, own in peaks.items()}
    if options.json:
        print(json.dumps({"peak_bytes": peaks, "ratios": ratios}, indent=1))
    else:
        print(f"peak resident memory, shards of {SHARD_MIB} MiB, rounds of {ROUND_MIB} MiB")
        for stage, own in peaks.items():
            shown = "  ".join(f"{n_tokens:,} rows {n_bytes / 1e6:,.0f} MB" for n_tokens, n_bytes in own.items())
            print(f"{stage:8} {shown}  ratio {ratios[stage]:.3f} (asked: <= {LARGEST_RATIO})")
    raise SystemExit(0 if max(ratios.values()) <= LARGEST_RATIO else 1)


if __name__ == "__main__":
    main()
