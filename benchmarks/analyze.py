"""Co-occurrence of all features: rows a second of ours and of three other ways; and whole analyses, their memory and size.

    python -m benchmarks.analyze [--rows 1000000] [--memory-rows 1000000 8000000] [--features 24576] [--k 32] [--json]

Codes of 24,576 features, k = 32, drawn by Zipf's law without repetition in a row, documents of 1,000 rows. All figures of
one table are of one run.

**Counting alone**, from the same codes in memory to every count of the F x F: ours on one thread of this process and on one
and two worker processes, by the tasks of `analyze`: shard by shard the codes and the rows in which each feature fires are
left on disk; tile by tile they are read and counted. Beside it

- the textbook form, a dense float32 (n, F) indicator A and AᵀA added up in place by torch, one block of rows on one and on
  two threads: each further block would take as long, so the rate is that of all rows;
- scipy: a CSR product of each block of rows, made dense and added to a uint32 F x F, one thread;
- a torch sparse product of each block, made dense and added to an int32 F x F, which is how EleutherAI's delphi counts
  (`NeighbourCalculator`), re-expressed here, one thread.

The last two count all rows, in the block size of `BLOCKS` that was fastest for them on one block. Their F x F are compared
with ours, number by number; the dense form's, on its rows.

**A whole `analyze`** reads a code store on disk, surveys all statistics (tokens, documents, quantiles, examples ...), counts
the pairs and writes arrays and Parquet; on one and on two worker processes.

Asked: ours (one thread) at least 1,000 times the dense form (the faster of its two) and 4 times scipy's; two processes at
least 1.8 times one (beside it what a loop of additions gains: of a shared machine's two cores not always two); peak memory
of a worker within 10 % for the two sizes of `--memory-rows`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
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

from actstore import paths
from actstore.open_place import open_place
from actstore.reader import Shard
from actstore.schema import PARTS, ROW_PLACE_ARRAYS, CorpusIdentity, code_arrays
from actstore.segment_record import PartRecord, SegmentRecord
from actstore.tables import text_tables, window_tables
from actstore.writer import StoreWriter, write_shard
from pipelines.analysis.stage import AnalyzeConfig, analyze
from pipelines.analysis.survey.held_codes import countable, forget_codes
from pipelines.analysis.survey.job import Job, shard_name
from pipelines.analysis.survey.pair_task import count_pairs, heaviest_first, pair_tiles
from pipelines.analysis.survey.partial_results import publish_bundle
from pipelines.codes.code_store import CodeStore
from pipelines.models.builtin import model_path
from pipelines.shared.cluster import connect, run_tasks
from pipelines.statistics import Extent
from pipelines.statistics.pairs import PairTile, firings_of, marked_codes
from pipelines.stores.made.made_store import made_manifest
from pipelines.text.tokenizer_files import load_tokenizer

REPETITIONS, TURNS = 3, 6
FEATURES, K, DRAWN = 24_576, 32, 80
CONTEXT, DOCUMENT_ROWS = 128, 1000
SHARD_ROWS, CHUNK_ROWS = 65_536, 4096
DENSE_ROWS = 4096
BLOCKS = 20_000, 100_000, 250_000
ASKED = {"over_dense": 1000.0, "over_scipy": 4.0, "two_processes": 1.8, "memory": 1.1}


def zipf_codes(n_rows: int, seed: int, n_features: int = FEATURES, k: int = K) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """(indices, values), each (n, k): of 80 draws the first k different ones; a row with fewer has values of 0."""
    dtype = np.min_scalar_type(n_features - 1)
    rng = np.random.default_rng((7, seed))
    share = np.cumsum(1 / np.arange(1, n_features + 1))
    of_rank = np.random.default_rng(3).permutation(n_features).astype(dtype)
    drawn = np.minimum(np.searchsorted(share, rng.random((n_rows, DRAWN)) * share[-1]), n_features - 1).astype(dtype)
    order = np.argsort(drawn, axis=1, kind="stable")
    ranked = np.take_along_axis(drawn, order, axis=1)
    is_new = np.ones(ranked.shape, bool)
    is_new[:, 1:] = ranked[:, 1:] != ranked[:, :-1]
    when = np.sort(np.where(is_new, order, DRAWN), axis=1)[:, :k]
    fired = when < DRAWN
    chosen = np.where(fired, of_rank[np.take_along_axis(drawn, np.minimum(when, DRAWN - 1), axis=1)], 0)
    values = np.where(fired, rng.gamma(2.0, 1.0, size=chosen.shape) + 0.1, 0)
    return chosen.astype(dtype), values.astype(np.float32)


def write_codes(path: Path, n_rows: int) -> CodeStore:
    """A code store of Zipf codes, one training split, shards of 65,536 rows."""
    codec, files = load_tokenizer(str(model_path()))
    manifest = made_manifest(1, CorpusIdentity("zipf codes", "0" * 64), "fp32", 0)
    policy = replace(manifest.policy, bos_token_id=codec.bos_token_id, separator_token_id=codec.separator_token_id)
    manifest = replace(
        manifest,
        kind="codes",
        policy=policy,
        arrays=(*ROW_PLACE_ARRAYS, *code_arrays(K, np.min_scalar_type(FEATURES - 1).name, "float32")),
        source={
            "store_id": "0" * 16,
            "snapshot": "0" * 16,
            "run_id": "0" * 16,
            "site": "resid_post.0",
            "n_features": FEATURES,
        },
        provenance={"model": "made-up", "run": "none", "store": "none"},
    )
    stride = CONTEXT - 1
    starts = np.arange(0, n_rows, stride, dtype=np.int64)
    lengths = np.minimum(stride, n_rows - starts)
    offsets = np.append(np.arange(0, n_rows, DOCUMENT_ROWS), n_rows).astype(np.int64)
    n_vocabulary = codec.n_vocabulary
    empty = np.empty(0, np.int64)
    tables = {
        **text_tables(
            (np.random.default_rng(0).random(n_rows) ** 3 * n_vocabulary).astype(np.uint16),
            offsets,
            np.zeros(len(offsets) - 1, np.uint8),
            [f"part{i % 7}/{i}" for i in range(len(offsets) - 1)],
            np.arange(len(offsets) - 1, dtype=np.uint64),
        ),
        **window_tables("train", starts, lengths, starts),
        **window_tables("heldout", empty, empty, empty),
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
            indices, values = zipf_codes(len(row), shard, FEATURES, K)
            places = {
                paths.WINDOW: (row // stride).astype(np.uint32),
                paths.POSITION: (row % stride + 1).astype(np.uint16),
            }
            arrays = {**places, paths.CODE_INDEX: indices, paths.CODE_VALUE: values}
            write_shard(writer.place, manifest, segment, part, shard, arrays, {"stats": {}})
        writer.seal(segment)
    return CodeStore(path)


# Other ways: each adds the rows of a block to the counts of all features


def dense_block(indices: NDArray[Any], fired: NDArray[np.bool_], together: torch.Tensor) -> None:
    rows = torch.zeros((len(indices), FEATURES))
    row, slot = np.nonzero(fired)
    rows[row, indices[row, slot].astype(np.int64)] = 1
    together.addmm_(rows.T, rows)


def scipy_block(indices: NDArray[Any], fired: NDArray[np.bool_], together: NDArray[np.uint32]) -> None:
    row, slot = np.nonzero(fired)
    place = (row, indices[row, slot].astype(np.int32))
    rows = sp.csr_array((np.ones(len(row), np.uint32), place), shape=(len(indices), FEATURES))
    together += (rows.T @ rows).toarray()


def delphi_block(indices: NDArray[Any], fired: NDArray[np.bool_], together: NDArray[np.int32]) -> None:
    row, slot = np.nonzero(fired)
    place = torch.from_numpy(np.stack([indices[row, slot].astype(np.int64), row]))
    rows = torch.sparse_coo_tensor(place, torch.ones(len(row)), (FEATURES, len(indices)))
    torch.from_numpy(together).add_((rows @ rows.T).to_dense().int())


Timed = dict[str, Any]


def timed(n_rows: int, call: Callable[[], Any]) -> Timed:
    wall, processor = time.perf_counter(), time.process_time()
    call()
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    return {"rows": n_rows, "rows_per_s": n_rows / wall, "rows_per_cpu_s": n_rows / processor}


def dense_rates(indices: NDArray[Any], fired: NDArray[np.bool_], fires: NDArray[np.int64]) -> dict[str, Timed]:
    """Rows a second of the dense form on one block, on one thread and on two."""
    indices, fired = indices[:DENSE_ROWS], fired[:DENSE_ROWS]
    found = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        together = torch.zeros((FEATURES, FEATURES))
        dense_block(indices[:64], fired[:64], together)  # the pages of the result are there before the clock starts
        together.zero_()
        rate = timed(len(indices), lambda t=together: dense_block(indices, fired, t))  # type: ignore[misc]
        found[f"dense AᵀA, {threads} thread(s), extrapolated"] = rate | {"block": len(indices)}
        require_equal(together.numpy(), indices, fired)
    torch.set_num_threads(1)
    return found


def blockwise_rate(
    add: Callable[..., None], dtype: type, indices: NDArray[Any], fired: NDArray[np.bool_]
) -> tuple[Timed, NDArray[Any]]:
    """The rate over all rows in the best block size, and the counts."""
    together = np.ones((FEATURES, FEATURES), dtype)
    speed = {}
    for block in dict.fromkeys(min(block, len(indices)) for block in BLOCKS):
        speed[block] = timed(block, lambda b=block: add(indices[:b], fired[:b], together))["rows_per_s"]  # type: ignore[misc]
    best = max(speed, key=lambda block: speed[block])
    together[:] = 0

    def count() -> None:
        for row in range(0, len(indices), best):
            add(indices[row : row + best], fired[row : row + best], together)

    return timed(len(indices), count) | {"block": best}, together


def require_equal(together: NDArray[Any], indices: NDArray[Any], fired: NDArray[np.bool_]) -> None:
    """Check that every count equals ours."""
    fires = np.bincount(indices[fired], minlength=FEATURES)
    codes = marked_codes(indices, fired, FEATURES)
    for start, stop in pair_tiles(fires):
        tile = PairTile(start, FEATURES, fires[start:stop])
        tile.add(codes, firings_of(codes, FEATURES)[start:stop])
        for first in range(0, stop - start, 256):
            rows = slice(start + first, min(start + first + 256, stop))
            assert (tile.rows(first, first + 256) == together[rows]).all(), f"features {rows}"


def other_rates(indices: NDArray[Any], fired: NDArray[np.bool_], fires: NDArray[np.int64]) -> dict[str, Timed]:
    """Rows a second of each other way, by wall and by processor time, its result equal to ours."""
    warnings.filterwarnings("ignore", "Sparse")  # torch says that such tensors are new
    found = dense_rates(indices, fired, fires)
    found["scipy CSR"], scipys = blockwise_rate(scipy_block, np.uint32, indices, fired)
    require_equal(scipys, indices, fired)
    found["delphi's sparse product"], delphis = blockwise_rate(delphi_block, np.int32, indices, fired)
    for first in range(0, FEATURES, 1024):
        assert (delphis[first : first + 1024] == scipys[first : first + 1024]).all()
    return found


# Ours


def counting_job(codes: CodeStore, folder: Path) -> Job:
    """The job of `analyze`'s tasks that count pairs."""
    extent = Extent(FEATURES, K, n_vocabulary=0, context=CONTEXT, n_documents=0, n_parts=0)
    return Job(codes.url, codes.snapshot, str(folder), str(folder), extent, 0, within="row", min_together=1)


