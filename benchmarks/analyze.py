"""Co-occurrence of all features: rows a second of ours and of three other ways, and the memory of an analysis.

    python -m benchmarks.analyze [--rows 1000000] [--memory-rows 1000000 8000000] [--json]

Codes of 24,576 features, k = 32, drawn by Zipf's law without repetition in a row, documents of 1,000 rows. All figures of
one table are of one run. What is timed is the counting (and for ours, reading the codes from the store and writing the
result): `analyze`'s pair tasks, on one and on two worker processes. Beside it, on one thread of this process:

- the textbook form, a dense float32 (n, F) indicator A and AᵀA, on as many rows as fit and extrapolated;
- a scipy CSR product per 100,000 rows, added to a dense uint32 F x F;
- a torch sparse product per 20,000 rows, made dense and added to an int32 F x F, which is how EleutherAI's delphi counts
  (`NeighbourCalculator`), re-expressed here.

Each of them gives the same integers as ours on the rows it was timed on; that is checked. Asked: ours (one process) at least
1,000 times the dense form and 4 times scipy's; two processes at least 1.8 times one; peak memory of a worker within 10 % for
the two sizes of `--memory-rows`.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import psutil
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

from actstore.place import Folder
from actstore.schema import PARTS, CorpusIdentity, PartRecord, RowArray, SegmentRecord
from actstore.writer import StoreWriter, write_shard
from pipelines.analysis import Analysis
from pipelines.analyze import AnalyzeConfig, _count_pairs, _job, analyze
from pipelines.builtin import model_path
from pipelines.cluster import connect
from pipelines.code_store import CodeStore
from pipelines.made_store import _manifest
from pipelines.pairs import pair_counts
from pipelines.tokens import load_tokenizer

FEATURES, K, DRAWN = 24_576, 32, 80
CONTEXT, DOCUMENT_ROWS = 128, 1000
SHARD_ROWS, CHUNK_ROWS = 65_536, 4096
DENSE_ROWS, SCIPY_ROWS, DELPHI_ROWS = 2048, 100_000, 20_000
ASKED = {"over_dense": 1000.0, "over_scipy": 4.0, "two_processes": 1.8, "memory": 1.1}


def zipf_codes(
    n_rows: int, seed: int, n_features: int = FEATURES, k: int = K
) -> tuple[NDArray[np.uint16], NDArray[np.float32]]:
    """(indices, values), each (n, k): of 80 draws the first k different ones; a row with fewer has values of 0."""
    rng = np.random.default_rng((7, seed))
    share = np.cumsum(1 / np.arange(1, n_features + 1))
    of_rank = np.random.default_rng(3).permutation(n_features).astype(np.uint16)
    drawn = np.minimum(np.searchsorted(share, rng.random((n_rows, DRAWN)) * share[-1]), n_features - 1).astype(np.uint16)
    order = np.argsort(drawn, axis=1, kind="stable")
    ranked = np.take_along_axis(drawn, order, axis=1)
    is_new = np.ones(ranked.shape, bool)
    is_new[:, 1:] = ranked[:, 1:] != ranked[:, :-1]
    when = np.sort(np.where(is_new, order, DRAWN), axis=1)[:, :k]
    fired = when < DRAWN
    chosen = np.where(fired, of_rank[np.take_along_axis(drawn, np.minimum(when, DRAWN - 1), axis=1)], 0)
    values = np.where(fired, rng.gamma(2.0, 1.0, size=chosen.shape) + 0.1, 0)
    return chosen.astype(np.uint16), values.astype(np.float32)


def write_codes(path: Path, n_rows: int) -> CodeStore:
    """A code store of Zipf codes, one training split, shards of 65,536 rows."""
    codec, files = load_tokenizer(str(model_path()))
    manifest = _manifest(1, CorpusIdentity("zipf codes", "0" * 64), "fp32", 0)
    policy = replace(manifest.policy, bos_token_id=codec.bos_token_id, separator_token_id=codec.separator_token_id)
    index, value = RowArray("codes/index", K, "uint16", "packed"), RowArray("codes/value", K, "float32", "packed")
    manifest = replace(
        manifest,
        kind="codes",
        policy=policy,
        arrays=(*manifest.arrays[:2], index, value),
        source={"store_id": "none", "snapshot": "none", "run_id": "none", "site": "none", "n_features": FEATURES},
        provenance={"model": "made-up", "run": "none", "store": "none"},
    )
    stride = CONTEXT - 1
    starts = np.arange(0, n_rows, stride, dtype=np.int64)
    lengths = np.minimum(stride, n_rows - starts)
    offsets = np.append(np.arange(0, n_rows, DOCUMENT_ROWS), n_rows).astype(np.int64)
    n_vocabulary = codec.backend.get_vocab_size()
    empty = np.empty(0, np.int64)
    tables: dict[str, NDArray[Any]] = {
        "tokens/ids": (np.random.default_rng(0).random(n_rows) ** 3 * n_vocabulary).astype(np.uint16),
        "documents/offsets": offsets,
        "documents/heldout": np.zeros(len(offsets) - 1, np.uint8),
        "documents/source": np.frombuffer("\n".join(f"part{i % 7}/{i}" for i in range(len(offsets) - 1)).encode(), np.uint8),
        "train/windows/token_start": starts,
        "train/windows/n_tokens": lengths.astype(np.uint32),
        "train/windows/first_row": starts,
        "heldout/windows/token_start": empty,
        "heldout/windows/n_tokens": empty.astype(np.uint32),
        "heldout/windows/first_row": empty,
    }
    shard_rows = min(SHARD_ROWS, -(-n_rows // CHUNK_ROWS) * CHUNK_ROWS)
    counts = (len(starts), n_rows), (0, 0)
    parts = {part: PartRecord(*count, shard_rows, CHUNK_ROWS) for part, count in zip(PARTS, counts, strict=True)}
    n_documents = len(offsets) - 1
    record = SegmentRecord(manifest.store_id, 0, 0, 0, n_documents, 0, n_documents, n_rows, 0, parts, {}, {})
    with StoreWriter.open(path, manifest, files) as writer:
        segment = writer.add_segment(record, tables)
        for part, shard in writer.missing_shards(segment):
            row = np.arange(*parts[part].layout.shard_range(shard))
            indices, values = zipf_codes(len(row), shard)
            places = {
                "rows/window": (row // stride).astype(np.uint32),
                "rows/position": (row % stride + 1).astype(np.uint16),
            }
            arrays = {**places, "codes/index": indices, "codes/value": values}
            write_shard(writer.place, manifest, segment, part, shard, arrays, {"stats": {}})
        writer.seal(segment)
    return CodeStore(path)


# Other ways


def dense_form(indices: NDArray[Any], fired: NDArray[np.bool_]) -> NDArray[Any]:
    rows = np.zeros((len(indices), FEATURES), np.float32)
    row, slot = np.nonzero(fired)
    rows[row, indices[row, slot]] = 1
    return rows.T @ rows


def scipy_form(indices: NDArray[Any], fired: NDArray[np.bool_]) -> NDArray[Any]:
    row, slot = np.nonzero(fired)
    place = (row, indices[row, slot].astype(np.int32))
    rows = sp.csr_array((np.ones(len(row), np.int32), place), shape=(len(indices), FEATURES))
    return np.asarray((rows.T @ rows).toarray())


def delphi_form(indices: NDArray[Any], fired: NDArray[np.bool_]) -> NDArray[Any]:
    row, slot = np.nonzero(fired)
    place = torch.from_numpy(np.stack([indices[row, slot].astype(np.int64), row]))
    rows = torch.sparse_coo_tensor(place, torch.ones(len(row)), (FEATURES, len(indices)))
    together = torch.zeros((FEATURES, FEATURES), dtype=torch.int32)
    together += (rows @ rows.T).to_dense().int()
    return together.numpy()


FORMS: dict[str, tuple[Callable[..., NDArray[Any]], int]] = {
    "dense AᵀA (extrapolated)": (dense_form, DENSE_ROWS),
    "scipy CSR": (scipy_form, SCIPY_ROWS),
    "delphi's sparse product": (delphi_form, DELPHI_ROWS),
}


def other_rates() -> dict[str, dict[str, float]]:
    """Rows a second of each other way, by wall and by processor time, after its result was found equal to ours."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "Sparse")  # torch says that such tensors are new
    found = {}
    for name, (form, n_rows) in FORMS.items():
        indices, values = zipf_codes(n_rows, 1000)
        wall, processor = time.perf_counter(), time.process_time()
        counts = form(indices, values > 0)
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        for start in (0, FEATURES // 2):
            tile = slice(start, start + 64)
            assert (counts[tile] == pair_counts(indices, values > 0, FEATURES, tile)).all(), name
        found[name] = {"rows": n_rows, "rows_per_s": n_rows / wall, "rows_per_cpu_s": n_rows / processor}
        del counts
    return found


# Ours


def pair_rate(codes: CodeStore, folder: Path, workers: int) -> dict[str, float]:
    """Rows a second of `analyze`'s pair stage, reading and writing included; the processes are there already."""
    shards = [shard for part in PARTS for shard in codes.shards(part)]
    fires = np.zeros(FEATURES, np.int64)
    for shard in shards:
        index, value = (codes.read(shard, f"codes/{name}") for name in ("index", "value"))
        fires += np.bincount(index[value > 0], minlength=FEATURES)
    config = AnalyzeConfig(codes=codes.url, out=folder / f"pairs{workers}")
    job = _job(config, codes, Folder(folder / f"pairs{workers}.partial"))
    documents = np.full(job.extent.n_documents, DOCUMENT_ROWS, np.int64)
    with connect(None, workers) as client:
        client.run(lambda: __import__("pipelines.surveying.pair_tasks"))
        busy = sum(client.run(lambda: time.process_time()).values())
        wall = time.perf_counter()
        found = _count_pairs(job, {"fires": fires, "n_documents": fires}, documents, shards, client)
        wall = time.perf_counter() - wall
        busy = sum(client.run(lambda: time.process_time()).values()) - busy
    n_rows = codes.n_rows()
    data = Folder(folder / f"pairs{workers}.partial/result")
    return {
        "rows": n_rows,
        "rows_per_s": n_rows / wall,
        "rows_per_cpu_s": n_rows / busy,
        "pairs": found["pairs"],
        "disk_bytes": sum(data.names().values()),
    }


def worker_peaks(codes: CodeStore, folder: Path) -> dict[str, float]:
    """A whole analysis on one worker process: its seconds, and the worker's peak memory (Linux: VmHWM)."""
    out = folder / f"whole{codes.n_rows()}"
    with connect(None, 1) as client:
        started = time.perf_counter()
        analyze(AnalyzeConfig(codes=codes.url, out=out), client)
        seconds = time.perf_counter() - started
        (peak,) = client.run(_own_peak).values()
    n_bytes = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    assert Analysis(out).n_rows == codes.n_rows()
    return {"rows": codes.n_rows(), "seconds": seconds, "worker_peak_bytes": peak, "disk_bytes": n_bytes}


def _own_peak() -> int:
    lines = Path(f"/proc/{psutil.Process().pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024


def measure(n_rows: int, memory_rows: list[int], folder: Path) -> dict[str, Any]:
    """Everything, by name."""
    result: dict[str, Any] = {"features": FEATURES, "k": K, "others": {}, "ours": {}, "memory": []}
    if n_rows:
        result["others"] = other_rates()
        codes = write_codes(folder / "codes", n_rows)
        result["ours"] = {workers: pair_rate(codes, folder, workers) for workers in (1, 2)}
        one, two = (result["ours"][workers]["rows_per_s"] for workers in (1, 2))
        others = result["others"]
        result["ratios"] = {
            "over_dense": one / others["dense AᵀA (extrapolated)"]["rows_per_s"],
            "over_scipy": one / others["scipy CSR"]["rows_per_s"],
            "over_delphi": one / others["delphi's sparse product"]["rows_per_s"],
            "two_processes": two / one,
        }
    for n in memory_rows:
        result["memory"].append(worker_peaks(write_codes(folder / f"codes{n}", n), folder))
    if len(memory_rows) > 1:
        peaks = [own["worker_peak_bytes"] for own in result["memory"]]
        result.setdefault("ratios", {})["memory"] = max(peaks) / min(peaks)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--memory-rows", type=int, nargs="*", default=[1_000_000, 8_000_000])
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder if left out")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        result = measure(options.rows, options.memory_rows, Path(folder))
    if options.json:
        print(json.dumps(result, indent=1, ensure_ascii=False))
        return
    rates = result["others"] | {f"ours, {n} process(es)": rate for n, rate in result["ours"].items()}
    print(f"{'':28}{'rows':>12}{'rows/s':>12}{'rows/CPU-s':>12}")
    for name, rate in rates.items():
        print(f"{name:28}{rate['rows']:>12,}{rate['rows_per_s']:>12,.0f}{rate['rows_per_cpu_s']:>12,.0f}")
    for own in result["memory"]:
        peak = own["worker_peak_bytes"] / 1e6
        print(f"whole analysis, one worker: {own['rows']:,} rows in {own['seconds']:,.0f} s, peak {peak:,.0f} MB")
    for name, ratio in result.get("ratios", {}).items():
        print(f"{name}: {ratio:.2f}" + (f" (asked: {ASKED[name]:g})" if name in ASKED else ""))


if __name__ == "__main__":
    main()
