"""How fast shuffled batches come from disk, beside what the machine and another tool can do with the same rows.

    python -m benchmarks.stream [--rows 500000] [--saelens-python PYTHON --saelens-cache FOLDER] [--json]

Everything is read from a warm page cache, in one process, the variants one after another in each repetition. The bound
is a sequential read of the same bytes through a memory map that is already mapped, copied batch by batch. The
stream checks every chunk's crc32c and permutes each round; batches come as they are kept (float16) and as float32.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from actstore.reader import ActivationStore
from actstore.stream import BatchStream
from benchmarks.madestore import SITE, make_store

D_MODEL = 768
BATCH_ROWS = 4096
BUFFER_ROWS = 32_768
LEAST_SHARE = 0.45
LEAST_OVER_SAELENS = 8.0


def rows_per_s(batches: Callable[[], Iterable[Any]]) -> float:
    """Rows a second over one pass."""
    start, n_rows = time.perf_counter(), 0
    for batch in batches():
        n_rows += len(batch)
    return n_rows / (time.perf_counter() - start)


def variants(store: ActivationStore, flat: Path) -> dict[str, Callable[[], Iterable[Any]]]:
    """Each way to get the rows, as a pass over them."""
    mapped = np.memmap(flat, np.float16, "r").reshape(-1, D_MODEL)
    in_memory = np.array(mapped)
    order = np.random.default_rng(0).permutation(len(mapped))
    starts = range(0, len(mapped), BATCH_ROWS)
    return {
        "memory map, sequential": lambda: (np.array(mapped[i : i + BATCH_ROWS]) for i in starts),
        "memory map, random rows": lambda: (mapped[np.sort(order[i : i + BATCH_ROWS])] for i in starts),
        "in memory, shuffled gather": lambda: (in_memory[order[i : i + BATCH_ROWS]] for i in starts),
        "stream, as kept": lambda: BatchStream(store, SITE, BATCH_ROWS, epochs=2, as_kept=True),
        "stream, float32": lambda: BatchStream(store, SITE, BATCH_ROWS, epochs=1),
        "stream, standardised": lambda: BatchStream(store, SITE, BATCH_ROWS, epochs=1, normalise="standardise"),
    }


def saelens_rows_per_s(python: str, cache: str) -> float:
    """Its cached store through its mixing buffer of 32,768 rows, in its own environment."""
    script = Path(__file__).parent / "peers" / "saelens_stream.py"
    run = subprocess.run([python, str(script), cache], capture_output=True, text=True, check=True)
    return float(json.loads(run.stdout.splitlines()[-1])["rows_per_s"])


def measure(n_rows: int, repetitions: int, saelens: tuple[str, str] | None) -> dict[str, list[float]]:
    """Rows a second of each variant, repetition by repetition."""
    with tempfile.TemporaryDirectory() as folder:
        store = ActivationStore(make_store(Path(folder) / "store", n_rows, D_MODEL))
        flat = Path(folder) / "flat"
        with open(flat, "wb") as file:
            for batch in BatchStream(store, SITE, BATCH_ROWS, epochs=1, as_kept=True):
                file.write(batch.tobytes())
        found: dict[str, list[float]] = {}
        chosen = variants(store, flat)
        for batches in chosen.values():
            rows_per_s(batches)
        for _ in range(repetitions):
            for name, batches in chosen.items():
                found.setdefault(name, []).append(rows_per_s(batches))
            if saelens is not None:
                found.setdefault("SAELens, mixing buffer", []).append(saelens_rows_per_s(*saelens))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--saelens-python")
    parser.add_argument("--saelens-cache")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    saelens = (options.saelens_python, options.saelens_cache) if options.saelens_python else None
    found = measure(options.rows, options.repetitions, saelens)
    bound, gather = found["memory map, sequential"], found["in memory, shuffled gather"]
    rows = {
        name: {
            "rows_per_s": median(rates),
            "of_memory_map": median(rate / own for rate, own in zip(rates, bound, strict=True)),
            "of_gather": median(rate / own for rate, own in zip(rates, gather, strict=True)),
        }
        for name, rates in found.items()
    }
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    print(f"{options.rows:,} rows x {D_MODEL} float16, batches of {BATCH_ROWS}, median of {options.repetitions}")
    print(f"{'':28}{'rows/s':>12}{'of memory map':>16}{'of gather':>12}")
    for name, row in rows.items():
        print(f"{name:28}{row['rows_per_s']:>12,.0f}{row['of_memory_map']:>16.2f}{row['of_gather']:>12.2f}")
    print(f"asked: stream, as kept >= {LEAST_SHARE} of the memory map")
    if saelens is not None:
        ratio = median(a / b for a, b in zip(found["stream, float32"], found["SAELens, mixing buffer"], strict=True))
        print(f"stream, float32 over SAELens' mixing buffer: {ratio:.1f}x (asked: >= {LEAST_OVER_SAELENS:g}x)")


if __name__ == "__main__":
    main()