def list_shard(job: Job, codes: NDArray[Any], shard: Shard) -> None:
    """Leave the codes of one shard and the rows in which each feature fires, as the survey does."""
    own = codes[shard.start : shard.stop]
    publish_bundle(open_place(job.work_url), shard_name(shard), countable(own, FEATURES))


def count_tile(job: Job, start: int, largest: NDArray[np.int64], shards: list[Shard]) -> PairTile:
    """Counts of some features against all."""
    tile = count_pairs(job, 0, start, largest, shards)
    assert tile is not None
    return tile


def throw_away(*task: Any) -> None:
    """`count_tile` on a worker, which would keep the tile."""
    count_tile(*task)


def tile_tasks(job: Job, fires: NDArray[np.int64], shards: list[Shard]) -> list[tuple[Any, ...]]:
    tiles = pair_tiles(fires)
    return [(job, tiles[i][0], fires[slice(*tiles[i])], shards) for i in heaviest_first(tiles, fires)]


def thread_rate(job: Job, shards: list[Shard], codes: NDArray[Any], fires: NDArray[np.int64]) -> Timed:
    """All shards and tiles one after another on this thread."""
    tasks = tile_tasks(job, fires, shards)

    def count() -> None:
        for shard in shards:
            list_shard(job, codes, shard)
        for task in tasks:
            count_tile(*task)

    rate = timed(len(codes), count)
    n_together = (codes < FEATURES).sum(axis=1, dtype=np.int64)
    tiles = (count_tile(*task) for task in tasks)
    assert sum(int(part[:, :-1].sum(dtype=np.int64)) for tile in tiles for part in tile._parts) == (n_together**2).sum()
    return rate


def process_rates(
    job: Job, shards: list[Shard], codes: NDArray[Any], fires: NDArray[np.int64]
) -> tuple[dict[int, Timed], float]:
    """All of them, shared by one or two worker processes that are there already, with the codes in their memory.

    In turn, since a shared machine has slow spells; the best of `TURNS`. And how many times as fast as one the two are at a
    loop of additions, which needs nothing but the processor.
    """
    counts = tile_tasks(job, fires, shards)
    found: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
    bare: dict[int, list[float]] = {1: [], 2: []}
    with ExitStack() as stack:
        clients = {n: stack.enter_context(connect(None, n)) for n in found}
        lists = {}
        for n, client in clients.items():
            held = client.scatter(codes, broadcast=True)
            lists[n] = [(job, held, shard) for shard in shards]
            run_tasks(client, "warm", list_shard, lists[n])
            run_tasks(client, "warm", throw_away, [(job, 0, fires[:1], shards)] * (4 * n))
        for _ in range(TURNS):
            for n, client in clients.items():
                client.run(forget_codes)  # as an analysis finds its workers
                busy = sum(client.run(time.process_time).values())
                wall = time.perf_counter()
                run_tasks(client, "lists", list_shard, lists[n])
                run_tasks(client, "pairs", throw_away, counts)
                wall = time.perf_counter() - wall
                found[n].append((wall, sum(client.run(time.process_time).values()) - busy))
                bare[n].append(max(client.run(additions).values()) / n)
    rates = {}
    for n, turns in found.items():
        wall, busy = min(turns)
        speed = {"rows_per_s": len(codes) / wall, "rows_per_cpu_s": len(codes) / busy}
        rates[n] = {"rows": len(codes), **speed, "tiles": len(counts)}
    return rates, min(bare[1]) / min(bare[2])


def additions(n: int = 10_000_000) -> float:
    """Seconds that a loop takes."""
    start, total = time.perf_counter(), 0
    for i in range(n):
        total += i
    return time.perf_counter() - start


def whole(codes: CodeStore, folder: Path, workers: int) -> Timed:
    """A whole analysis: its rates, its size on disk, and the largest peak memory of a worker (Linux: VmHWM)."""
    out, n_rows = folder / f"whole{codes.n_rows()}by{workers}", codes.n_rows()
    with connect(None, workers) as client:
        busy = sum(client.run(time.process_time).values()) + time.process_time()
        wall = time.perf_counter()
        record = analyze(AnalyzeConfig(codes=codes.url, out=out), client)
        wall = time.perf_counter() - wall
        busy = sum(client.run(time.process_time).values()) + time.process_time() - busy
        peak = max(client.run(_own_peak).values())
    size = {
        path: sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        for path in (out, *out.rglob("cooccurrence"))
    }
    shutil.rmtree(out)
    return {
        "rows": n_rows,
        "rows_per_s": n_rows / wall,
        "rows_per_cpu_s": n_rows / busy,
        "worker_peak_bytes": peak,
        "disk_bytes": size.pop(out),
        "pair_bytes": sum(size.values()),
        **{name: record[name] for name in ("min_together", "pairs", "pairs_kept")},
    }


def _own_peak() -> int:
    lines = Path(f"/proc/{psutil.Process().pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024


def measure(n_rows: int, memory_rows: list[int], folder: Path) -> dict[str, Any]:
    """All figures, by name."""
    result: dict[str, Any] = {"features": FEATURES, "k": K, "counting": {}, "whole": {}, "memory": [], "ratios": {}}
    ratios = result["ratios"]
    if n_rows:
        codes = write_codes(folder / "codes", n_rows)
        shards = [shard for part in PARTS for shard in codes.shards(part)]
        indices, values = (np.concatenate([codes.read(s, f"codes/{name}") for s in shards]) for name in ("index", "value"))
        fired = values > 0
        del values
        fires = np.bincount(indices[fired], minlength=FEATURES)
        rates = result["counting"]
        job, marked = counting_job(codes, folder / "counting"), marked_codes(indices, fired, FEATURES)
        rates["ours, 1 thread"] = thread_rate(job, shards, marked, fires)
        by_workers, bare = process_rates(job, shards, marked, fires)
        rates |= {f"ours, {n} process(es)": rate for n, rate in by_workers.items()}
        del marked
        rates |= other_rates(indices, fired, fires)
        result["whole"] = {f"{n} worker(s)": whole(codes, folder, n) for n in (1, 2)}
        speed = {name: rate["rows_per_s"] for name, rate in rates.items()}
        ours = speed["ours, 1 thread"]
        ratios["over_dense"] = ours / max(rate for name, rate in speed.items() if name.startswith("dense"))
        ratios["over_scipy"] = ours / speed["scipy CSR"]
        ratios["over_delphi"] = ours / speed["delphi's sparse product"]
        ratios["two_processes"] = speed["ours, 2 process(es)"] / speed["ours, 1 process(es)"]
        ratios["two_processes_bare_loop"] = bare
        one, two = (result["whole"][f"{n} worker(s)"]["rows_per_s"] for n in (1, 2))
        ratios["two_workers_whole"] = two / one
    for n in memory_rows:
        result["memory"].append(whole(write_codes(folder / f"codes{n}", n), folder, 1))
    if len(memory_rows) > 1:
        peaks = [own["worker_peak_bytes"] for own in result["memory"]]
        ratios["memory"] = max(peaks) / min(peaks)
    return result


def main() -> None:
    global FEATURES, K
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--memory-rows", type=int, nargs="*", default=[1_000_000, 8_000_000])
    parser.add_argument("--features", type=int, default=FEATURES, help="other than 24,576: only with --rows 0")
    parser.add_argument("--k", type=int, default=K, help="other than 32: only with --rows 0")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder if left out")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if (options.features, options.k) != (FEATURES, K) and options.rows:
        parser.error("--features and --k need --rows 0: the table is of one kind of codes")
    FEATURES, K = options.features, options.k
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        result = measure(options.rows, options.memory_rows, Path(folder))
    if options.json:
        print(json.dumps(result, indent=1, ensure_ascii=False))
        return
    counting = {f"counting: {name}": rate for name, rate in result["counting"].items()}
    wholes = {f"whole analyze: {name}": rate for name, rate in result["whole"].items()}
    print(f"{'':52}{'rows':>12}{'rows/s':>12}{'rows/CPU-s':>12}")
    for name, rate in (counting | wholes).items():
        print(f"{name:52}{rate['rows']:>12,}{rate['rows_per_s']:>12,.0f}{rate['rows_per_cpu_s']:>12,.0f}")
    for own in result["memory"]:
        print(
            f"whole analyze, one worker: {own['rows']:,} rows in {own['rows'] / own['rows_per_s']:,.0f} s, peak "
            f"{own['worker_peak_bytes'] / 1e6:,.0f} MB, {own['disk_bytes'] / 1e6:,.0f} MB on disk, of which pairs "
            f"{own['pair_bytes'] / 1e6:,.0f} MB ({own['pairs_kept']:,} of {own['pairs']:,} kept, at least "
            f"{own['min_together']} together)"
        )
    for name, ratio in result["ratios"].items():
        print(f"{name}: {ratio:.2f}" + (f" (asked: {ASKED[name]:g})" if name in ASKED else ""))


if __name__ == "__main__":
    main()
